"""The shipped weights: their files give the numbers of their cards."""

import hashlib
import re

import pytest
import torch
from safetensors import safe_open

from conditional_detr import ConditionalDETR, Detector, optimize
from conditional_detr.checkpoints.files import shipped_names
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from conditional_detr.evaluation.coco import evaluate
from helpers.models import WEIGHTS, card_metric


def test_names():
    assert shipped_names() == ["bccd", "shapes"]
    assert sorted(path.name for path in WEIGHTS.iterdir()) == ["README.md", "bccd", "shapes"]


@pytest.mark.parametrize(("name", "most"), [("shapes", 10e6), ("bccd", 30e6)])
def test_files_match_their_cards(name, most):
    """Checksum, half precision, size, and the images of the training curves."""
    folder = WEIGHTS / name
    content = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() in (folder / "README.md").read_text()
    assert len(content) < most
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118  # not a dict
    for image in re.findall(r"\]\(([\w.]+\.png)\)", (folder / "README.md").read_text()):
        assert (folder / image).read_bytes()[:4] == b"\x89PNG"
    model = ConditionalDETR.from_pretrained(name)
    assert next(model.parameters()).dtype == torch.float32
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in (folder / "README.md").read_text()


def test_shapes_on_held_out_images(tmp_path):
    """The first hundred of the five hundred held-out images of the card."""
    data = write_shapes(tmp_path, 100, seed=0, split="test")
    result = evaluate(Detector.from_pretrained("shapes"), data, tmp_path / "test")
    assert tuple(result.per_class) == CLASS_NAMES
    assert result.metrics["AP"] == pytest.approx(card_metric("shapes", "AP"), abs=0.03)
    assert min(result.metrics["AP"], card_metric("shapes", "AP")) >= 0.80


def test_bccd_on_its_official_test_split(shared):
    """The stored file, measured by this library's evaluation."""
    data = shared / "data" / "bccd"
    result = evaluate(Detector.from_pretrained("bccd"), data / "instances_test.json", data / "images")
    for metric in ("AP", "AP50", "AP75"):
        assert result.metrics[metric] == pytest.approx(card_metric("bccd", metric), abs=2e-3)
    assert result.metrics["AP"] >= 0.58
    assert result.metrics["AP50"] >= 0.88


def test_bccd_in_bfloat16_loses_at_most_three_thousandths(shared):
    """Of AP, on average of two splits: on the test images alone, the kernels of a CPU move it by 0.7 thousandths."""
    data, model = shared / "data" / "bccd", ConditionalDETR.from_pretrained("bccd")
    rounded, exact = (Detector(optimize(model, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    lost = [
        evaluate(exact, data / split, data / "images").metrics["AP"]
        - evaluate(rounded, data / split, data / "images").metrics["AP"]
        for split in ("instances_val.json", "instances_test.json")
    ]
    assert sum(lost) / 2 == pytest.approx(0, abs=3e-3)
