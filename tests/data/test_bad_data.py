"""Datasets with one problem each: one clear error or one warning with number and example; and check-data's report."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from conditional_detr import Preprocessing
from conditional_detr.cli import app
from conditional_detr.data.dataset import CocoData
from helpers import coco

NAN, INFINITY = float("nan"), float("inf")


def first_annotation(**change):
    def apply(data, images):
        data["annotations"][0].update(change)

    return apply


def first_image(**change):
    def apply(data, images):
        data["images"][0].update(change)

    return apply


def top(**change):
    def apply(data, images):
        data.update(change)

    return apply


def boxes(function):
    def apply(data, images):
        for entry in data["annotations"]:
            entry["bbox"] = function(*entry["bbox"])

    return apply


def file(function):
    def apply(data, images):
        function(images / "10.png")

    return apply


def without(key, name):
    def apply(data, images):
        del data[key][0][name]

    return apply


def again(key, **change):
    def apply(data, images):
        data[key].append({**data[key][0], **change})

    return apply


def rotate_in_exif(path: Path):
    """Mark an image as rotated in its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-60])


def crowds_only(data, images):
    data["annotations"] = data["annotations"][4:]


# The change; when it is reported: "error" by the constructor, "item" when the image is opened, or "warning"; the
# message; check-data's exit code and part of its output.
BAD = {
    "not json": (lambda d, i: "{'images': []}", "error", "data.json: expected JSON, got something else", 2, ""),
    "truncated json": (
        lambda d, i: json.dumps(d)[:-9],
        "error",
        "data.json: expected JSON, got something else",
        2,
        "",
    ),
    "a list": (lambda d, i: "[]", "error", "expected an object with images, annotations and categories", 2, ""),
    "no list of annotations": (top(annotations=None), "error", "expected a list under 'annotations'", 2, ""),
    "no images": (top(images=[], annotations=[]), "error", "images: expected at least one, got none", 2, ""),
    "no categories": (top(categories=[]), "error", "categories: expected at least one, got none", 2, ""),
    "a duplicate image id": (
        again("images", file_name="11.png"),
        "error",
        r"images\[3\]: expected distinct ids, got 10 again",
        2,
        "",
    ),
    "a duplicate category id": (
        again("categories", name="cow"),
        "error",
        r"categories\[2\]: expected distinct ids, got 9 again",
        2,
        "",
    ),
    "a duplicate category name": (
        again("categories", id=1),
        "error",
        "expected distinct category names, got duplicates: dog",
        2,
        "",
    ),
    "ids of two types": (first_image(id="ten"), "error", "expected ids that are all integers or all", 2, ""),
    "a category without a name": (
        without("categories", "name"),
        "error",
        "category 9: expected an object with 'name'",
        2,
        "",
    ),
    "an unknown image": (
        first_annotation(image_id=99),
        "error",
        r"annotations\[0\]: expected the id of an image of .*, got image_id 99",
        1,
        "1 invalid annotations",
    ),
    "an image id as string": (
        first_annotation(image_id="10"),
        "error",
        r"annotations\[0\]: expected the id of an image of .*, got image_id '10'",
        1,
        "1 invalid annotations",
    ),
    "an unknown category": (
        first_annotation(category_id=0),
        "error",
        r"annotations\[0\]: expected a category of .* \(9 dog, 3 cat\), got category_id 0",
        1,
        "1 invalid annotations",
    ),
    "no box": (
        without("annotations", "bbox"),
        "error",
        r"annotations\[0\]: expected an object with 'bbox'",
        1,
        "1 invalid annotations",
    ),
    "three numbers": (
        first_annotation(bbox=[1, 2, 3]),
        "error",
        r"annotations\[0\]: expected a bbox \[x0, y0, w, h\], got \[1, 2, 3\]",
        1,
        "1 invalid annotations",
    ),
    "numbers as strings": (
        first_annotation(bbox=["1", "2", "3", "4"]),
        "error",
        r"annotations\[0\]: expected finite numbers as bbox, got '1'",
        1,
        "1 invalid annotations",
    ),
    "NaN": (
        first_annotation(bbox=[1, NAN, 3, 4]),
        "error",
        r"annotations\[0\]: expected finite numbers as bbox, got nan",
        1,
        "1 invalid annotations",
    ),
    "infinity": (
        first_annotation(bbox=[1, 2, INFINITY, 4]),
        "error",
        r"annotations\[0\]: expected finite numbers as bbox, got inf",
        1,
        "1 invalid annotations",
    ),
    "a negative width": (
        first_annotation(bbox=[9, 9, -3, 4]),
        "error",
        r"annotations\[0\]: expected a bbox .* with w and h of at least 0, got \[9, 9, -3, 4\]",
        1,
        "1 invalid annotations",
    ),
    "an area that is null": (
        first_annotation(area=None),
        "error",
        r"annotations\[0\]: expected finite numbers as area, got None",
        1,
        "1 invalid annotations",
    ),
    "iscrowd as string": (
        first_annotation(iscrowd="no"),
        "error",
        r"annotations\[0\]: expected 0 or 1 as iscrowd, got 'no'",
        1,
        "1 invalid annotations",
    ),
    "fractions": (
        boxes(lambda x, y, w, h: [x / 64, y / 48, w / 64, h / 48]),
        "error",
        "expected every bbox as .* in pixels; looks like fractions of the image",
        1,
        "looks like fractions of the image",
    ),
    "corners": (
        boxes(lambda x, y, w, h: [x, y, x + w, y + h]),
        "error",
        "expected every bbox as .* in pixels; looks like x0 y0 x1 y1",
        1,
        "looks like x0 y0 x1 y1",
    ),
    "pixels of larger images": (
        boxes(lambda x, y, w, h: [x * 10, y * 10, w * 10, h * 10]),
        "error",
        "looks like boxes of images of another size",
        1,
        "looks like boxes of images of another size",
    ),
    "no annotations": (
        top(annotations=[]),
        "error",
        "expected annotations to train or measure on, got none$",
        1,
        "dataset without annotations to train on",
    ),
    "crowds only": (
        crowds_only,
        "error",
        "expected annotations to train or measure on, got 1, all of them crowds$",
        1,
        "dataset without annotations to train on",
    ),
    "no file_name": (
        without("images", "file_name"),
        "error",
        "image 10: expected a file_name, got None",
        1,
        "1 images without a file_name",
    ),
    "a missing file": (
        file(Path.unlink),
        "error",
        "10.png: no such file; 1 of the 3 images of .* are missing",
        1,
        "1 images that are missing",
    ),
    "no width": (
        first_image(width=0),
        "error",
        "image 10: expected height and width as positive integers, got 48 and 0",
        1,
        "1 images whose height and width are not positive integers",
    ),
    "a width as string": (
        first_image(width="64"),
        "error",
        "image 10: expected height and width as positive integers, got 48 and '64'",
        1,
        "1 images whose height and width are not positive integers",
    ),
    "height and width exchanged": (
        first_image(width=48, height=64),
        "item",
        "10.png: expected 48 x 64 pixels, as in .*, got 64 x 48",
        1,
        "1 images whose size differs from the annotations",
    ),
    "size before a rotation": (
        file(rotate_in_exif),
        "item",
        "10.png: expected 64 x 48 pixels, as in .*, got 48 x 64",
        1,
        "10.png: expected 64 x 48, got 48 x 64",
    ),
    "a text file": (
        file(lambda path: path.write_text("no image")),
        "item",
        "10.png: expected an image, got a text file",
        1,
        "1 images that cannot be read",
    ),
    "an empty file": (
        file(lambda path: path.write_bytes(b"")),
        "item",
        "10.png: expected an image, got an empty file",
        1,
        "1 images that cannot be read",
    ),
    "a truncated image": (
        file(truncate),
        "item",
        "10.png: the image cannot be read",
        1,
        "1 images that cannot be read",
    ),
    "zero area": (
        first_annotation(bbox=[4, 6, 20, 0]),
        "warning",
        r"1 of 5 annotations have zero area and are excluded from the targets: annotations\[0\] of 10.png$",
        1,
        "1 annotations that have zero area",
    ),
    "outside": (
        first_annotation(bbox=[64, 6, 20, 10]),
        "warning",
        r"1 of 5 annotations lie outside their images and are excluded from the targets: annotations\[0\] of 10.png$",
        1,
        "1 annotations that lie outside their images",
    ),
    "partly outside": (
        first_annotation(bbox=[-4, 6, 20, 10]),
        "warning",
        r"1 of 5 annotations extend more than 1 pixel outside .* and are clipped: annotations\[0\] of 10.png$",
        1,
        "1 annotations that extend more than 1 pixel outside",
    ),
    "a duplicate annotation": (
        again("annotations", id=77),
        "warning",
        r"1 of 6 annotations repeat an earlier annotation .* and are kept: annotations\[5\] of 10.png$",
        1,
        "1 annotations that repeat an earlier annotation",
    ),
    "a duplicate annotation id": (
        first_annotation(id=1),
        "warning",
        r"1 of 5 annotations repeat the id of an earlier annotation and are kept: annotations\[1\] of 10.png$",
        1,
        "1 annotations that repeat the id of an earlier annotation",
    ),
    "a duplicate image": (
        again("images", id=99),
        "warning",
        "1 images are listed more than once: 10.png$",
        1,
        "1 images with a duplicate file_name",
    ),
}


@pytest.fixture
def broken(request, tmp_path):
    """Return the dataset with one problem."""
    data = coco.content()
    path, images = coco.write(tmp_path)
    text = BAD[request.param][0](data, images)
    path.write_text(text if isinstance(text, str) else json.dumps(data))
    return path, images


@pytest.mark.parametrize(("broken", "name"), [(name, name) for name in BAD], indirect=["broken"], ids=list(BAD))
def test_bad_dataset(broken, name):
    path, images = broken
    _, when, message, code, output = BAD[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if when == "error":
            with pytest.raises((OSError, ValueError), match=message):
                CocoData(path, images)
        else:
            data = CocoData(path, images, preprocessing=Preprocessing(48, 64))
        if when == "item":
            with pytest.raises((OSError, ValueError), match=message):
                data[0]
    assert len(caught) == (when == "warning")
    for warning in caught:
        assert warning.filename == __file__  # the caller's line, not the library's
        assert re.search(message, str(warning.message))
    result = CliRunner().invoke(app, ["check-data", "--data", str(path), "--images", str(images)])
    assert result.exit_code == code, result.output
    if code == 1:
        assert output in result.stdout
        assert "problems: 1\n" in result.stdout
    if code == 2:
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")


def test_there_are_at_least_twenty_problems():
    assert len(BAD) >= 20


def test_warnings_have_the_number_of_cases_and_the_first_ones(tmp_path):
    data = coco.content()
    for i in range(7):
        data["annotations"].append({"id": 50 + i, "image_id": 10, "category_id": 9, "bbox": [i, 1, 0, 5]})
    path, images = coco.write(tmp_path, data)
    message = (
        r"data.json: 7 of 12 annotations have zero area and are excluded from the targets: annotations\[5\] of 10.png,"
        r" annotations\[6\] of 10.png, annotations\[7\] of 10.png and 4 more$"
    )
    with pytest.warns(UserWarning, match=message):
        made = CocoData(path, images)
    assert len(made[0][1]["labels"]) == 2


def test_missing_files_and_folders(tmp_path):
    path, images = coco.write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.json: no such file"):
        CocoData(tmp_path / "none.json", images)
    with pytest.raises(NotADirectoryError, match="expected the folder of the images, got a file"):
        CocoData(path, path)
    shutil.rmtree(images)
    with pytest.raises(NotADirectoryError, match="expected the folder of the images, got a path that does not exist"):
        CocoData(path, images)
