"""The report on a dataset, the command and the contact sheet."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conditional_detr.cli import app
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.contact_sheet import CELL_SIZE, GAP, _random_order, draw_sheet
from conditional_detr.data.report import check_data
from helpers import coco


def run(*arguments):
    return CliRunner().invoke(app, ["check-data", *(str(argument) for argument in arguments)])


def test_clean_dataset_by_hand(tmp_path):
    progress = []
    report = check_data(*coco.write(tmp_path), progress=lambda *numbers: progress.append(numbers))
    assert report.to_dict() == {
        "name": str(tmp_path / "data.json"),
        "images": 3,
        "annotations": 4,
        "crowds": 1,
        "classes": {"cat": 2, "dog": 2},
        # areas 200, 480, 320, 144
        "boxes": {"small": 4, "medium": 0, "large": 0, "min": 12, "median": 16.02, "max": 21.91},
        "image_sizes": {"64 x 48": 3},
        "problems": {},
        "notes": {},
    }
    assert progress == [(1, 3), (2, 3), (3, 3)]


def test_notes_are_not_problems(tmp_path):
    content = coco.content()
    content["categories"].append({"id": 1, "name": "cow"})
    content["annotations"][0]["bbox"] = [0, 0, 64, 48]
    content["annotations"][1]["bbox"] = [20, 20, 1.5, 24]
    del content["annotations"][4]
    path, images = coco.write(tmp_path, content)
    (images / "more").mkdir()
    shutil.copy(images / "10.png", images / "more" / "left.png")
    (images / "readme.txt").write_text("no image")
    result = run("--data", path, "--images", images)
    assert result.exit_code == 0, result.output
    assert "problems: 0\n" in result.stdout
    assert check_data(path, images).notes == {
        "images without annotations": ["12.png"],
        "annotations with a side under 2 pixels": ["annotations[1] of 10.png"],
        "annotations as large as their images": ["annotations[0] of 10.png"],
        "image files without an entry in the annotations": [str(images / "more" / "left.png")],
        "classes without annotations": ["cow"],
    }


def test_all_problems_in_one_report(tmp_path):
    """The report does not stop at the first problem."""
    content = coco.content()
    content["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]
    content["annotations"][1]["category_id"] = 7
    content["annotations"][2]["bbox"] = [1, 2, 3, 0]
    content["images"].append({"id": 13, "file_name": "gone.png", "height": 5, "width": 5})
    content["images"].append({"id": 14, "file_name": "copy.png", "height": 48, "width": 64})
    path, images = coco.write(tmp_path, content)
    shutil.copy(images / "10.png", images / "copy.png")
    (images / "12.png").write_bytes(b"")
    written = tmp_path / "report.json"
    result = run("--data", path, "--images", images, "--json", written)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-2:] == ["problems: 6", f"wrote {written}"]
    report = json.loads(written.read_text())
    assert report == check_data(path, images).to_dict()
    assert report["problems"] == {
        "invalid annotations": [
            f"{path}: annotations[0]: expected finite numbers as bbox, got nan",
            f"{path}: annotations[1]: expected a category of {path} (9 dog, 3 cat), got category_id 7",
        ],
        "images that cannot be read": [
            f"{images / '12.png'}: expected an image, got an empty file (0 bytes)",
        ],
        "images that are missing": [f"{images / 'gone.png'}: no such file"],
        "groups of images with identical bytes": ["10.png = copy.png"],
        "annotations that have zero area and are excluded from the targets": ["annotations[2] of 11.png"],
    }


def test_files_without_read_permission_are_not_missing(tmp_path, monkeypatch):
    path, images = coco.write(tmp_path)
    read_bytes = Path.read_bytes

    def denied(file):
        if file.name == "10.png":
            raise PermissionError(f"{file}: permission denied")
        return read_bytes(file)

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert check_data(path, images).problems == {
        "images that cannot be read": [f"{images / '10.png'}: permission denied"]
    }


def test_long_lists_are_shortened_on_the_screen_only(tmp_path):
    content = coco.content()
    for i in range(9):
        content["annotations"].append({"id": 50 + i, "image_id": 10, "category_id": 9, "bbox": [i, 1, 0, 5]})
    path, images = coco.write(tmp_path, content)
    result = run("--data", path, "--images", images, "--json", tmp_path / "report.json")
    assert "  annotations[9] of 10.png\n  and 4 more\n" in result.stdout
    (cases,) = json.loads((tmp_path / "report.json").read_text())["problems"].values()
    assert len(cases) == 9


def test_real_dataset_is_clean(shared):
    folder = shared / "data" / "coco"
    report = check_data(folder / "instances_val2017.json", folder / "val2017")
    assert report.problems == {}
    assert (report.images, report.annotations + report.crowds) == (66, 560)
    assert report.crowds > 0
    assert sum(report.boxes[size] for size in ("small", "medium", "large")) == report.annotations


# ---- the sheet


def test_sheet_shows_boxes_in_colour(tmp_path):
    path, images = coco.write(tmp_path)
    for name in ("10", "11", "12"):
        Image.new("RGB", (64, 48), (128, 128, 128)).save(images / f"{name}.png")
    sheet = draw_sheet(read_annotations(path), images)
    assert sheet.size == (3 * (CELL_SIZE[0] + GAP) + GAP, CELL_SIZE[1] + 17 + 2 * GAP)
    drawn = np.asarray(sheet.crop((GAP, GAP, GAP + CELL_SIZE[0], GAP + CELL_SIZE[1])), dtype=int)
    coloured = np.ptp(drawn, axis=2) > 60
    assert coloured.any()
    plain = [np.ptp(np.asarray(sheet)[GAP + 150, GAP + i * (CELL_SIZE[0] + GAP) + 2]) for i in range(3)]
    assert max(plain) == 0
    fewer = draw_sheet(read_annotations(path), images, count=1)
    assert fewer.size[0] == CELL_SIZE[0] + 2 * GAP


def test_every_class_is_on_the_sheet(tmp_path):
    """Of 200 images, one has the rare class: it comes first with every seed."""
    content = coco.content()
    content["categories"].append({"id": 1, "name": "rare"})
    content["images"] += [{"id": 100 + i, "file_name": "10.png"} for i in range(197)]
    content["annotations"].append({"image_id": 150, "category_id": 1, "bbox": [1, 1, 5, 5]})
    path, _ = coco.write(tmp_path, content)
    data = read_annotations(path)
    for seed in range(3):
        order = _random_order(data, seed)
        assert order[0] == 150
        assert sorted(order) == sorted(data.images)
    assert _random_order(data, 0) != _random_order(data, 1)


def test_the_command_writes_the_sheet(tmp_path):
    path, images = coco.write(tmp_path)
    for name in ("sheet.jpg", "sheet.png"):
        result = run("--data", path, "--images", images, "--sheet", tmp_path / name, "--sheet-images", 2)
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith(f"wrote {tmp_path / name}\n")
        with Image.open(tmp_path / name) as sheet:
            assert sheet.width == 2 * (CELL_SIZE[0] + GAP) + GAP


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.json", "--images", "{images}"), "error: none.json: no such file"),
        (("--data", "{data}", "--images", "{data}"), "error: {data}: expected the folder of the images, got a file"),
        (
            ("--data", "{data}", "--images", "no"),
            "error: no: expected the folder of the images, got a path that does not",
        ),
        (
            ("--data", "{data}", "--images", "{images}", "--json", "no/o.json"),
            "error: no/o.json: expected a file in an existing folder, got no",
        ),
        (
            ("--data", "{data}", "--images", "{images}", "--sheet", "no/o.png"),
            "error: no/o.png: expected a file in an existing folder, got no",
        ),
        (
            ("--data", "{data}", "--images", "{images}", "--sheet", "sheet.text"),
            "error: sheet.text: expected the suffix of an image, such as .jpg or .png, got '.text'",
        ),
    ],
)
def test_setup_errors_of_the_command(tmp_path, arguments, message):
    data, images = coco.write(tmp_path)
    result = run(*(argument.format(data=data, images=images) for argument in arguments))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(message.format(data=data))
    assert result.stdout == ""


def test_sheet_without_readable_images(tmp_path):
    path, images = coco.write(tmp_path)
    annotations = read_annotations(path)
    for image in images.iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="images: expected images, got none that can be read"):
        draw_sheet(annotations, images)


def test_images_of_other_splits_are_not_left_over(tmp_path):
    """Of one of several splits, only files beside its own images are looked at."""
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / split / "a.png")
        (tmp_path / "labels" / split / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: images/train\nval: images/val\n")
    assert not check_data(tmp_path).notes
    assert not check_data(tmp_path, split="val").notes
