"""An ordinary small fine-tuning to its end: train, evaluate, export to each format, detect with each."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from conditional_detr.cli import app
from conditional_detr.data.synthetic import write_shapes
from helpers.exports import OneTrace

FORMATS = (".onnx", ".xml", ".pt2")
EPOCHS = 9


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def one_class(folder, split, images):
    """Write images of shapes of which only the squares are annotated; every image has one."""
    path = write_shapes(folder, 4 * images, seed=0, split=split, size=(96, 128))
    content = json.loads(path.read_text())
    (square,) = (category for category in content["categories"] if category["name"] == "square")
    annotations = [entry for entry in content["annotations"] if entry["category_id"] == square["id"]]
    kept = sorted({entry["image_id"] for entry in annotations})[:images]
    assert len(kept) == images
    content |= {
        "images": [image for image in content["images"] if image["id"] in kept],
        "annotations": [entry for entry in annotations if entry["image_id"] in kept],
        "categories": [square],
    }
    path.write_text(json.dumps(content))
    return path, folder / split


@pytest.mark.filterwarnings("default")
def test_one_class_of_24_images_from_training_to_exported_models(tmp_path, monkeypatch):
    """The trained weights ``bccd`` on another class; boxes of all formats agree to a hundredth of a pixel."""
    (data, images), (val, val_images) = (one_class(tmp_path, split, n) for split, n in (("train", 24), ("val", 4)))
    output, best = tmp_path / "run", tmp_path / "run" / "best"
    validation = ("--val-data", val, "--val-images", val_images)
    options = ("--epochs", EPOCHS, "--shortest-edge", 128, "--output", output, "--workers", 0)
    trained = run("train", "--data", data, "--images", images, *validation, "--weights", "bccd", *options)
    steps = EPOCHS * 3  # 24 images, 8 a step
    assert f"after {steps} steps" in trained.stdout
    assert f"warm-up of 3 steps instead of 50: the whole run has {steps} steps" in trained.stderr
    measured = run("evaluate", "--data", val, "--images", val_images, "--weights", best)
    assert "square" in measured.stdout
    detect = ("detect", val_images / "000000.jpg", "--threshold", 0.05, "--no-draw", "--output")
    run(*detect, tmp_path / "plain", "--weights", best)
    expected = json.loads((tmp_path / "plain" / "000000.json").read_text())["detections"]
    assert expected
    monkeypatch.setattr("conditional_detr.deploy.export.trace", OneTrace())
    for suffix in FORMATS:
        exported = tmp_path / f"best{suffix}"
        assert f"wrote {exported}" in run("export", best, exported).stdout
        run(*detect, tmp_path / suffix[1:], "--weights", exported)
        found = json.loads((tmp_path / suffix[1:] / "000000.json").read_text())["detections"]
        assert [one["name"] for one in found] == [one["name"] for one in expected]
        boxes = [np.array([one["box"] for one in detections]) for detections in (found, expected)]
        np.testing.assert_allclose(*boxes, rtol=0, atol=0.01)
