"""Class names and file names with control characters and markup: on a terminal, in JSON, in drawings."""

import json
import os
import pty
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Config, Metadata, Preprocessing
from conditional_detr.cli import app
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.contact_sheet import draw_sheet
from conditional_detr.inference.drawing import draw_boxes
from conditional_detr.system.console import printable
from helpers import coco

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[31mFAKE"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x1b[31mFAKE"
NAMES = (EVIL, "[/x] :dog:", "a\nb")
SHOWN_NAMES = (SHOWN, "[/x] :dog:", r"a\nb")
COMMANDS = {  # arguments, exit code, what is shown
    "info": (["info", "weights"], 0, SHOWN_NAMES),
    "class": (["detect", "in/10.png", "--weights", "weights", "--class", "nope"], 2, SHOWN_NAMES),
    "file": (["detect", "in", "--weights", "weights", "--output", "o"], 1, [r"\x1b[2J\x1b[35mname.jpg: expected an"]),
    "check-data": (
        ["check-data", "--data", "data.json", "--images", "images"],
        1,
        (*SHOWN_NAMES, r"\x1b[2Jgone.png: no such file"),
    ),
    "server": (["detect", "ADDRESS", "--weights", "weights", "--output", "p"], 1, [r"\x1b[2J\x1b[31mAll images fine"]),
    "evaluate": (
        ["evaluate", "--data", "data.json", "--images", "in", "--weights", "weights"],
        2,
        [r"\x1b[2Jgone.png: no such file"],
    ),
}
# Runs several commands in one process, because an import takes seconds.
SCRIPT = """
import json, sys
from conditional_detr.cli import app
for arguments in json.loads(sys.argv[1]):
    print("BEGIN")
    try:
        app(arguments)
    except SystemExit as end:
        print("END", end.code)
"""


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Return a folder with weights, images and annotations that are full of control characters."""
    folder = tmp_path_factory.mktemp("strangers")
    config = Config(num_classes=3, backbone="test_resnet", width=32, heads=4, encoder_layers=1, decoder_layers=1)
    model = ConditionalDETR(config, Metadata(NAMES, preprocessing=Preprocessing(shortest_edge=64, longest_edge=96)))
    model.eval().save_pretrained(folder / "weights")
    data = coco.content()
    data["categories"] = [{"id": i, "name": name} for i, name in zip((9, 3, 1), NAMES, strict=True)]
    data["images"][0]["file_name"] = "\x1b[2Jgone.png"
    _, images = coco.write(folder, data)
    (folder / "in").mkdir()
    (images / "10.png").rename(folder / "in" / "10.png")
    (folder / "in" / "\x1b[2J\x1b[35mname.jpg").write_text("x")
    return folder


class Server(BaseHTTPRequestHandler):
    """Answer with a reason phrase that has control characters."""

    def do_GET(self):  # the name that http.server calls
        self.wfile.write(b"HTTP/1.1 404 \x1b[2J\x1b[31mAll images fine\r\nContent-Length: 0\r\n\r\n")

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/x.jpg"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def terminal(strangers, address):
    """Return exit code and output of each command on a pseudo-terminal."""
    main, side = pty.openpty()
    commands = json.dumps([arguments for arguments, *_ in COMMANDS.values()]).replace("ADDRESS", address)
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, commands]
    process = subprocess.Popen(command, stdout=side, stderr=side, cwd=strangers, env=environment)
    os.close(side)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(main)
    assert process.wait() == 0, seen
    parts = [part.rpartition("END ") for part in seen.decode().split("BEGIN\r\n")[1:]]
    return dict(zip(COMMANDS, [(int(code), text) for text, _, code in parts], strict=True))


@pytest.mark.parametrize("command", list(COMMANDS))
def test_commands_on_a_terminal(terminal, command):
    _, code, shown = COMMANDS[command]
    exit_code, seen = terminal[command]
    assert exit_code == code, seen
    for text in shown:
        assert text in seen
    for raw in ("\x1b[2J", "\x1b]0;", "\x07", "\x1b[31mFAKE", "\x1b[35mname"):
        assert raw not in seen


def test_json_on_a_terminal(strangers):
    result = CliRunner().invoke(app, ["info", str(strangers / "weights"), "--json"])
    assert result.stdout.isascii()
    assert "\x1b" not in result.stdout
    assert r"\u001b[31mFAKE" in result.stdout


@pytest.mark.parametrize("name", [EVIL, "a\nb", "\ud800", "a\0b", "\u202e", "x" * 100_000])
def test_drawings(tmp_path, name):
    """A name with control characters is drawn as its escaped form is."""
    blank = Image.new("RGB", (300, 200))
    drawn, expected = (
        draw_boxes(blank, [[9, 9, 290, 190]], [0], [n], [0.5]) for n in (name, printable(" ".join(name.split())))
    )
    assert drawn.tobytes() == expected.tobytes()
    data = coco.content()
    data["categories"][0]["name"] = name
    data["images"][0]["file_name"] = "a\nb.png"
    _, folder = coco.write(tmp_path)
    (folder / "10.png").rename(folder / "a\nb.png")
    sheet = draw_sheet(read_annotations(data), folder)
    assert sheet.tobytes() == draw_sheet(_escaped(data, folder), folder).tobytes()


def _escaped(data, folder: Path):
    """Return the annotations with names as they are shown."""
    data["categories"][0]["name"] = printable(" ".join(data["categories"][0]["name"].split()))
    data["images"][0]["file_name"] = r"a\nb.png"
    (folder / "a\nb.png").rename(folder / r"a\nb.png")
    return read_annotations(data)


def test_a_report_of_changed_heads(strangers, caplog):
    ConditionalDETR.from_pretrained(strangers / "weights", class_names=["dog"])
    (record,) = caplog.records
    assert SHOWN in record.getMessage()
    assert "\x1b" not in record.getMessage()


def test_an_encoding_that_lacks_characters(strangers, tmp_path):
    """Also those of the tables themselves, as rich draws them."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "20"}
    command = [sys.executable, "-m", "conditional_detr", "check-data", "--data", "data.json", "--images", "images"]
    ended = subprocess.run(
        [*command, "--json", tmp_path / "report.json"], env=environment, cwd=strangers, capture_output=True, text=True
    )
    assert ended.returncode == 1, ended.stderr  # the dataset has problems
    assert "Traceback" not in ended.stderr
    assert json.loads((tmp_path / "report.json").read_text())["images"] > 0


@pytest.mark.parametrize(
    "arguments",
    [[EVIL], [f"--{EVIL}"], ["detect", f"--{EVIL}"], ["detect", "--format", EVIL], ["info", "a", EVIL]],
    ids=["command", "option", "option of a command", "value", "argument"],
)
def test_usage_errors(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "\x1b" not in result.output
    assert r"\x1b]0;owned\x07" in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, which refuses all writes")
def test_standard_output_that_is_refused():
    command = [sys.executable, "-m", "conditional_detr", "info", "shapes"]
    with Path("/dev/full").open("w") as full:
        refused = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert refused.returncode == 2
    assert refused.stderr == "error: standard output: cannot be written: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (141, "")
