"""The README's Python blocks run and print what they say; the examples run."""

import re
import shutil
from pathlib import Path

import pytest

from conditional_detr.data.synthetic import CLASS_NAMES, draw_image, image_index
from helpers.models import run_example

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
)
COMMIT = "0" * 40


@pytest.fixture
def workplace(r50, photograph, tmp_path, monkeypatch):
    """A folder with photo.jpg, and a hub cache in which the published id stands for a made checkpoint."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--microsoft--conditional-detr-resnet-50"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(r50.folder, repository / "snapshots" / COMMIT)
    config = repository / "snapshots" / COMMIT / "config.json"
    text = config.read_text()
    for row, name in [(17, "cat"), (18, "dog")]:
        text = text.replace(f'"{row}": "LABEL_{row}"', f'"{row}": "{name}"')
    config.write_text(text)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(photograph, "photo.jpg")
    return tmp_path


@pytest.mark.parametrize(("code", "printed"), BLOCKS)
@pytest.mark.filterwarnings("ignore:skipped")  # one of them shows what a missing image does
def test_block_runs_and_prints_what_it_says(workplace, capsys, code, printed):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    if printed:
        assert capsys.readouterr().out == printed


def test_there_are_blocks_and_the_first_comes_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(BLOCKS) == 8
    assert sum(bool(printed) for _, printed in BLOCKS) == 7
    assert lines.index("```python") < 30


def test_every_example_is_run():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    tested = re.findall(r'run_example\("([\w/]+)"', tests)
    examples = (ROOT / "examples").rglob("*.py")
    assert {str(path.relative_to(ROOT / "examples").with_suffix("")) for path in examples} == set(tested)


def test_example_detect(photograph, small, tmp_path):
    first, *objects, last = run_example("detect", folder=tmp_path)
    assert first == f"{len(objects)} objects on an image of shapes, 256 x 192 pixels"
    _, _, drawn = draw_image(0, image_index("demo", 0))
    assert sorted(line.split()[0] for line in objects) == sorted(CLASS_NAMES[label] for label in drawn)
    assert last == "drawn in found.png"
    assert (tmp_path / "found.png").stat().st_size > 0
    others = run_example("detect", photograph, "--weights", small, "--output", "mine.png", folder=tmp_path)
    assert others[0].endswith(f"objects on {photograph}, 128 x 96 pixels")
    assert (tmp_path / "mine.png").stat().st_size > 0


def test_example_embed(small, tmp_path):
    boxes, losses = run_example("embed", folder=tmp_path)
    assert boxes == "boxes (6, 2, 50, 4), counts (2, 3)"
    before, after = (float(number) for number in re.findall(r"\d+\.\d+", losses))
    assert after < before
    assert run_example("embed", "--weights", small, folder=tmp_path)[0] == "boxes (3, 2, 11, 4), counts (2, 7)"


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
        "logits (6, 1, 50, 5), boxes (6, 1, 50, 4), 19,499,659 parameters train",
    ]


def test_example_plain_loop(tmp_path):
    *epochs, saved = run_example("plain_loop", "--epochs", "3", "--images", "32", folder=tmp_path)
    losses = [float(line.split()[-1]) for line in epochs]
    assert losses[2] < losses[0]
    assert saved == "saved in plain"
    again = run_example("plain_loop", "--epochs", "1", "--images", "8", "--weights", "plain", folder=tmp_path)
    assert float(again[0].split()[-1]) < losses[0]
    lines = (ROOT / "examples" / "plain_loop.py").read_text().splitlines()
    assert len(lines) <= 90
    assert not any("conditional_detr.training" in line for line in lines)


def test_example_benchmarks_own_model(small, tmp_path):
    """On small images: whether it runs, not what it says."""
    little = ("--weights", small, "--height", "64", "--width", "96", "--rounds", "1")
    *table, rate = run_example("benchmarks/own_model", *little, folder=tmp_path)
    assert [line.split(" | ")[0] for line in table] == ["| engine", "| ---", "| plain", "| optimised"]
    assert re.match(r"\| plain \| [\d.]+ \| 1\.00 \| 1\.00 to 1\.00 \| \d+ \| 0e\+00", table[2])
    assert re.fullmatch(r"(plain|optimised): \d+\.\d images per second", rate)
    assert len((ROOT / "examples" / "benchmarks" / "own_model.py").read_text().splitlines()) <= 40


def test_examples_finetune_and_evaluate(tmp_path):
    trained, found = run_example("finetune", "--epochs", "1", folder=tmp_path)
    assert re.fullmatch(r"4 steps, weights in finetuned/best, AP 0\.\d+", trained)
    assert re.fullmatch(r"\d+ objects above 0\.3 on shapes/train/.*", found)
    resumed, _ = run_example("finetune", "--epochs", "2", "--resume", folder=tmp_path)
    assert resumed.startswith("8 steps")
    data = ("--data", "shapes/instances_val.json", "--images", "shapes/val")
    twelve, *classes = run_example("evaluate", *data, "--weights", "finetuned/best", folder=tmp_path)
    assert re.match(r"AP 0\.\d{3}  AP50 0\.\d{3}  AP75", twelve)
    assert sorted(line.split()[0] for line in classes) == ["cross", "disc", "ring", "square", "star", "triangle"]
