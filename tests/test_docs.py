"""The code blocks of README.md and docs/ run and print what they show; the examples run."""

import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from conditional_detr.data.synthetic import CLASS_NAMES, draw_image, image_index, write_shapes
from helpers.films import write_film
from helpers.models import TINY, run_example, transformers_model

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"cli.md", "changelog.md"}  # docs/hooks.py writes them and api/ when the site is built
BLOCK = re.compile(
    r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
COMMIT = "0" * 40
SHORTER = {  # options added to every such command
    "train": ["--epochs", "1", "--workers", "0"],
    "benchmark": [
        *("--rounds", "1", "--height", "64", "--width", "96", "--training-size", "64", "--training-batch-size", "1"),
        *("--engine", "transformers", "--engine", "optimised"),
    ],
}


class Block(NamedTuple):
    """A code block of a page, with the comment before it and the output after it."""

    page: Path
    line: int
    mark: str
    language: str
    code: str
    printed: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        elsewhere = self.mark.startswith(("run: ", "not run: "))  # .ci/run runs the former
        return self.language in ("python", "bash", "javascript") and not elsewhere


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start(3)), found[1] or "", found[2], found[3], found[4])
        for found in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub cache in which the published id stands for a tiny checkpoint of the same kind."""
    from conditional_detr import ConditionalDETR, Metadata, Preprocessing

    repository = tmp_path_factory.mktemp("hub") / "models--microsoft--conditional-detr-resnet-50"
    snapshot = repository / "snapshots" / COMMIT
    transformers_model(**{**TINY, "backbone": "resnet50", "stage": 4, "num_labels": 91}).save_pretrained(snapshot)
    model = ConditionalDETR.from_pretrained(snapshot)
    names = [f"class {i}" for i in range(91)]
    names[1], names[17], names[18] = "person", "cat", "dog"
    model.metadata = Metadata(tuple(names), preprocessing=Preprocessing(96, 160))
    model.save_pretrained(snapshot, overwrite=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository.parent


@pytest.fixture
def folder(hub, least, tmp_path, monkeypatch):
    """The working folder of a page: photo.jpg, photos/, film.mp4, my-data/ and its parts, my-detector/.

    The parts are train.json and the images in train/, val.json and val/.

    Images of shapes under other names stand for COCO's validation set.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    image, _, _ = draw_image(seed=1, index=7, size=(300, 400))
    Path("photos").mkdir()
    for path in ("photo.jpg", "photos/one.jpg", "photos/two.jpg"):
        image.save(path)
    for split, images in (("train", 8), ("val", 4)):
        write_shapes("drawn", images, seed=0, split=split).rename(f"{split}.json")
        Path("drawn", split).rename(split)
    Path("drawn").rmdir()
    for split in ("train", "val"):
        shutil.copytree(split, f"my-data/{split}")
        Path("my-data/annotations").mkdir(exist_ok=True)
        shutil.copy(f"{split}.json", "my-data/annotations")
    write_film(Path("film.mp4"), 4)
    Path("annotations").mkdir()
    content = json.loads(Path("val.json").read_text())
    content["categories"] = [
        {"id": i, "name": name} for i, name in enumerate(("person", "cat", "dog", "class 3", "class 4", "class 5"), 1)
    ]
    Path("annotations/instances_val2017.json").write_text(json.dumps(content))
    shutil.copytree("val", "val2017")
    shutil.copytree(least, "my-detector")
    return tmp_path


def assert_printed(block: Block, printed: str) -> None:
    """Compare what was printed with what the page shows; ``...`` there stands for anything."""
    if block.printed is not None:
        shown = [line.rstrip() for line in block.printed.strip().splitlines()]
        got = [line.rstrip() for line in printed.strip().splitlines()]
        expected = ".*".join(re.escape(part) for part in "\n".join(shown).split("..."))
        assert re.fullmatch(expected, "\n".join(got), re.DOTALL), (str(block), shown, got)


def environment_of(hub: Path) -> dict[str, str]:
    """Return the environment of a command that runs in a process of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_CACHE": str(hub), "OMP_NUM_THREADS": "1"}


def run_in_shell(block: Block, line: str, hub: Path) -> str:
    """Run a line with pipes, with several processes, or of another program, and return what it prints."""
    command = line.partition("conditional-detr ")[2].split()
    line = " ".join([line, *(SHORTER.get(command[0], []) if command else [])])
    ended = subprocess.run(["bash", "-c", line], env=environment_of(hub), capture_output=True, text=True)
    assert ended.returncode == 0, (str(block), line, ended.stderr)
    return ended.stdout


class Service:
    """The service of a page: it runs until the page's end, at a free port instead of 8000."""

    def __init__(self, hub: Path) -> None:
        self._hub = hub
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self, words: list[str]) -> None:
        command = [sys.executable, "-m", "conditional_detr", *words[1:], "--port", str(self.port)]
        self._process = subprocess.Popen(command, env=environment_of(self._hub), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not self.ready():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ready(self) -> bool:
        try:
            urllib.request.urlopen(f"http://localhost:{self.port}/health/ready", timeout=5).close()
        except urllib.error.URLError:  # also 503
            return False
        return True

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def service(hub):
    service = Service(hub)
    yield service
    service.stop()


def run_javascript(code: str) -> str | None:
    """Run a script in Node and return what it prints; None without Node."""
    if shutil.which("node") is None:
        return None
    Path("script.mjs").write_text(code)
    return subprocess.check_output(["node", "script.mjs"], text=True)


def run_commands(block: Block, hub: Path, service: Service) -> str:
    """Run the commands of a block, most in this process, and return what they print."""
    from conditional_detr.cli import app

    printed = ""
    expected = int(block.mark.removeprefix("exit code: ")) if block.mark.startswith("exit code: ") else 0
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] != "conditional-detr":
            printed += run_in_shell(block, line, hub)
            continue
        if words[1] == "serve" and not expected:
            service.start(words)
            continue
        arguments = [*words[1:], *SHORTER.get(words[1], [])]
        if words[1] == "benchmark" and "--weights" not in words:
            arguments += ["--weights", "my-detector"]
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
        assert result.exit_code == expected, (str(block), line, result.output, result.exception)
        printed += result.output
    return printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore:skipped")  # one block shows what a missing image does
def test_blocks_of_a_page_run_and_print_what_they_show(folder, hub, service, capsys, monkeypatch, page):
    """In order, the Python blocks in one namespace."""
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        if not block.runs:
            continue
        torch.manual_seed(0)
        capsys.readouterr()
        if service.running:  # on this machine; otherwise huggingface_hub's client asks nothing
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        block = block._replace(code=block.code.replace("localhost:8000", f"localhost:{service.port}"))
        if block.language == "bash":
            assert_printed(block, run_commands(block, hub, service))
        elif block.language == "javascript":
            printed = run_javascript(block.code)
            assert_printed(block if printed is not None else block._replace(printed=None), printed or "")
        else:
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
            assert_printed(block, capsys.readouterr().out)


def test_all_blocks_run_here_or_in_the_check_of_a_clone():
    script = (ROOT / ".ci" / "run").read_text()
    elsewhere = [block.mark.removeprefix("run: ") for block in BLOCKS if block.mark.startswith("run: ")]
    assert [mark for mark in elsewhere if f"block {mark})" not in script] == []
    assert len([block for block in BLOCKS if block.mark.startswith("not run: ")]) <= 2  # they need a cluster
    assert [str(block) for block in BLOCKS if block.language not in ("python", "bash", "javascript", "text")] == []


def test_readme_is_short_and_shows_output_early():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
    first = next(block for block in blocks_of(README) if block.language == "python")
    assert first.line < 30
    assert first.printed


def test_options_that_are_mentioned_exist():
    """Also those in tables and sentences. Those of other programs are listed here."""
    import typer

    from conditional_detr.cli import app

    group = typer.main.get_command(app)
    context = group.make_context("conditional-detr", [], resilient_parsing=True)
    commands = [group, *(group.get_command(context, name) for name in group.list_commands(context))]
    parameters = [parameter for command in commands for parameter in command.get_params(context)]
    known = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--nproc-per-node", "--no-python", "--no_python", "--num_processes", "--multi_gpu", "--cpu", "--check"}
    known |= {"--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}  # torchrun
    known |= {"--preload", "--signal", "--data-binary", "--shm-size"}  # gunicorn, sbatch, curl, docker
    for page in PAGES:
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
        assert mentioned <= known, f"{page.name}: {sorted(mentioned - known)}"


def test_relative_links_lead_to_files():
    """Also those to a heading. The site's build checks the links between its own pages, generated ones among them."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = target.partition("#")
            if "://" in target or Path(path).name in GENERATED or path.startswith("api/"):
                continue
            linked = page.parent / path if path else page
            assert linked.exists(), f"{page.name}: {target}"
            if heading and linked.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", text.lower()).strip().replace(" ", "-") for text in headings}
                assert heading in anchors, f"{page.name}: {target}"


def test_every_example_is_run():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tested = re.findall(r'run_example\("([\w/]+)"', tests)
    examples = (ROOT / "examples").rglob("*.py")
    assert {str(path.relative_to(ROOT / "examples").with_suffix("")) for path in examples} == set(tested)


@pytest.fixture
def run_again(tmp_path, monkeypatch, capsys):
    """Function that runs an example in this process: one that has also run in its own, as a user runs it."""

    def run(name, *arguments):
        script = str(ROOT / "examples" / f"{name}.py")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_example_detect(photograph, small, tmp_path, run_again):
    first, *objects, last = run_example("detect", folder=tmp_path)
    assert first == f"{len(objects)} detections in a synthetic image, 256 x 192 pixels"
    _, _, drawn = draw_image(0, image_index("demo", 0))
    assert sorted(line.split()[0] for line in objects) == sorted(CLASS_NAMES[label] for label in drawn)
    assert last == "drawn in detections.png"
    assert (tmp_path / "detections.png").stat().st_size > 0
    others = run_again("detect", photograph, "--weights", small, "--output", "mine.png")
    assert others[0].endswith(f"detections in {photograph}, 128 x 96 pixels")
    assert (tmp_path / "mine.png").stat().st_size > 0


def test_example_embed(small, tmp_path, run_again):
    boxes, losses = run_example("embed", folder=tmp_path)
    assert boxes == "boxes (6, 2, 50, 4), counts (2, 3)"
    before, after = (float(number) for number in re.findall(r"\d+\.\d+", losses))
    assert after < before
    assert run_again("embed", "--weights", small)[0] == "boxes (3, 2, 11, 4), counts (2, 7)"


def test_example_attention_maps(photograph, small, tmp_path):
    drawn, *heads = run_example("attention_maps", photograph, "--weights", small, folder=tmp_path)
    assert drawn.endswith("drawn in attention.png")
    assert len(heads) == 4
    for line in heads:
        x, y = (float(number) for number in re.findall(r"[+-]\d+\.\d", line))
        assert max(abs(x), abs(y)) < 128


def test_example_replace_head(tmp_path):
    assert run_example("replace_head", folder=tmp_path) == [
        "kept ('cat',), new ('hedgehog',)",
        "logits (6, 1, 50, 5), boxes (6, 1, 50, 4), 19,499,659 trainable parameters",
    ]


def test_example_plain_loop(tmp_path, run_again):
    *epochs, saved = run_example("plain_loop", "--epochs", "3", "--images", "32", folder=tmp_path)
    losses = [float(line.split()[-1]) for line in epochs]
    assert losses[2] < losses[0]
    assert saved == "saved in plain"
    again = run_again("plain_loop", "--epochs", "1", "--images", "8", "--weights", "plain")
    assert float(again[0].split()[-1]) < losses[0]
    lines = (ROOT / "examples" / "plain_loop.py").read_text().splitlines()
    assert len(lines) <= 90
    assert not any("conditional_detr.training" in line for line in lines)


def test_example_denoising(tmp_path):
    from conditional_detr import ConditionalDETR

    *epochs, saved = run_example("denoising", "--epochs", "3", "--images", "32", folder=tmp_path)
    first, *_, last = ([float(number) for number in re.findall(r"\d+\.\d+", line)] for line in epochs)
    assert last[0] < first[0]
    assert last[1] < first[1]
    assert saved == "saved in denoised"
    assert ConditionalDETR.from_pretrained(tmp_path / "denoised").metadata.class_names == ("disc", "square")


def test_example_benchmarks_own_model(small, tmp_path):
    """On small images: whether it runs, not what it says."""
    little = ("--weights", small, "--height", "64", "--width", "96", "--rounds", "1")
    *table, rate = run_example("benchmarks/own_model", *little, folder=tmp_path)
    assert [line.split(" | ")[0] for line in table] == ["| engine", "| ---", "| plain", "| optimised"]
    assert re.match(r"\| plain \| [\d.]+ \| 1\.00 \| 1\.00 to 1\.00 \| \d+ \| 0e\+00", table[2])
    assert re.fullmatch(r"(plain|optimised): \d+\.\d images per second", rate)
    assert len((ROOT / "examples" / "benchmarks" / "own_model.py").read_text().splitlines()) <= 40


def test_examples_finetune_and_evaluate(tmp_path):
    trained, detected = run_example("finetune", "--epochs", "1", folder=tmp_path)
    assert re.fullmatch(r"4 steps, weights in finetuned/best, AP 0\.\d+", trained)
    assert re.fullmatch(r"\d+ detections above 0\.3 in shapes/train/.*", detected)
    resumed, _ = run_example("finetune", "--epochs", "2", "--resume", folder=tmp_path)
    assert resumed.startswith("8 steps")
    data = ("--data", "shapes/instances_val.json", "--images", "shapes/val")
    twelve, *classes = run_example("evaluate", *data, "--weights", "finetuned/best", folder=tmp_path)
    assert re.match(r"AP 0\.\d{3}  AP50 0\.\d{3}  AP75", twelve)
    assert sorted(line.split()[0] for line in classes) == ["cross", "disc", "ring", "square", "star", "triangle"]
