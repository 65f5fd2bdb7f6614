"""The service in a process of its own, with limits that the command line does not have; and raw requests to it."""

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conditional_detr import Detector
from conditional_detr.data.synthetic import draw_image

WAIT = 60  # seconds, for what takes a few


def image_bytes(kind: str = "JPEG", seed: int = 0) -> bytes:
    file = io.BytesIO()
    draw_image(seed, 0)[0].save(file, kind)
    return file.getvalue()


@dataclass(frozen=True)
class Application:
    """What each process of the service creates."""

    weights: str = "shapes"
    keys: str | None = None
    urls: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self):
        import torch

        from conditional_detr.inference.url_guard import UrlGuard
        from conditional_detr.serving.app import create_app
        from conditional_detr.serving.keys import ApiKeys
        from conditional_detr.serving.settings import ServiceSettings

        torch.set_num_threads(1)
        settings = ServiceSettings(urls=UrlGuard(*self.urls), **self.settings)
        keys = ApiKeys(self.keys) if self.keys else None
        return create_app({"shapes": Detector.from_pretrained(self.weights)}, settings, keys=keys)


class Service:
    """A running service; used as a context, it is killed at the end."""

    def __init__(self, folder: Path, *, workers: int = 1, drain_seconds: float = 20.0, **application: Any) -> None:
        self.log_path = folder / "log.txt"
        tests = Path(__file__).parent.parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
        arguments = json.dumps({"workers": workers, "drain_seconds": drain_seconds, **application})
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "helpers.service", arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self.port = int(self.process.stdout.readline() or 0)

    def __enter__(self) -> "Service":
        wait_until(lambda: self.get("/health/ready")[0] == 200)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def count(self, message: str) -> int:
        """Return how many lines of the log have this message."""
        return sum(message in line.get("message", "") for line in self.log_lines())

    def memory(self) -> float:
        """Return the resident memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def request(self, method: str, path: str, body: Any = None, headers: Any = None, timeout: float = WAIT):
        """Return status, headers and body of an answer on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def get(self, path: str, **options: Any):
        return self.request("GET", path, **options)

    def detect(self, image: bytes, **options: Any):
        return self.request("POST", "/v1/detect", image, {"content-type": "image/jpeg"}, **options)

    def post_json(self, path: str, content: Any, **options: Any):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.request("POST", path, body, {"content-type": "application/json"}, **options)

    def connect(self, timeout: float = WAIT) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def raw(self, *parts: bytes, timeout: float = WAIT) -> bytes:
        """Send bytes, as far as the service reads them, and return all that it answers until it closes."""
        with self.connect(timeout) as connection:
            with contextlib.suppress(OSError):
                for part in parts:
                    connection.sendall(part)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            received += part
    return received


def wait_until(condition: Any, seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if condition():
                return
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.02)


def main() -> None:
    from conditional_detr.cli.console import one_line_errors
    from conditional_detr.serving.server import ServerOptions, listen, log_to_stderr, run

    arguments = json.loads(sys.argv[1])
    options = ServerOptions(arguments.pop("workers"), arguments.pop("drain_seconds"))
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    log_to_stderr()
    with one_line_errors():
        sys.exit(run(Application(**arguments), listener, options, lambda: print(port, flush=True)))


if __name__ == "__main__":
    main()
