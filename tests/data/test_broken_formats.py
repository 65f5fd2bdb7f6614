"""Damaged datasets of each form: one clear error with file and position, or one counted warning."""

import json
import re
import warnings

import pytest
from PIL import Image

from conditional_detr.data.annotations import OUTSIDE, ZERO_AREA
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.formats.reading import open_data
from conditional_detr.data.report import check_data
from helpers.layouts import CARD, DEVKIT, LABEL, NAMES, OBJECTS, coco_text, voc_text, write_files


def yolo(label=LABEL, description=f"train: images\n{NAMES}", **more):
    files = {"data.yaml": description, "images/a.png": "", "labels/a.txt": label}
    return {**files, **{name.replace("__", "/"): text for name, text in more.items()}}


def voc(text):
    return {"a.xml": text, "a.png": ""}


def hugging_face(text):
    return {"metadata.jsonl": text, "a.png": ""}


def with_corners(**corners):
    text = voc_text()
    for key, (old, new) in corners.items():
        text = text.replace(f"<{key}>{old}</{key}>", new)
    return text


LABELS = {  # one line of a label file, and what is said of it
    "too few numbers": ("0 0.5 0.5 0.5", "line 1: expected class cx cy w h, or .*, got 4 numbers: '0 0.5 0.5 0.5'"),
    "an odd corner": ("0 0.1 0.1 0.2 0.1 0.2 0.2 0.3", "line 1: expected class cx cy w h, or .*, got 8 numbers"),
    "a word": ("cat 0.5 0.5 0.5 0.5", "line 1: expected numbers: class cx cy w h, .*, got 'cat 0.5 0.5 0.5 0.5'"),
    "not finite": ("0 nan 0.5 0.5 0.5", "line 1: expected numbers: .*, got '0 nan 0.5 0.5 0.5'"),
    "commas": ("0,0.5,0.5,0.5,0.5", "line 1: expected numbers: .*, got '0,0.5,0.5,0.5,0.5'"),
    "an unknown class": ("2 0.5 0.5 0.5 0.5", r"line 1: expected a class index of data.yaml \(0 cat, 1 dog\), got 2"),
    "a negative class": ("-1 0.5 0.5 0.5 0.5", r"line 1: expected a class index of data.yaml \(.*\), got -1"),
    "half a class": ("0.5 0.5 0.5 0.5 0.5", r"line 1: expected a class index of data.yaml \(.*\), got 0.5"),
    "pixels": ("\n0 32 24 32 24", r"line 2: expected fractions of the image in \[0, 1\], got '32 24 32 24'"),
    "negative sides": ("0 0.5 0.5 -0.005 0.5", "line 1: expected w and h of at least 0, got -0.005 and 0.5"),
}
OBJECTS_OF_VOC = {  # one annotation, and what is said of it
    "no name": (voc_text().replace("<name>cat</name>", ""), "object 1: expected a name, got ''"),
    "no box": (voc_text().replace("bndbox", "box"), "object 1: expected a bndbox, got name, box"),
    "no corner": (with_corners(xmax=(48, "")), "object 1: xmax: expected a number, got ''"),
    "a word": (with_corners(xmax=(48, "<xmax>wide</xmax>")), "object 1: xmax: expected a number, got 'wide'"),
    "reversed": (
        with_corners(xmax=(48, "<xmax>8</xmax>")),
        "object 1: expected xmin <= xmax and ymin <= ymax, got xmin 16, ymin 12, xmax 8, ymax 36",
    ),
}
LINES = {  # one line of a metadata.jsonl, and what is said of it
    "lengths": (
        '{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [0, 1]}}',
        "line 1: objects: expected lists of one length, got bbox of 1, categories of 2",
    ),
    "no boxes": (
        '{"file_name": "a.png", "objects": {"boxes": [[1, 2, 3, 4]]}}',
        "line 1: objects: expected an object with 'bbox', got the keys 'boxes'",
    ),
    "no categories": (
        '{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]]}}',
        "line 1: objects: expected an object with 'categories', got the keys 'bbox'",
    ),
    "no objects": ('{"file_name": "a.png"}', "line 1: expected an object with 'objects', got the keys 'file_name'"),
    "three numbers": (
        '{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3]], "categories": [0]}}',
        r"line 1: objects\[0\]: expected a bbox \[x0, y0, w, h\], got \[1, 2, 3\]",
    ),
    "a word": (
        '{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, "4"]], "categories": [0]}}',
        r"line 1: objects\[0\]: expected finite numbers as bbox, got '4'",
    ),
    "negative sides": (
        '{"file_name": "a.png", "objects": {"bbox": [[9, 9, -3, 4]], "categories": [0]}}',
        r"line 1: objects\[0\]: expected a bbox \[x0, y0, w, h\] with w and h of at least 0, got \[9, 9, -3, 4\]",
    ),
    "no class": (
        '{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [null]}}',
        r"line 1: objects\[0\]: expected a category of \['0'\], got None",
    ),
}
FILES = {  # a dataset, and what is said of it
    "yaml": (yolo(description="names: [cat\ntrain: images"), "data.yaml: expected YAML, got something else: .*line 2"),
    "a list as yaml": ({"data.yaml": "- a", "classes.txt": ""}, "expected annotations: .* got classes.txt, data.yaml"),
    "no names": (yolo(description="train: images\nnc: many"), "data.yaml: names: expected a list of .*, got None"),
    "names of a type": (yolo(description="train: images\nnames: cat"), "names: expected a list of .*, got 'cat'"),
    "names by words": (
        yolo(description="train: images\nnames: {cat: 0}"),
        "names: expected indices from 0, got 'cat'",
    ),
    "another count": (yolo(description=f"train: images\nnc: 3\n{NAMES}"), "data.yaml: nc: expected 2, .*, got 3"),
    "a name twice": (yolo(description="train: images\nnames: [cat, cat]"), "distinct category names, got .*: cat"),
    "no folder": (
        yolo(description=f"train: photos\n{NAMES}"),
        "data.yaml: train: expected photos to exist, tried .*photos",
    ),
    "no path": (yolo(description=f"train: 5\n{NAMES}"), "data.yaml: train: expected a path or a list of paths, got 5"),
    "no images": (
        {"data.yaml": f"train: images\n{NAMES}", "images/a.txt": ""},
        r"data.yaml: train: expected images, got none in \['images'\]",
    ),
    "no labels": (
        {"data.yaml": f"train: images\n{NAMES}", "images/a.png": "", "label/a.txt": LABEL},
        "data.yaml: train: expected label files such as .*labels/a.txt, got none for 1 images",
    ),
    "an image that is missing": (
        {"data.yaml": f"train: t.txt\n{NAMES}", "t.txt": "./images/a.png\n./b.png\n", **yolo()}
        | {"data.yaml": f"train: t.txt\n{NAMES}"},
        "b.png: no such file",
    ),
    "keypoints": (
        yolo(description=f"train: images\nkpt_shape: 17\n{NAMES}"),
        "data.yaml: kpt_shape: expected two positive integers, got 17",
    ),
    "two descriptions": (
        yolo(**{"more.yaml": f"train: images\n{NAMES}"}),
        "expected one data.yaml, got data.yaml, more",
    ),
    "no darknet names": (
        {"obj.data": "train = train.txt"},
        "obj.data: expected a line 'names = ...', got the keys 'train'",
    ),
    "no xml": (voc(voc_text()[:-5]), "a.xml: expected XML, got something else: .*line 1"),
    "entities": (
        voc('<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]><annotation>&z;</annotation>'),
        "a.xml: expected XML without entities, got the entity 'x'",
    ),
    "CVAT's own xml": (
        voc("<annotations><image/></annotations>"),
        "expected Pascal VOC's <annotation>, got <annotations>; this is CVAT's own format: export as COCO",
    ),
    "a size": (
        voc(voc_text(size=("wide", 48))),
        "a.xml: size: expected height and width as integers, got '48' and 'wide'",
    ),
    "an image without a file": ({"a.xml": voc_text("b.png")}, "b.png: no such file; 1 of the 1 images"),
    "a set without a file": (
        {"Annotations/a.xml": voc_text(), "JPEGImages/a.png": "", "ImageSets/Main/train.txt": "a\nb\n"},
        "Annotations/b.xml: no such file",
    ),
    "json": (hugging_face('{"file_name": "a.png"\n'), "metadata.jsonl: line 1: expected JSON, got something else"),
    "a list": (
        hugging_face("[1]\n"),
        "metadata.jsonl: line 1: expected an object with file_name and objects, got a list",
    ),
    "no file name": (
        hugging_face(f"{{{OBJECTS}}}"),
        "line 1: expected an object with 'file_name', got the keys 'objects'",
    ),
    "names and numbers": (
        hugging_face(
            '{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]], "categories": [0, "cat"]}}'
        ),
        r": expected categories that are all integers or all names, got \[0, 'cat'\]",
    ),
    "a missing image": (hugging_face(f'{{"file_name": "b.png", {OBJECTS}}}'), "b.png: no such file"),
    "a card": (
        {**hugging_face(f'{{"file_name": "a.png", {OBJECTS}}}'), "README.md": "---\na: [\n---\n"},
        "README.md: expected YAML",
    ),
    "no images of a COCO folder": (
        {"annotations/instances_train.json": coco_text()},
        "expected the folder of the images, got none; a.png is in none",
    ),
    "two of one split": (
        {"annotations/instances_train2014.json": coco_text(), "annotations/instances_train2017.json": coco_text()},
        "expected one train split, got instances_train2014.json and instances_train2017.json",
    ),
    "other splits": (
        {"val/_annotations.coco.json": coco_text(), "val/a.png": ""},
        "expected the split train, got val",
    ),
    "nothing": ({"notes.docx": ""}, r"expected annotations: COCO JSON, .* or metadata.jsonl; got notes.docx"),
}


@pytest.mark.parametrize(("files", "message"), list(FILES.values()), ids=list(FILES))
def test_one_error(tmp_path, files, message):
    write_files(tmp_path, files)
    with pytest.raises((OSError, ValueError), match=message) as caught:
        CocoData(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path) in str(caught.value)


ANNOTATIONS = [
    *((f"yolo: {name}", yolo(label), f"labels/a.txt: {message}") for name, (label, message) in LABELS.items()),
    *((f"voc: {name}", voc(text), f"a.xml: {message}") for name, (text, message) in OBJECTS_OF_VOC.items()),
    *((f"hf: {name}", hugging_face(text), f"metadata.jsonl: {message}") for name, (text, message) in LINES.items()),
]


@pytest.mark.parametrize(
    ("files", "message"), [case[1:] for case in ANNOTATIONS], ids=[case[0] for case in ANNOTATIONS]
)
def test_one_invalid_annotation(tmp_path, files, message):
    """An error in training, one line of check-data's report, which has all others, too."""
    if "metadata.jsonl" in files:
        intact = '{"file_name": "b.png", "objects": {"bbox": [[1, 2, 30, 40]], "categories": [0]}}'
        files = {**files, "metadata.jsonl": f"{files['metadata.jsonl']}\n{intact}"}
    intact = {"b.xml": voc_text("b.png"), "images/b.png": "", "labels/b.txt": LABEL, "b.png": ""}
    write_files(
        tmp_path, {**files, **(intact if "a.xml" in files else {k: v for k, v in intact.items() if k != "b.xml"})}
    )
    Image.new("RGB", (65, 48)).save(tmp_path / "b.png")  # not the same bytes
    with pytest.raises(ValueError, match=message):
        CocoData(tmp_path)
    report = check_data(tmp_path)
    assert re.search(message, report.problems["invalid annotations"][0])
    assert len(report.problems["invalid annotations"]) == 1
    assert report.annotations == 1


WARNINGS = {
    "yolo: zero area": (
        yolo(f"{LABEL}0 0.5 0.5 0 0.5"),
        f"1 of 2 annotations {ZERO_AREA}: annotations[1] of images/a.png",
    ),
    "yolo: twice": (yolo(LABEL * 2), "1 of 2 annotations repeat an earlier annotation"),
    "voc: outside": (
        voc(
            voc_text().replace("</annotation>", "") + "<object><name>cat</name><bndbox><xmin>70</xmin><ymin>1</ymin>"
            "<xmax>90</xmax><ymax>9</ymax></bndbox></object></annotation>"
        ),
        f"1 of 2 annotations {OUTSIDE}: annotations[1] of a.png",
    ),
    "hf: partly outside": (
        hugging_face(
            '{"file_name": "a.png", "objects": {"bbox": [[50, 10, 30, 9], [1, 1, 9, 9]], "categories": [0, 0]}}'
        ),
        "1 of 2 annotations extend more than 1 pixel outside",
    ),
}


@pytest.mark.parametrize(("files", "message"), list(WARNINGS.values()), ids=list(WARNINGS))
def test_one_counted_warning(tmp_path, files, message):
    write_files(tmp_path, files)
    with pytest.warns(UserWarning, match=r" of 2 annotations ") as caught:
        CocoData(tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    assert message in str(caught[0].message)
    assert str(tmp_path) in str(caught[0].message)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (voc("<annotation>"), "a.xml: expected XML"),
        (hugging_face('{"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [{}]}}'), "line 1"),
    ],
)
def test_check_data_says_why_nothing_is_left(tmp_path, files, message):
    write_files(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        check_data(tmp_path)


def test_an_unreadable_image_is_one_problem(tmp_path):
    """Of a YOLO dataset, whose boxes need its size."""
    write_files(tmp_path, yolo(**{"labels__b.txt": LABEL}))
    (tmp_path / "images/b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b.png: expected an image, got a text file"):
        CocoData(tmp_path)
    assert list(check_data(tmp_path).problems) == ["images that cannot be read"]


def test_sizes_that_differ_are_reported(tmp_path):
    """The size that an XML file states, as of COCO's JSON."""
    write_files(tmp_path, voc(voc_text()))
    Image.new("RGB", (48, 64)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: expected 64 x 48 pixels, as in .*, got 48 x 64"):
        CocoData(tmp_path)[0]
    assert list(check_data(tmp_path).problems) == ["images whose size differs from the annotations"]


def test_pixels_of_the_devkit_begin_outside(tmp_path):
    """xmin 0 is no pixel of the devkit; clipping one pixel needs no warning."""
    write_files(tmp_path, voc(voc_text(source=DEVKIT).replace("<xmin>16", "<xmin>0")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CocoData(tmp_path)._boxes[1].tolist() == [[0, 11, 48, 36]]


def test_options_that_do_not_fit(tmp_path):
    write_files(tmp_path, yolo(**{"README.md": CARD}))
    with pytest.raises(ValueError, match=r"format: expected coco, yolo, voc, voc-devkit, huggingface, got 'tfrecord'"):
        open_data(tmp_path, format="tfrecord")
    with pytest.raises(ValueError, match=r"expected no image folder, because yolo says where images are, got"):
        open_data(tmp_path, tmp_path / "images")
    with pytest.raises(NotADirectoryError, match=r"photos: expected the folder of the images"):
        open_data(tmp_path, tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match=r"gone: no such file or folder"):
        open_data(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"images: expected the folder of the images, got None"):
        open_data(json.loads(coco_text()))
    for format in ("coco", "voc", "huggingface"):
        with pytest.raises(FileNotFoundError, match=r"expected .* got none"):
            open_data(tmp_path, format=format)
    with pytest.raises(FileNotFoundError, match=r"expected a data.yaml"):
        open_data(tmp_path / "images", format="yolo")
