"""Closed-loop clients in a process of their own, on the standard library alone: each sends when it has its answer."""

import http.client
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Outcome(NamedTuple):
    """What became of a request.

    Attributes:
        end: Unix time.
        seconds: from the first byte sent.
        status: of the answer; 0: sent and not answered; -1: not connected.
        retry_after: the header, or nothing.
    """

    end: float
    seconds: float
    status: int
    retry_after: str


class Load:
    """Clients that run for a while; a context, at whose end they are stopped."""

    def __init__(
        self, port: int, image: Path, clients: int, seconds: float, pause: float = 0.0, key: str = ""
    ) -> None:
        arguments = [str(argument) for argument in (port, image, clients, seconds, pause, key)]
        self._process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Load":
        self._process.stdout.readline()  # they have begun
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def outcomes(self) -> list[Outcome]:
        """Wait for the end."""
        return [Outcome(*outcome) for outcome in json.loads(self._process.stdout.read())]


def statuses(outcomes: list[Outcome]) -> Counter[int]:
    return Counter(outcome.status for outcome in outcomes)


def client(port: int, image: bytes, until: float, pause: float, key: str, outcomes: list[Outcome]) -> None:
    headers = {"content-type": "image/jpeg", "authorization": f"Bearer {key}"}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.time() < until:
        began, retry_after = time.time(), ""
        try:
            if connection.sock is None:
                connection.connect()
        except OSError:
            status = -1
            time.sleep(0.05)
        else:
            try:
                connection.request("POST", "/v1/detect", image, headers)
                answer = connection.getresponse()
                answer.read()
                status, retry_after = answer.status, answer.headers.get("retry-after", "")
            except (OSError, http.client.HTTPException):
                status = 0
                connection.close()
        outcomes.append(Outcome(time.time(), time.time() - began, status, retry_after))
        if status == 503:
            time.sleep(pause)


def main() -> None:
    port, path, clients, seconds, pause, key = sys.argv[1:]
    image, until = Path(path).read_bytes(), time.time() + float(seconds)
    outcomes: list[Outcome] = []
    arguments = (int(port), image, until, float(pause), key, outcomes)
    threads = [threading.Thread(target=client, args=arguments) for _ in range(int(clients))]
    for thread in threads:
        thread.start()
    print("begun", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
