"""Signals, load, workers that die, and starts that fail."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

pytest.importorskip("uvicorn")

from conditional_detr.cli import app
from conditional_detr.serving.server import listen
from helpers.load import Load, statuses
from helpers.service import Service, image_bytes, read_all, wait_until

HEAD = b"POST /v1/detect HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\n"
FIRST, SECOND = "first-key-0123456789", "second-key-0123456789"


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.jpg"
    path.write_bytes(image_bytes())
    return path


def test_overload_and_then_sigterm_under_load(tmp_path, image):
    """Too many clients get 503 and cost no memory; at the end, every request that was sent is answered."""
    with Service(tmp_path, settings={"max_queue": 4}) as service:
        before = 0.0
        while service.memory() > 1.02 * before:  # the first requests of each thread take memory that stays
            before = service.memory()
            with Load(service.port, image, 4, 1) as load:
                normal = load.outcomes()
        assert statuses(normal).keys() == {200}
        before = service.memory()
        with Load(service.port, image, 40, 3, pause=0.05) as load:
            overload = load.outcomes()
        assert statuses(overload).keys() == {200, 503}
        assert {outcome.retry_after for outcome in overload if outcome.status == 503} == {"1"}
        assert statuses(overload)[200] > 0.2 * 3 * len(normal)
        assert service.memory() < 1.05 * before + 20
        with Load(service.port, image, 4, 1) as load:
            after = load.outcomes()
        assert statuses(after).keys() == {200}
        assert len(after) > 0.5 * len(normal)

        kept = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
        kept.request("GET", "/health/ready")
        assert kept.getresponse().read() == b'{"status":"ready"}'
        slow = service.connect()
        content = image.read_bytes()
        slow.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(content) + content[:100])
        with Load(service.port, image, 3, 3) as load:  # with the slow one, as many as fit
            time.sleep(1)
            began = time.monotonic()
            service.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            service.send_signal(signal.SIGTERM)
            kept.request("GET", "/health/ready")
            answer = kept.getresponse()
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            slow.sendall(content[100:])
            received = read_all(slow)
            assert service.process.wait(30) == 0
            assert time.monotonic() - began < 20
            ending = load.outcomes()
        assert received.startswith(b"HTTP/1.1 200 ")
        assert b'"label"' in received
        kept.close()
        slow.close()
        assert statuses(ending).keys() == {200, -1}  # none that was sent has no answer; later ones are not connected


def test_keys_logs_and_the_last_requests(tmp_path):
    """At the end, a request that never ends gets 503, and connections that nobody has accepted get their answers."""
    keys = tmp_path / "keys"
    keys.write_text(FIRST)
    with Service(tmp_path, keys=str(keys), drain_seconds=4.0) as service:

        def models(key: str, **headers: str) -> int:
            return service.get("/v1/models", headers={"authorization": f"Bearer {key}", **headers})[0]

        assert (models(FIRST), models(SECOND)) == (200, 401)
        keys.write_text(SECOND)
        service.send_signal(signal.SIGHUP)
        wait_until(lambda: models(SECOND) == 200)
        assert models(FIRST) == 401
        keys.write_text("short")
        service.send_signal(signal.SIGHUP)
        wait_until(lambda: service.count("the API keys are as before") == 1)
        assert models(SECOND) == 200

        # what strangers choose does not shape the log
        models(SECOND, **{"x-request-id": '", "status": 200, "x": "'})
        service.get('/%0a{"status":200}', headers={"authorization": f"Bearer {SECOND}"})
        models(SECOND, **{"x-request-id": "abc-1"})
        wait_until(lambda: service.log_lines()[-1].get("request_id") == "abc-1")
        lines = service.log_lines()
        assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", line.get("request_id", "a")) for line in lines)
        assert lines[-2]["route"] == "other"
        log = service.log_path.read_text()
        assert FIRST not in log
        assert SECOND not in log

        authorization = f"authorization: Bearer {SECOND}\r\n".encode()
        content = image_bytes()
        request = HEAD + authorization + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(content) + content
        with contextlib.ExitStack() as stack:
            stuck = stack.enter_context(service.connect())
            stuck.sendall(HEAD + authorization + b"content-length: 100\r\n\r\nabc")
            time.sleep(0.2)
            service.send_signal(signal.SIGSTOP)
            waiting = [stack.enter_context(service.connect()) for _ in range(10)]
            for connection in waiting:
                connection.sendall(request)
            service.send_signal(signal.SIGTERM)
            service.send_signal(signal.SIGCONT)
            assert [read_all(connection)[:13] for connection in waiting] == [b"HTTP/1.1 200 "] * 10
            status, _, body = read_all(stuck).partition(b"\r\n")
        assert status.split()[1] == b"503"
        assert b"retry-after: 1" in body
        assert json.loads(body.partition(b"\r\n\r\n")[2])["error"]["code"] == "shutting_down"
        assert service.process.wait(30) == 0
        assert [
            line for line in service.log_lines() if line.get("level") == "error" and "Traceback" in str(line)
        ] == []


def workers_of(service: Service) -> list[psutil.Process]:
    children = psutil.Process(service.process.pid).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


def detections_of(service: Service, key: str) -> float:
    """Return how many requests to detect all workers have answered."""
    metrics = service.get("/metrics", headers={"authorization": f"Bearer {key}"})[2].decode()
    name = 'conditional_detr_requests_total{route="/v1/detect",status="200"} '
    return float(metrics.partition(name)[2].split()[0])


def test_workers_that_are_killed_and_their_supervisor(tmp_path, image):
    keys = tmp_path / "keys"
    keys.write_text(FIRST)
    with Service(tmp_path, workers=2, keys=str(keys)) as service:
        wait_until(lambda: service.count("accepts connections") == 2)
        first, second = workers_of(service)
        with Load(service.port, image, 8, 3, key=FIRST) as load:
            time.sleep(1)
            killed_at = time.time()
            first.kill()
            outcomes = load.outcomes()
        lost = [outcome for outcome in outcomes if outcome.status != 200]
        assert len(lost) <= 8  # those of the worker that died
        assert all(outcome.end < killed_at + 2 for outcome in lost)
        assert min(outcome.end for outcome in outcomes if outcome.end - outcome.seconds > killed_at) < killed_at + 5
        answered = statuses(outcomes)[200]
        assert answered <= detections_of(service, FIRST) <= answered + 8

        wait_until(lambda: service.count("accepts connections") == 3)  # the dead one is replaced
        workers = workers_of(service)
        assert len(workers) == 2
        assert second in workers
        keys.write_text(SECOND)
        service.send_signal(signal.SIGHUP)
        wait_until(lambda: service.count("keys were read again") == 2)
        for _ in range(20):  # both workers
            assert service.get("/v1/models", headers={"authorization": f"Bearer {SECOND}"})[0] == 200
            assert service.get("/v1/models", headers={"authorization": f"Bearer {FIRST}"})[0] == 401

        service.process.kill()
        psutil.wait_procs(workers, timeout=20)
        assert [worker for worker in workers if worker.is_running()] == []
        listen("127.0.0.1", service.port).close()


def test_workers_end_gracefully(tmp_path, image):
    """SIGTERM comes while the second worker is starting."""
    with Service(tmp_path, workers=2) as service, Load(service.port, image, 8, 2) as load:
        time.sleep(0.5)
        service.send_signal(signal.SIGTERM)
        assert service.process.wait(40) == 0
        outcomes = load.outcomes()
        assert statuses(outcomes).keys() == {200, -1}
        assert [line for line in service.log_lines() if line.get("level") == "error"] == []


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "conditional_detr", "serve", *arguments], capture_output=True, text=True, timeout=120
    )


def test_workers_whose_weights_cannot_be_loaded(tmp_path):
    """One line says so, and nothing is tried for ever."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no weights")
    ended = run_command("--weights", str(path), "--port", "0", "--workers", "2")
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if str(path) in line]
    assert len(lines) == 1, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use():
    with listen("127.0.0.1", 0) as taken:
        ended = CliRunner().invoke(app, ["serve", "--port", str(taken.getsockname()[1])])
    assert ended.exit_code == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "in use" in ended.stderr
