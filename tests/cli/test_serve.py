"""``conditional-detr serve``: what it refuses, and how it names what it serves."""

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conditional_detr.cli import app

KEY = "a-key-of-these-tests"


def serve(*arguments):
    return CliRunner().invoke(app, ["serve", "--port", "0", *map(str, arguments)])


@pytest.fixture(autouse=True)
def loggers_as_before():
    """The command runs in this process, and directs the log to its standard error."""
    loggers = [logging.getLogger(name) for name in ("conditional_detr.serving", "uvicorn")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text(f"{KEY}\n")
    return path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "service.example.org"])
def test_a_public_address_needs_keys(host):
    result = serve("--host", host)
    assert result.exit_code == 2
    assert result.stderr == f"error: --host: expected --api-key-file, or --insecure, for the public address {host}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate-limit", "often"], "rate_limit: expected one such as 60/minute, got 'often'"),
        (["--rate-storage", "nowhere"], "rate_storage: unknown storage scheme : async+nowhere, got 'nowhere'"),
        (
            ["--weights", "nothing"],
            "weights 'nothing': no such file or folder; expected a file, a folder, a short name",
        ),
        (["--weights", "nothing", "--workers", "2"], "weights 'nothing': no such file or folder; expected a file"),
        (["--weights", "=shapes"], "--weights: expected WEIGHTS or NAME=WEIGHTS, got '=shapes'"),
        (["--weights", "shapes="], "--weights: expected WEIGHTS or NAME=WEIGHTS, got 'shapes='"),
        (
            ["--weights", "shapes", "--weights", "shapes=bccd"],
            "--weights: expected different names, got 'shapes' twice",
        ),
        (["--threshold", "2"], "threshold: expected 0..1, got 2.0"),
        (["--top-k", "0"], "top_k: expected at least 1, got 0"),
        (["--allow-urls", "http://x/"], "hosts: expected names such as"),
        (["--max-batch", "0"], "max_batch: expected at least 1, got 0"),
        (["--max-wait-ms", "5000"], "max_wait: expected 0 to 1 seconds, got 5.0"),
        (
            ["--api-key-file", "missing.txt"],
            "missing.txt: the file of API keys cannot be read: No such file or directory",
        ),
        (["--device", "abacus"], "device: expected one that this machine has, got 'abacus'"),
        (["--host", "192.0.2.1", "--insecure"], "--host 192.0.2.1 --port 0: "),
    ],
)
def test_wrong_options_are_one_line(options, message):
    result = serve(*options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_short_key_is_refused_before_anything_is_loaded(keys):
    keys.write_text("short\n")
    result = serve("--api-key-file", keys, "--weights", "nothing")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {keys}:1: expected a key of at least 16 ASCII characters")


@pytest.mark.parametrize("package", ["fastapi", "fastapi_offline", "uvicorn", "limits", "python_multipart"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("conditional_detr.serving", package))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    result = serve()
    assert result.exit_code == 2
    expected = f"the service needs {package}, which is not installed: pip install 'conditional-detr[serve]'"
    assert result.stderr == f"error: {expected}\n"
    for name in [name for name in sys.modules if name.startswith("conditional_detr.serving")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=re.escape(expected)):
        import conditional_detr.serving  # noqa: F401


@contextmanager
def serving(*arguments):
    """Run the command until the end of the context; yields its process and URL."""
    command = [sys.executable, "-m", "conditional_detr", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    try:
        line = process.stderr.readline()
        started = re.fullmatch(r"serving (.*) on (http://127\.0\.0\.1:\d+)\n", line)
        assert started, line + process.stderr.read()
        yield process, started[1], started[2]
    finally:
        process.kill()
        process.communicate()


def ask(url, key=None):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return json.load(answer)


def test_names_licences_keys_and_their_reload(small, keys, tmp_path):
    """A folder's name is the model's, unless another one is given; SIGHUP reads the keys again; SIGTERM ends it."""
    folder = tmp_path / "my.detector"
    folder.mkdir()
    for file in Path(small).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    weights = ["--weights", folder, "--weights", f"other/name={small}", "--weights", "shapes"]
    with serving(*weights, "--api-key-file", keys, "--host", "127.0.0.1") as (process, names, url):
        assert names == "my.detector, other/name, shapes"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/v1/models")
        licences = {model["id"]: model["licence"] for model in ask(f"{url}/v1/models", KEY)["data"]}
        assert licences == {
            "my.detector": "mit",
            "other/name": None,
            "shapes": "Apache-2.0, as far as we hold the rights (see the README)",
        }
        new = "another-key-of-these-tests"
        keys.write_text(f"sha256:{hashlib.sha256(new.encode()).hexdigest()}\n")
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while True:
            try:
                ask(f"{url}/v1/models/other%2Fname", new)
                break
            except urllib.error.HTTPError:
                assert time.monotonic() < deadline
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(f"{url}/v1/models", KEY)
        keys.write_text("broken\n")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert ask(f"{url}/v1/models", new)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    messages = [line["message"] for line in lines if "message" in line]
    assert messages == [
        "the API keys were read again",
        f"the API keys are as before: {keys}:1: expected a key of at least 16 ASCII characters without spaces,"
        " got 6 characters",
    ]
    assert KEY not in str(lines)
    assert new not in str(lines)
