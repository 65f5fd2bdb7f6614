"""What annotation programs and operating systems write: grouping categories, rotated boxes, byte-order marks."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Config, Metadata, Preprocessing
from conditional_detr.cli import app
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.report import check_data
from conditional_detr.data.results import read_results
from conditional_detr.evaluation.coco import evaluate, evaluate_detections
from conditional_detr.inference.listing import list_images
from helpers import coco

GROUPING = "have no annotations and only group others"
ROTATED = "are rotated by their attributes, and bbox is their box before the rotation"

# ---- Roboflow's grouping category


def roboflow(project, *classes, own="none"):
    """Return annotations as Roboflow exports them: category 0 is the project, which all classes name."""
    members = [{"id": i, "name": name, "supercategory": project} for i, name in enumerate(classes, 1)]
    return {
        "images": [{"id": 0, "file_name": "a.png", "height": 96, "width": 128}],
        "categories": [{"id": 0, "name": project, "supercategory": own}, *members],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": 1, "bbox": [10, 10, 30, 30], "segmentation": [], "iscrowd": 0}
        ],
    }


@pytest.fixture
def images(tmp_path):
    Image.new("RGB", (128, 96)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("own", ["none", "None", "", "blood", None])
def test_a_grouping_category_is_no_class(images, own):
    with pytest.warns(UserWarning, match=GROUPING) as caught:
        data = CocoData(roboflow("blood", "RBC", "WBC", own=own), images)
    assert [str(warning.message) for warning in caught] == [
        f"annotations: left out 1 categories that {GROUPING}: 'blood'"
    ]
    assert caught[0].filename == __file__
    assert (data.class_names, data.category_ids) == (("RBC", "WBC"), (1, 2))
    assert data[0][1]["labels"].tolist() == [0]


def test_a_project_that_is_called_like_its_class(images):
    with pytest.warns(UserWarning, match=GROUPING):
        data = CocoData(roboflow("RBC", "RBC"), images)
    assert (data.class_names, data.category_ids) == (("RBC",), (1,))


def test_a_model_of_the_real_classes_is_evaluated(images):
    config = Config(num_classes=2, backbone="test_resnet", width=32, heads=4, encoder_layers=1, decoder_layers=1)
    size = Preprocessing(shortest_edge=64, longest_edge=96)
    model = ConditionalDETR(config, Metadata(("RBC", "WBC"), preprocessing=size))
    with pytest.warns(UserWarning, match=GROUPING) as caught:
        result = evaluate(model, roboflow("blood", "RBC", "WBC"), images)
    assert [warning.filename for warning in caught] == [__file__]
    assert list(result.per_class) == ["RBC", "WBC"]


def test_results_of_a_grouping_category_are_counted():
    truth = roboflow("blood", "RBC", "WBC")
    found = [{"image_id": 0, "category_id": c, "bbox": [10, 10, 30, 30], "score": 0.9} for c in (0, 1, 0)]
    with pytest.warns(UserWarning, match="results: skipped 2 detections of categories that only group others: blood"):
        assert read_results(found, read_annotations(truth)).category_ids == [1]
    with pytest.warns(UserWarning, match=GROUPING), pytest.warns(UserWarning, match="skipped 2 detections"):
        assert evaluate_detections(truth, found).metrics["AP"] == pytest.approx(1.0)


def annotated(data):
    data["annotations"][0]["category_id"] = 0


def in_a_group(data):
    data["categories"][0]["supercategory"] = "tissue"


def unnamed(data):
    for category in data["categories"][1:]:
        category["supercategory"] = "cells"


@pytest.mark.parametrize("change", [annotated, in_a_group, unnamed])
def test_any_other_category_stays(change):
    data = roboflow("blood", "RBC", "WBC")
    change(data)
    assert read_annotations(data).categories == {0: "blood", 1: "RBC", 2: "WBC"}


def test_coco_itself_stays():
    """The class person is its own supercategory, and no other's."""
    data = roboflow("person", "bicycle", own="person")
    data["categories"][1]["supercategory"] = "vehicle"
    assert read_annotations(data).categories == {0: "person", 1: "bicycle"}


def test_the_report_notes_a_grouping_category(images):
    report = check_data(roboflow("blood", "RBC", "WBC"), images)
    assert report.notes[f"categories that {GROUPING}: left out"] == ["blood"]
    assert report.classes == {"RBC": 1, "WBC": 0}


# ---- rotated boxes


def rotated(degrees, **change):
    """Return a bar of 20 x 200 about (200, 200), turned."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [190, 100, 20, 200], "area": 4000, "iscrowd": 0}
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 400, "height": 400}],
        "categories": [{"id": 1, "name": "bar"}],
        "annotations": [{**annotation, "attributes": {"occluded": False, "rotation": degrees}, **change}],
    }


@pytest.fixture
def square(tmp_path):
    Image.new("RGB", (400, 400)).save(tmp_path / "a.png")
    return tmp_path


SIDE = 220 / math.sqrt(2)  # of the box around 20 x 200 at 45 degrees: (20 + 200) cos 45
HULLS = {  # x0 y0 x1 y1
    0: [190, 100, 210, 300],
    90: [100, 190, 300, 210],
    180: [190, 100, 210, 300],
    270: [100, 190, 300, 210],
    -90: [100, 190, 300, 210],
    450: [100, 190, 300, 210],
    45: [200 - SIDE / 2, 200 - SIDE / 2, 200 + SIDE / 2, 200 + SIDE / 2],
    135: [200 - SIDE / 2, 200 - SIDE / 2, 200 + SIDE / 2, 200 + SIDE / 2],
    # (20 cos 30 + 200 sin 30, 20 sin 30 + 200 cos 30) = (117.3205, 183.2051)
    30: [200 - 58.66025, 200 - 91.60254, 200 + 58.66025, 200 + 91.60254],
}


@pytest.mark.parametrize("degrees", list(HULLS))
def test_the_hull_of_a_rotated_box(square, degrees):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the hull is what is asked for
        data = CocoData(rotated(degrees), square, rotated="hull", preprocessing=Preprocessing(400, 400))
    cx, cy, w, h = (400 * data[0][1]["boxes"][0]).tolist()
    assert [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2] == pytest.approx(HULLS[degrees], abs=1e-3)
    assert data.annotations.annotations[0]["area"] == 4000


@pytest.mark.parametrize(
    "data",
    [
        rotated(90.0),
        rotated(0, rotation=12.5),  # as others write it, beside the box
        rotated("45"),
        rotated(np.float32(359)),
        rotated(-720.5),
    ],
)
def test_a_rotated_box_is_reported(square, data):
    message = rf"1 of 1 annotations {ROTATED}: annotations\[0\] of a.png$"
    with pytest.warns(UserWarning, match=message) as caught:
        made = CocoData(data, square, preprocessing=Preprocessing(400, 400))
    assert [warning.filename for warning in caught] == [__file__]
    assert made[0][1]["boxes"][0].tolist() == pytest.approx([0.5, 0.5, 0.05, 0.5])
    assert check_data(data, square).notes == {f"annotations that {ROTATED}": ["annotations[0] of a.png"]}
    with pytest.warns(UserWarning, match=message) as caught:
        evaluate_detections(data, [])
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("degrees", [0, 0.0, 360, -720, None, "left", True, [], float("nan"), float("inf"), 1e-12])
def test_no_rotation(square, degrees):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CocoData(rotated(degrees), square)
    assert check_data(rotated(degrees), square).notes == {}


def test_attributes_that_are_no_object(square):
    assert len(CocoData(rotated(0, attributes=[90]), square)) == 1


def test_hulls_are_measured():
    """A detection of the hull has an IoU of 1 with it, and one below 0.1 with the box before the rotation."""
    found = [{"image_id": 1, "category_id": 1, "bbox": [100, 190, 200, 20], "score": 0.9}]
    for data in (rotated(90), read_annotations(rotated(90))):
        assert evaluate_detections(data, found, rotated="hull").metrics["AP"] == pytest.approx(1.0)
    with pytest.warns(UserWarning, match=ROTATED):
        assert evaluate_detections(rotated(90), found).metrics["AP"] == 0


@pytest.mark.filterwarnings("default")
def test_hulls_in_commands(square, small, tmp_path):
    """Another choice is other annotations, so a run does not resume with it."""
    data, output, found = tmp_path / "data.json", tmp_path / "run", tmp_path / "found.json"
    data.write_text(json.dumps(rotated(90)))
    found.write_text(json.dumps([{"image_id": 1, "category_id": 1, "bbox": [100, 190, 200, 20], "score": 0.9}]))

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    for choice, ap in (("hull", 1.0), ("box", 0.0)):
        file = tmp_path / f"{choice}.json"
        assert run("evaluate", "--data", data, "--results", found, "--rotated", choice, "--json", file).exit_code == 0
        assert json.loads(file.read_text())["AP"] == pytest.approx(ap)
    options = ("--data", data, "--images", square, "--output", output, "--shortest-edge", 64, "--workers", 0)
    trained = run("train", *options, "--weights", small, "--epochs", 1, "--rotated", "hull")
    assert trained.exit_code == 0, trained.output
    resumed = run("train", *options, "--epochs", 2, "--resume")
    assert resumed.exit_code == 2
    assert "annotations" in resumed.stderr


def test_unknown_choice(square):
    with pytest.raises(ValueError, match="rotated: expected 'box' or 'hull', got 'corners'"):
        evaluate_detections(rotated(90), [], rotated="corners")
    with pytest.raises(ValueError, match="rotated: expected 'box' or 'hull', got 'corners'"):
        CocoData(rotated(90), square, rotated="corners")


# ---- bytes of other programs


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_byte_order_marks(tmp_path, encoding):
    data = coco.content()
    data["categories"][0]["name"] = "Hündin"
    path, images = coco.write(tmp_path)
    path.write_bytes(json.dumps(data, ensure_ascii=False).encode(encoding))
    assert CocoData(path, images).class_names == ("cat", "Hündin")


def test_metadata_files_of_macos(tmp_path):
    path, images = coco.write(tmp_path)
    for name in ("._10.png", "sub/._11.png"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    listing = list_images([str(images)], output=tmp_path / "out")
    assert [str(listed.output) for listed in listing.images] == ["10", "11", "12"]
    assert listing.skipped == 2
    assert "image files without an entry in the annotations" not in check_data(path, images).notes


REASON = "stated is the size before the rotation in the file's EXIF data, so the boxes may lack the rotation, too"


def test_a_size_before_the_exif_rotation(tmp_path):
    path, images = coco.write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(images / "10.png").save(images / "10.png", exif=exif)
    message = rf"10.png: expected 64 x 48 pixels, as in .*data.json, got 48 x 64; {REASON}$"
    with pytest.raises(ValueError, match=message):
        CocoData(path, images)[0]
    assert check_data(path, images).problems["images whose size differs from the annotations"] == [
        f"10.png: expected 64 x 48, got 48 x 64; {REASON}"
    ]


def test_another_size_has_no_reason(tmp_path):
    path, images = coco.write(tmp_path)
    Image.new("RGB", (48, 64)).save(images / "10.png")
    with pytest.raises(ValueError, match=r"10.png: expected 64 x 48 pixels, as in .*data.json, got 48 x 64$"):
        CocoData(path, images)[0]


# ---- file names


ODD_NAMES = {
    "too long": ("x" * 300 + ".png", "no such file", "images that are missing"),
    "a null character": ("a\0b.png", "no such file", "images that are missing"),
    "a lone surrogate": ("\ud800.png", "no such file", "images that are missing"),
    "a line break": ("a\nb.png", "no such file", "images that are missing"),
    "outside and missing": ("../gone.png", "no such file", "images that are missing"),
    "a folder": (".", "no such file", "images that are missing"),
    "a number": (7, "expected a file_name, got 7", "images without a file_name"),
    "a list": (["10.png"], r"expected a file_name, got \['10.png'\]", "images without a file_name"),
    "empty": ("", "expected a file_name, got ''", "images without a file_name"),
}


@pytest.mark.parametrize(("name", "message", "kind"), list(ODD_NAMES.values()), ids=list(ODD_NAMES))
def test_one_odd_file_name(tmp_path, name, message, kind):
    """It is one line of the report, which has all others, too."""
    data = coco.content()
    data["images"][0]["file_name"] = name
    path, images = coco.write(tmp_path, data)
    (images / "11.png").write_bytes(b"")
    with pytest.raises((OSError, ValueError), match=message):
        CocoData(path, images)
    report = check_data(path, images)
    assert {kind: len(cases) for kind, cases in report.problems.items()} == {kind: 1, "images that cannot be read": 1}
    result = CliRunner().invoke(
        app, ["check-data", "--data", str(path), "--images", str(images), "--sheet", str(tmp_path / "sheet.png")]
    )
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert f"problem: 1 {kind}" in lines
    assert "problems: 2" in lines


@pytest.mark.parametrize("absolute", [False, True])
def test_images_outside_the_folder_are_noted(tmp_path, absolute):
    data = coco.content()
    outside = tmp_path / "outside.png"
    data["images"][0]["file_name"] = str(outside) if absolute else "../outside.png"
    path, images = coco.write(tmp_path, data)
    (images / "10.png").rename(outside)
    shown = str(outside) if absolute else f"{images}/../outside.png"
    with pytest.warns(UserWarning, match=f"1 of 3 images are outside {images}: {shown}") as caught:
        assert len(CocoData(path, images)) == 3
    assert [warning.filename for warning in caught] == [__file__]
    report = check_data(path, images)
    assert (report.problems, report.notes["images outside the image folder"]) == ({}, [shown])


def test_links_and_inner_dots_are_inside(tmp_path):
    data = coco.content()
    (tmp_path / "images" / "inner").mkdir(parents=True)
    data["images"][0]["file_name"] = "inner/../10.png"
    data["images"][1]["file_name"] = "link/11.png"
    path, images = coco.write(tmp_path, data)
    (tmp_path / "elsewhere").mkdir()
    (images / "11.png").rename(tmp_path / "elsewhere" / "11.png")
    (images / "link").symlink_to(tmp_path / "elsewhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CocoData(path, images)
    assert check_data(path, images).notes == {}
    (images / "12.png").rename(tmp_path / "12.png")  # a link, then "..": the parent of the link's target
    data["images"][2]["file_name"] = "link/../12.png"
    with pytest.warns(UserWarning, match=f"1 of 3 images are outside {images}: {images}/link/../12.png"):
        CocoData(data, images)


def test_many_categories_make_short_messages(tmp_path):
    data = coco.content()
    data["categories"] = [{"id": i, "name": f"class {i}"} for i in range(5000)]
    data["annotations"] = [{**data["annotations"][0], "category_id": -1}] * 2000
    path, images = coco.write(tmp_path, data)
    cases = check_data(path, images).problems["invalid annotations"]
    assert len(cases) == 2000
    assert cases[0].endswith("18 class 18, 19 class 19 and 4980 more), got category_id -1")
    assert max(map(len, cases)) < 600


def test_targets_are_tensors_of_plain_values(images):
    """Ids of numpy and beyond 64 bits leave the labels as they are."""
    data = roboflow("blood", "RBC", "WBC")
    data["categories"] = [{"id": 2**70, "name": "WBC"}, {"id": np.int64(5), "name": "RBC"}]
    data["annotations"][0]["category_id"] = 2**70
    made = CocoData(data, images)
    assert (made.class_names, made.category_ids) == (("RBC", "WBC"), (5, 2**70))
    assert torch.equal(made[0][1]["labels"], torch.tensor([1]))
