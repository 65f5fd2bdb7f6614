"""The commands on datasets in several formats, and convert-data."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conditional_detr.cli import app
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from helpers import formats
from helpers.layouts import LABEL, NAMES, voc_text, write_files

pytestmark = pytest.mark.filterwarnings("default")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The content of two splits of shapes, and the folder of their images."""
    folder, splits = tmp_path_factory.mktemp("shapes"), {}
    for split, count in (("train", 6), ("val", 3)):
        splits[split] = json.loads(write_shapes(folder, count, seed=0, split=split, size=(96, 128)).read_text())
        for image in splits[split]["images"]:
            name = f"{split}{image['file_name']}"
            (folder / split / image["file_name"]).rename(folder / name)
            image["file_name"] = name
    return splits, folder


@pytest.mark.parametrize("form", ["roboflow", "yolo"])
def test_train_evaluate_and_check(contents, tmp_path, form, small):
    """With --data alone: training, the AP of its validation, and that of the command are of the same splits."""
    data = formats.WRITERS[form](tmp_path / form, *contents)
    output = tmp_path / "run"
    size = ("--shortest-edge", 64, "--epochs", 1, "--workers", 0)
    run("train", "--data", data, "--weights", small, *size, "--output", output)
    assert (output / "best").is_dir()
    logged = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    aps = [entry["AP"] for entry in logged if "AP" in entry]
    file = tmp_path / "metrics.json"
    run("evaluate", "--data", data, "--weights", output / "best", "--json", file)
    measured = json.loads(file.read_text())
    assert set(measured["per_class"]) == set(CLASS_NAMES)
    assert aps == [pytest.approx(measured["AP"], abs=1e-6)]
    total = len(contents[0]["val"]["annotations"])
    assert sum(of_class["annotations"] for of_class in measured["per_class"].values()) == total
    checked = run("check-data", "--data", data, "--split-name", "val", "--sheet", tmp_path / "sheet.png")
    assert f"3 images, {total} annotations, 0 crowds" in checked
    assert "problems: 0" in checked
    run("train", "--data", data, *size[:2], "--epochs", 2, "--workers", 0, "--output", output, "--resume")


def test_train_splits_a_dataset(contents, tmp_path, small):
    """The same seed gives the same parts in train and in convert-data."""
    data = formats.write_yolo(tmp_path / "yolo", {"train": contents[0]["train"]}, contents[1])
    (data / "data.yaml").rename(data / "old.txt")
    (data / "classes.txt").write_text("\n".join(CLASS_NAMES))
    printed = run("convert-data", "--data", data, "--split", "0.5/0.5", "--seed", 1, "--output", tmp_path / "coco")
    parts = [json.loads((tmp_path / "coco" / f"instances_{name}.json").read_text()) for name in ("train", "val")]
    assert [len(part["images"]) for part in parts] == [3, 3]
    counts = [len(part["annotations"]) for part in parts]
    assert printed.splitlines() == [
        f"wrote {tmp_path}/coco/instances_{name}.json: 3 images in {data}, {count} annotations"
        for name, count in zip(("train", "val"), counts, strict=True)
    ]
    options = ("--weights", small, "--shortest-edge", 64, "--epochs", 1, "--workers", 0)
    run("train", "--data", data, "--split", "0.5/0.5", "--seed", 1, *options, "--output", tmp_path / "run")
    file = tmp_path / "metrics.json"
    val = ("--data", tmp_path / "coco" / "instances_val.json", "--images", data)
    run("evaluate", *val, "--weights", tmp_path / "run" / "best", "--json", file)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert json.loads(file.read_text())["AP"] == pytest.approx(next(e["AP"] for e in logged if "AP" in e), abs=1e-6)


def test_results_need_no_images(tmp_path):
    write_files(tmp_path, {"data.yaml": f"val: images\n{NAMES}", "images/a.png": "", "labels/a.txt": LABEL})
    found = [{"image_id": 1, "category_id": 0, "bbox": [16, 12, 32, 24], "score": 0.5}]
    (tmp_path / "found.json").write_text(json.dumps(found))
    file = tmp_path / "metrics.json"
    run("evaluate", "--data", tmp_path / "data.yaml", "--results", tmp_path / "found.json", "--json", file)
    assert json.loads(file.read_text())["AP"] == pytest.approx(1.0)


def test_errors_are_one_line(tmp_path, small):
    data = tmp_path / "set"
    write_files(data, {"a.xml": voc_text(), "a.png": "", "data.yaml": f"train: .\n{NAMES}", "a.txt": LABEL})
    for command in (
        ("check-data",),
        ("convert-data", "--output", tmp_path / "out"),
        ("evaluate", "--weights", small),
        ("train", "--weights", small, "--output", tmp_path / "out"),
    ):
        output = run(*command, "--data", data, code=2)
        assert output.startswith(f"error: {data}: expected a dataset in one format, got yolo (data.yaml) and voc")
        assert len(output.splitlines()) == 1
    voc = ("--data", data, "--format", "voc")
    assert "expected --data without splits, and no --val-data, got --val-data" in run(
        *("train", *voc, "--split", "0.5/0.5", "--val-data", data, "--weights", small, "--output", "out"), code=2
    )
    assert "split: expected two or three positive shares" in run(
        *("train", *voc, "--split", "1", "--weights", small, "--output", "out"), code=2
    )
    assert "wrote" in run("convert-data", *voc, "--output", tmp_path / "out")
    assert "already exists" in run("convert-data", *voc, "--output", tmp_path / "out", code=2)
    assert "wrote" in run("convert-data", *voc, "--output", tmp_path / "out", "--overwrite")
    assert Path(tmp_path, "out", "instances_all.json").is_file()
