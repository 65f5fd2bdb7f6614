"""What the folder of a run says about its checkpoints, of a run whose settings are known."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from conditional_detr import from_pretrained
from conditional_detr.checkpoints.model_card import CardDetails, make_card
from conditional_detr.training.card import details_of_run

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
    expected = {"batch size": 2, "lr": 1e-3, "backbone lr": 5e-4, "schedule": "constant", "images": 4, "steps": 2}
    assert expected.items() <= best.recipe.items()
    assert best.curves == tmp_path / "curves.png"
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "curves.png").unlink()
    assert details_of_run(tmp_path / "best").evaluation == {}
    assert details_of_run(tmp_path / "best").curves is None


def test_a_folder_of_no_run_says_nothing(tmp_path):
    assert details_of_run(tmp_path) == CardDetails()
    assert details_of_run(tmp_path / "best") == CardDetails()
