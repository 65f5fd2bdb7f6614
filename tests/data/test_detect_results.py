"""Results of ``conditional-detr detect`` as detections of a dataset."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conditional_detr import Detector
from conditional_detr.cli import app
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.results import read_results
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.evaluation.coco import evaluate, evaluate_detections

SIZE = {"height": 60, "width": 80}
TRUTH = {
    "images": [{"id": i, "file_name": name, **SIZE} for i, name in enumerate(("1.png", "a/1.png", "b/2.png"))],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    "annotations": [{"id": 1, "image_id": 0, "category_id": 7, "bbox": [0, 0, 5, 5]}],
}
CAT = {"box": [1, 2, 4, 8.5], "score": 0.5, "label": 0, "name": "cat"}
ALL = [{"image": f"photos/{image['file_name']}", "size": SIZE, "detections": [CAT]} for image in TRUTH["images"]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Six drawn images and their annotations."""
    folder = tmp_path_factory.mktemp("drawn")
    return write_shapes(folder, 6, seed=3, split="val"), folder / "val"


@pytest.fixture(scope="module")
def expected(drawn):
    return evaluate(Detector.from_pretrained("shapes"), *drawn).to_dict()


@pytest.mark.parametrize("format", ["json", "jsonl"])
def test_numbers_are_those_of_the_detector(drawn, expected, tmp_path, monkeypatch, format):
    """AP of the detections in memory, which pycocotools' arithmetic gives, and of those that detect has written."""
    monkeypatch.chdir(tmp_path)
    data, images = drawn
    options = ("--weights", "shapes", "--device", "cpu", "--output", "found", "--threshold", "0", "--format", format)
    done = CliRunner().invoke(app, ["detect", str(images), *options, "--no-draw"])
    assert done.exit_code == 0, done.output
    sources = [Path("found"), *Path("found").glob("*.jsonl")]
    assert len(sources) == (2 if format == "jsonl" else 1)
    for source in sources:
        measured = evaluate_detections(data, source).to_dict()
        for name, of_class in expected.pop("per_class", {}).items():
            assert measured["per_class"][name] == pytest.approx(of_class, abs=1e-10)
        assert {key: measured[key] for key in expected} == pytest.approx(expected, abs=1e-10)
    analysed = CliRunner().invoke(app, ["analyse", "--data", str(data), "--results", "found"])
    assert analysed.exit_code == 0, analysed.output
    assert json.loads(Path("analysis/analysis.json").read_text())["metrics"]["AP"] == pytest.approx(expected["AP"])


def write_lines(folder, contents):
    path = folder / "detections.jsonl"
    path.write_text("".join(json.dumps(content) + "\n" for content in contents))
    return path


def test_images_and_classes_are_found_by_name(tmp_path, recwarn):
    """The longest end of the path that is a file name of the dataset, also with backslashes."""
    contents = [
        *ALL[:1],
        {**ALL[1], "settings": {"threshold": 0}},
        {**ALL[2], "image": "C:\\photos\\b\\2.png", "detections": [CAT, {**CAT, "name": "dog"}]},
    ]
    read = read_results(write_lines(tmp_path, contents), read_annotations(TRUTH))
    assert read.image_ids == [0, 1, 2, 2]
    assert read.category_ids == [7, 7, 7, 9]
    assert read.boxes.tolist() == [[1, 2, 3, 6.5]] * 4
    assert not recwarn.list


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (ALL[:2], "1 of the 3 images of annotations have no results, which counts as no detections"),
        (
            [*ALL[:2], {**ALL[2], "detections": [{**CAT, "name": "cow"}] * 2}],
            "skipped 2 detections of classes that are not in annotations: cow (2)",
        ),
        (
            [*ALL[:2], {**ALL[2], "settings": {"threshold": 0.25}}],
            "made with the threshold 0.25: what is below is missing, which lowers AP; detect with --threshold 0",
        ),
        ([*ALL[:2], {**ALL[2], "settings": {"threshold": {"cat": 0.5}}}], "made with the threshold {'cat': 0.5}"),
    ],
)
def test_what_lowers_the_numbers_is_warned_of(tmp_path, contents, message):
    path = write_lines(tmp_path, contents)
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        read_results(path, read_annotations(TRUTH))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**ALL[0], "image": "c/3.png"}, "line 2: expected an image of annotations, got 'c/3.png'"),
        (ALL[1], "line 2: expected one result of each image, got a second one of photos/a/1.png"),
        (
            {**ALL[0], "size": {"height": 80, "width": 60}},
            "photos/1.png: expected 80 x 60 pixels, as in annotations, got 60 x 80",
        ),
        ({**ALL[0], "size": {"height": 80}}, "line 2: expected an object with 'width'"),
        ({**ALL[0], "size": 3}, "line 2"),
        ({**ALL[0], "detections": [3]}, "line 2: detections[0]"),
        ({**ALL[0], "detections": [{**CAT, "box": [1, 2, 3]}]}, "detections[0]: expected a box [x0, y0, x1, y1]"),
        ({**ALL[0], "detections": [{**CAT, "box": [4, 2, 3, 8]}]}, "detections[0]: expected a box [x0, y0, x1, y1]"),
        ({**ALL[0], "detections": [{**CAT, "box": [1, 2, 3, None]}]}, "detections[0]"),
        ({**ALL[0], "detections": [{**CAT, "box": [1, 2, 3, float("nan")]}]}, "detections[0]"),
        ({**ALL[0], "detections": [{**CAT, "score": "0.5"}]}, "detections[0]"),
        ({**ALL[0], "detections": [{**CAT, "name": None}]}, "detections[0]: expected a class name"),
        ({"image": "1.png"}, "line 2: expected the detections of one image as JSON"),
        ([], "line 2: expected the detections of one image as JSON"),
    ],
)
def test_lines_of_another_form(tmp_path, content, message):
    path = write_lines(tmp_path, [ALL[1], content])
    with pytest.raises(ValueError, match=re.escape(message)):
        read_results(path, read_annotations(TRUTH))


def test_files_of_another_form(tmp_path):
    data = read_annotations(TRUTH)
    with pytest.raises(ValueError, match=r"expected results of detect, JSON files or detections.jsonl, got neither"):
        read_results(tmp_path, data)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"x\.json: expected the detections of one image as JSON"):
        read_results(tmp_path, data)
    path = write_lines(tmp_path, ALL)
    with pytest.raises(ValueError, match="got both kinds"):
        read_results(tmp_path, data)
    path.write_text(path.read_text() + '{"image": "b')
    with pytest.raises(ValueError, match=r"detections\.jsonl, line 4: expected a whole line; detect --resume"):
        read_results(path, data)
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        read_results(tmp_path / "gone.jsonl", data)
