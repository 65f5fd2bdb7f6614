"""Annotations and results of any content are accepted, or refused by one of the documented errors."""

import json
import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from conditional_detr.data.coco import read_annotations
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.report import check_data
from conditional_detr.data.results import read_results
from conditional_detr.evaluation.coco import METRICS, evaluate_detections
from helpers import coco
from helpers.fuzzing import LIMITS

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, 5e-324, -0.0])
TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(["", ".", "..", "a.png", "/", "\0", "\ud800", "x" * 300])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


def mostly(usual):
    """Return a strategy of a usual value, or of anything."""
    return st.one_of(usual, usual, usual, usual, usual, ANYTHING)


def entries(**fields):
    """Return a strategy of a list of objects, each of which may lack fields or have any value there."""
    usual = st.fixed_dictionaries({}, optional={name: mostly(values) for name, values in fields.items()})
    return mostly(st.lists(mostly(usual), max_size=4))


IDS = st.integers(0, 3) | st.sampled_from([2**64, "1"])
BOXES = st.lists(st.floats(0, 100), min_size=4, max_size=4)
NAMES = st.sampled_from(["dog", "cat", "[/b]"])
OBJECTS = entries(
    id=IDS,
    image_id=IDS,
    category_id=IDS,
    bbox=BOXES,
    area=st.floats(0, 1e4),
    iscrowd=st.sampled_from([0, 1]),
    attributes=st.fixed_dictionaries({"rotation": mostly(st.floats(-720, 720))}),
)
DATASETS = st.fixed_dictionaries(
    {
        "images": entries(id=IDS, file_name=st.just("a.png"), height=st.just(100), width=st.just(100)),
        "categories": entries(id=IDS, name=NAMES, supercategory=NAMES | st.just("none")),
        "annotations": OBJECTS,
    }
)
RESULTS = entries(image_id=IDS, category_id=IDS, bbox=BOXES, score=st.floats(0, 1))
TRUTH = coco.content()


@pytest.fixture
def images(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # documented; of any other, one is an error
        yield


def documented(call, *arguments):
    """Return a result, or None after a documented error."""
    try:
        return call(*arguments)
    except (OSError, ValueError):
        return None


@LIMITS
@given(mostly(DATASETS))
@example({"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}], "annotations": [[]]})
def test_annotations(content):
    data = documented(read_annotations, content)
    if data is not None:
        assert json.loads(json.dumps(data.annotations)) == data.annotations
        assert {annotation["image_id"] for annotation in data.annotations} <= set(data.images)
        assert {annotation["category_id"] for annotation in data.annotations} <= set(data.categories)


@LIMITS
@given(DATASETS)
def test_datasets(images, content):
    data = documented(CocoData, content, images)
    if data is not None:
        for i in range(len(data)):
            sample = documented(data.__getitem__, i)
            assert sample is None or ((sample[1]["boxes"] >= 0) & (sample[1]["boxes"] <= 1)).all()
    report = documented(check_data, content, images)
    if report is not None:
        assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
        if data is not None:
            assert not report.problems.get("invalid annotations")


@LIMITS
@given(RESULTS)
def test_results(content):
    results = documented(read_results, content, read_annotations(TRUTH))
    if results is not None:
        assert [len(column) for column in results] == [len(content)] * 4


@LIMITS
@given(DATASETS, RESULTS)
def test_evaluation(content, results):
    result = documented(evaluate_detections, content, results)
    if result is not None:
        assert set(result.metrics) == set(METRICS)
        assert all(value == -1 or 0 <= value <= 1 for value in result.metrics.values())


@LIMITS
@given(st.binary(max_size=60) | mostly(DATASETS).map(lambda content: json.dumps(content).encode()))
@example(b"[" * 100_000)
@example(b'{"images": ' + b"1" * 5000 + b"}")
@example(b"\xff\xfe{")
def test_files(images, content):
    path = images / "data.json"
    path.write_bytes(content)
    documented(read_annotations, path)
    documented(check_data, path, images)
