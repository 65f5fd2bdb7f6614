"""``export``, and the commands that take what it wrote."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conditional_detr import Detector
from conditional_detr.cli import app
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.evaluation.coco import evaluate
from conditional_detr.inference.exported import ExportedModel
from helpers.models import LEAST_CONFIG


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def written(least, photograph, tmp_path_factory):
    """A file with post-processing, and what the command said."""
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    return path, run("export", least, path, "--top-k", 5, "--image", photograph)


def test_export_says_what_it_wrote(written, photograph):
    path, done = written
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"wrote {path} (float32, {path.stat().st_size / 1e6:.1f} MB)"
    description = ExportedModel(path).description
    assert description.top_k == 5
    assert description.image == str(photograph)
    for line, one in zip(lines[1:], description.parity, strict=True):
        size = f"{one.height} x {one.width}"
        expected = f"logits differ by at most {one.logits:.1e}, boxes by {one.boxes:.1e}"
        assert line == f"compared with the model at {size}: {expected}"
    assert [(one.height, one.width) for one in description.parity] == [(96, 128), (49, 65)]


def test_nothing_is_overwritten_unasked(written, least, tmp_path):
    path, _ = written
    before = path.read_bytes()
    refused = run("export", least, path)
    assert refused.exit_code == 2
    assert "small.onnx: already exists; set overwrite, or --overwrite, to replace it" in refused.stderr
    assert path.read_bytes() == before
    (tmp_path / "x.bin").touch()
    refused = run("export", least, tmp_path / "x.xml")
    assert "x.bin: already exists; set overwrite, or --overwrite, to replace it" in refused.stderr
    refused = run("export", least, tmp_path / "x.XML")
    assert "x.bin: already exists; set overwrite, or --overwrite, to replace it" in refused.stderr
    half = run("export", least, tmp_path / "x.xml", "--half", "--overwrite")
    assert half.exit_code == 0, half.output
    assert (tmp_path / "x.bin").stat().st_size > 0
    assert ExportedModel(tmp_path / "x.xml").description.precision == "float16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x.pth",), "x.pth: expected a file name that ends in one of .onnx, .xml, .pt2"),
        (("no/x.onnx",), "no: no such folder"),
        (("x.onnx", "--image", "x.png"), "x.png: no such file"),
    ],
)
def test_export_refuses(small, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    refused = run("export", small, *arguments)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert message in refused.stderr
    assert list(Path.cwd().iterdir()) == []


def test_detect_takes_the_file(written, least, photograph, tmp_path):
    path, _ = written
    for name, weights in (("file", path), ("model", least)):
        done = run("detect", photograph, "--weights", weights, "--threshold", 0.1, "--output", tmp_path / name)
        assert done.exit_code == 0, done.output
    found, expected = (json.loads((tmp_path / name / "photograph.json").read_text()) for name in ("file", "model"))
    assert found.keys() == expected.keys()
    boxes, theirs = (torch.tensor([one["box"] for one in of["detections"]]) for of in (found, expected))
    assert len(boxes) > 0
    torch.testing.assert_close(boxes, theirs, atol=1e-2, rtol=0)


def test_evaluate_takes_the_file(shapes_onnx, tmp_path):
    data = write_shapes(tmp_path / "data", 4, seed=3, split="val")
    images = tmp_path / "data" / "val"
    options = ("--data", data, "--images", images, "--json", tmp_path / "numbers.json")
    done = run("evaluate", *options, "--weights", shapes_onnx)
    assert done.exit_code == 0, done.output
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    expected = evaluate(Detector.from_pretrained("shapes"), data, images).metrics
    assert numbers["AP"] == pytest.approx(expected["AP"], abs=1e-3)
    assert numbers["AP"] > 0.3


def test_thresholds_of_the_file(least, photograph, tmp_path, monkeypatch):
    """The default of detect, from which options differ; AP is measured without them unless they are asked for."""
    monkeypatch.chdir(tmp_path)
    model = Detector.from_pretrained(least)
    names = [name for name in model.model.metadata.class_names if name is not None]
    scores = model(photograph, threshold=0, top_k=5).scores.tolist()
    label = model(photograph, threshold=0, top_k=1).names[0]
    stored = {**dict.fromkeys(names, 1.0), label: (scores[0] + scores[1]) / 2}
    Path("t.json").write_text(json.dumps(stored))
    done = run("export", least, "small.pt2", "--thresholds", "t.json", "--image", photograph)
    assert done.exit_code == 0, done.output
    detector = Detector.from_file("small.pt2")
    assert detector.thresholds == stored
    assert detector(photograph).names == (label,)
    told = run("info", "small.pt2")
    assert f"{label} {stored[label]:g}" in " ".join(told.stdout.split())
    for options, count in (((), 1), (("--threshold", 0.0, "--top-k", 3), 3)):
        run("detect", photograph, "--weights", "small.pt2", "--output", "o", "--no-draw", "--overwrite", *options)
        assert len(json.loads(Path("o/photograph.json").read_text())["detections"]) == count
    other = next(name for name in names if name != label)
    found = model(photograph, threshold=0, classes=[other], top_k=1)
    x0, y0, x1, y1 = found.boxes[0].tolist()
    box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
    image = {"id": 1, "file_name": photograph.name, "height": found.size[0], "width": found.size[1]}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, **box}
    data = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": other}]}
    Path("data.json").write_text(json.dumps(data))
    recalls = {False: 1.0, True: 0.0}  # the one annotation is a detection of a class with the threshold 1
    for applied, recall in recalls.items():
        measured = evaluate(detector, "data.json", photograph.parent, apply_thresholds=applied)
        assert measured.metrics["AR100"] == recall


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cat": 0.5}, "thresholds: expected class names of the model, got 'cat'"),
        ({"LABEL_0": 0.5}, "thresholds: expected one for each class that is reported, got none for LABEL_1"),
        ({"LABEL_0": 2}, "t.json: LABEL_0: expected a threshold of 0..1, got 2"),
    ],
)
def test_thresholds_that_cannot_be_stored(least, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("t.json").write_text(json.dumps(content))
    refused = run("export", least, "small.pt2", "--thresholds", "t.json")
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert [path.name for path in Path.cwd().iterdir()] == ["t.json"]


def test_info_tells_what_stands_in_the_file(written, tmp_path):
    path, _ = written
    told = run("info", path)
    assert told.exit_code == 0, told.output
    assert "float32, post-processing to at most 5 detections" in told.stdout
    assert f"{LEAST_CONFIG.encoder_layers} layers, width {LEAST_CONFIG.width}" in told.stdout
    assert "shortest edge 96, longest 160" in told.stdout
    assert json.loads(run("info", path, "--json").stdout) == json.loads(ExportedModel(path).description.to_json())
    (tmp_path / "x.onnx").write_text("x")
    refused = run("info", tmp_path / "x.onnx")
    assert refused.exit_code == 2
    assert f"error: {tmp_path / 'x.onnx'}: damaged" in refused.stderr


def test_weights_and_files_are_told_apart(written):
    path, _ = written
    for command in (("convert", path, "elsewhere"), ("attention", "x.png", "--weights", path)):
        refused = run(*command)
        assert refused.exit_code == 2
        assert "Detector.from_file opens exported models" in refused.stderr
