"""The README's Python blocks run and print what they say; the examples run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_block_runs_and_prints_what_it_says(workplace, capsys, code, printed):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    if printed:
        assert capsys.readouterr().out == printed


def test_there_are_blocks_and_the_first_comes_early():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(BLOCKS) == 4
    assert sum(bool(printed) for _, printed in BLOCKS) == 3
    assert lines.index("```python") < 30


def test_first_detection(photograph, tmp_path):
    output = tmp_path / "found.png"
    script = [sys.executable, ROOT / "examples" / "first_detection.py", photograph, "--output", output]
    result = subprocess.run(script, capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert lines[0] == "No --weights: making an UNTRAINED model. What it finds is random."
    assert lines[1] == f"5 objects on {photograph}, 128 x 96 pixels"
    assert len(lines) == 8
    assert output.stat().st_size > 0
