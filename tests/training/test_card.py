"""What the folder of a run says about its checkpoints, of a run whose settings are known."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from conditional_detr import from_pretrained
from conditional_detr.checkpoints.model_card import CardDetails, make_card
from conditional_detr.cli import app
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.system.paths import expand_home
from conditional_detr.training.card import checkpoint_of_run, details_of_run, written_card

LAST = Path(__file__).parent / "files" / "version_0.1.0" / "last"


def test_details_of_the_checkpoints_of_a_run(tmp_path):
    """The settings are those that tests/training/test_upgrade.py resumes with; the best epoch is the first one."""
    shutil.copytree(LAST, tmp_path / "last")
    shutil.copytree(LAST, tmp_path / "best")
    entries = [{"step": 1, "loss": 3.0}, {"step": 1, "AP": 0.5, "AP50": 0.7}, {"step": 2, "AP": 0.4, "AP50": 0.8}]
    entries[1]["per_class"] = {"red": 0.25, "blue": 0.75}  # logs of earlier versions have none
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / "curves.png").write_bytes(b"png")
    best, last = (details_of_run(tmp_path / name) for name in ("best", "last"))
    assert (best.evaluation["AP"], best.evaluation["AP50"]) == (0.5, 0.7)
    assert (last.evaluation["AP"], last.evaluation["AP50"]) == (0.4, 0.8)
    model = from_pretrained(tmp_path / "best")
    model.metadata = replace(model.metadata, class_names=("red", "blue"))
    card = make_card(model, replace(best, licence="mit"), name="a/b")
    assert "| red | - | 0.250 | - | - | - |" in card
    assert "| AP50 | 0.700 |" in card
    expected = {"batch size": 2, "lr": 1e-3, "backbone lr": 5e-4, "schedule": "constant", "steps": 2}
    assert expected.items() <= best.recipe.items()
    assert best.data == "4 images with the classes above"
    assert best.curves == tmp_path / "curves.png"
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "curves.png").unlink()
    assert details_of_run(tmp_path / "best").evaluation == {}
    assert details_of_run(tmp_path / "best").curves is None


def test_a_folder_of_no_run_says_nothing(tmp_path):
    assert details_of_run(tmp_path) == CardDetails()
    assert details_of_run(tmp_path / "best") == CardDetails()


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """Two drawn images for training and one for AP, in the working folder."""
    monkeypatch.chdir(tmp_path)
    for split, images in (("train", 2), ("val", 1)):
        write_shapes(tmp_path, images, seed=0, split=split, size=(64, 96))
    return tmp_path


def trained(small, *options):
    data = ["--data", "instances_train.json", "--images", "train", "--weights", str(small), "--output", "run"]
    small_steps = ["--batch-size", "2", "--workers", "0", "--shortest-edge", "64", "--longest-edge", "96"]
    return CliRunner().invoke(app, ["train", *data, *small_steps, *options])


VAL = ("--val-data", "instances_val.json", "--val-images", "val")


def test_the_command_leaves_a_card_of_the_run(small, shapes):
    """Read by the hub's own client; its code blocks are those that tests/checkpoints/test_model_card.py runs."""
    result = trained(small, *VAL, "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "model card: run/README.md\n" in result.stdout
    card = ModelCard.load("run/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("conditional_detr", "object-detection")
    log = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    (entry,) = [entry for entry in log if "AP" in entry]
    lines = card.text.splitlines()
    for line in ("# run/best", "Data: 2 images with the classes above", "| epochs | 1 |", "| batch size | 2 |"):
        assert line in lines
    for name in ("AP", "AP50"):
        assert f"| {name} | {'-' if entry[name] < 0 else format(entry[name], '.3f')} |" in lines
    for name, ap in entry["per_class"].items():
        assert f"| {name} | - | {'-' if ap < 0 else format(ap, '.3f')} | - | - | - |" in lines
    assert "![Curves of the training](curves.png)" in lines
    assert Path("run/curves.png").is_file()
    assert "detector = Detector.from_pretrained('run/best')" in lines
    assert [line for line in lines if line][-2:] == ["## Licence", "Not stated."]
    assert trained(small, *VAL, "--epochs", "2", "--resume").exit_code == 0
    assert "| epochs | 2 |" in Path("run/README.md").read_text().splitlines()


@pytest.mark.parametrize("link", [False, True])
def test_a_readme_of_the_users_stays(small, shapes, link):
    """Also that which a link points to, and one without text that can be read."""
    Path("run").mkdir()
    mine = Path("mine" if link else "run/README.md")
    mine.write_bytes(b"My own words \xff")
    if link:
        Path("run/README.md").symlink_to(mine.absolute())
    result = trained(small, "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "run/README.md stays as it is: it is no generated model card" in result.stderr
    assert mine.read_bytes() == b"My own words \xff"
    assert Path("run/README.md").is_symlink() == link
    assert checkpoint_of_run("run") == "run/last"
    assert written_card(Path("run/last")) == Path("run/README.md").absolute()
    Path("run/last/README.md").write_text("Nearer words.")
    assert written_card(Path("run/last")) == Path("run/last/README.md")


@pytest.mark.parametrize(
    ("part", "error"), [("write_atomically", OSError("no space left")), ("read_log", ValueError("line 1: no JSON"))]
)
def test_a_card_that_cannot_be_written_is_a_warning_after_the_results(small, shapes, monkeypatch, part, error):
    """The training has succeeded, and its results are printed."""

    def fail(_):
        raise error

    monkeypatch.setattr(f"conditional_detr.training.card.{part}", fail)
    result = trained(small, *VAL, "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert "after 1 steps: run/last\ncurves: run/curves.png\n" in result.stdout
    assert "model card" not in result.stdout
    assert f"warning: no model card: {error}\n" in result.stderr


def test_the_home_folder_of_a_user_who_does_not_exist(monkeypatch, tmp_path):
    """Is a name like any other."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    shutil.copytree(LAST, tmp_path / "run" / "last")
    assert checkpoint_of_run("~/run") == str(tmp_path / "run" / "last")
    assert checkpoint_of_run("~nosuchuser/run") == "~nosuchuser/run"
    assert expand_home("~nosuchuser/run") == Path("~nosuchuser/run")
    assert expand_home("~/run") == tmp_path / "run"
