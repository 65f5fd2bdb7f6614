"""Ids of any size and numbers of any library give the same metrics as small integers and Python's numbers."""

import json

import numpy as np
import pytest
import torch

from conditional_detr.data.coco import read_annotations
from conditional_detr.data.results import read_results
from conditional_detr.evaluation.coco import evaluate_detections

# Two of three images are detected: precision is 1 up to a recall of 2/3, 67 of 101 points.
TWO_OF_THREE = 67 / 101


def ap_of(images, *, category=1, annotation_ids=(1, 2, 3), write=None):
    """Return the AP of three images with one annotation each, of which two are detected."""
    boxes = {"category_id": category, "bbox": [10, 10, 50, 50]}
    annotations = {
        "images": [{"id": i} for i in images],
        "categories": [{"id": category, "name": "a"}],
        "annotations": [{"id": n, "image_id": i, **boxes} for n, i in zip(annotation_ids, images, strict=True)],
    }
    results = [{"image_id": i, "score": 0.9, **boxes} for i in images[:2]]
    if write is not None:
        for name, content in (("annotations", annotations), ("results", results)):
            (write / f"{name}.json").write_text(json.dumps(content))
        annotations, results = write / "annotations.json", write / "results.json"
    result = evaluate_detections(annotations, results)
    assert result.per_class["a"]["category_id"] == category
    return result.metrics["AP"]


IDS = {
    "small": [1, 2, 3],
    "one above 2**63": [5, 2**63 + 1, 2**63 + 2],
    "negative and large": [-1, 2**63, 2**63 + 1],
    "hashes": [0x1F3A5577AA00BB11, 0xF3A5577AA00BB110, 0xF3A5577AA00BB111],
    "beyond 2**64": [2**64 + 1, 2**64 + 2, -(2**70)],
    "beyond float": [10**400, 10**400 + 1, 0],
    "float cannot tell apart": [2**53, 2**53 + 1, 2**53 + 2],
    "strings": ["5", "9223372036854775809", "9223372036854775810"],
    "uint64": list(np.array([3, 2**63 + 1, 2**63 + 2], np.uint64)),
    "numpy's and Python's": [np.int64(4), 5, np.uint8(6)],
}


@pytest.mark.parametrize("images", list(IDS.values()), ids=list(IDS))
def test_ap_does_not_depend_on_image_ids(images):
    assert ap_of(images) == pytest.approx(TWO_OF_THREE, abs=1e-12)


@pytest.mark.parametrize("category", [0, -7, 2**63 + 1, 10**400, "cat-1"])
def test_ap_does_not_depend_on_category_ids(category):
    assert ap_of([1, 2, 3], category=category) == pytest.approx(TWO_OF_THREE, abs=1e-12)


def test_annotation_ids_and_files(tmp_path):
    ids = [2**63 + 2, 2**63 + 1, 5]
    assert ap_of(ids, annotation_ids=ids, write=tmp_path) == pytest.approx(TWO_OF_THREE, abs=1e-12)


TRUTH = {
    "images": [{"id": 1, "height": 100, "width": 100}],
    "categories": [{"id": 1, "name": "a"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 50, 50]}],
}
BOX = np.array([1, 1, 50, 50], np.float32)
NUMBERS = {
    "a list of float32": {"bbox": list(BOX)},
    "an array": {"bbox": BOX},
    "an array of integers": {"bbox": BOX.astype(np.uint16)},
    "a tensor": {"bbox": torch.from_numpy(BOX)},
    "a tuple": {"bbox": (1, 1, 50, 50)},
    "a score in float32": {"score": np.float32(0.9)},
    "a score in float16": {"score": np.float16(0.9)},
    "a score in an array": {"score": np.array(0.9)},
    "a score of an integer": {"score": np.int8(1)},
    "an image id": {"image_id": np.int64(1)},
    "a category id": {"category_id": np.uint8(1)},
}


@pytest.mark.parametrize("change", list(NUMBERS.values()), ids=list(NUMBERS))
def test_numbers_of_other_libraries_in_results(change):
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 50, 50], "score": 0.9, **change}
    assert evaluate_detections(TRUTH, [entry]).metrics["AP"] == pytest.approx(1.0)
    read = read_results([entry], read_annotations(TRUTH))
    assert (read.image_ids, read.category_ids) == ([1], [1])
    assert {type(i) for i in (*read.image_ids, *read.category_ids)} == {int}  # plain values of Python
    assert (read.boxes.tolist(), read.scores.tolist()) == ([[1, 1, 50, 50]], [float(entry["score"])])


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": BOX, "area": np.float32(2500), "iscrowd": np.uint8(0), "id": np.int32(9)},
        {"image_id": np.int16(1), "category_id": np.int64(1), "iscrowd": np.False_},
    ],
)
def test_numbers_of_other_libraries_in_annotations(change):
    truth = {
        "images": [{"id": np.int64(1), "height": np.int32(100), "width": np.uint16(100)}],
        "categories": [{"id": np.int64(1), "name": np.str_("a")}],
        "annotations": [{**TRUTH["annotations"][0], **change}],
    }
    (read,) = read_annotations(truth).annotations
    expected = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 50, 50], "area": 2500, "iscrowd": 0, "index": 0}
    assert read == {**expected, "id": change.get("id", 1)}
    assert json.loads(json.dumps(read)) == read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": True}, "expected the id of an image of annotations, got image_id True"),
        ({"category_id": np.True_}, r"expected a category of annotations \(1 a\), got category_id True"),
        ({"image_id": 1.0}, "expected the id of an image of annotations, got image_id 1.0"),
        ({"image_id": [1]}, r"expected the id of an image of annotations, got image_id \[1\]"),
        ({"score": np.float32("nan")}, "expected finite numbers as score, got nan"),
        ({"score": np.float16("inf")}, "expected finite numbers as score, got inf"),
        ({"score": True}, "expected finite numbers as score, got True"),
        ({"score": np.array([0.9])}, r"expected finite numbers as score, got \[0.9\]"),
        ({"bbox": np.array([1, 1, np.nan, 1])}, "expected finite numbers as bbox, got nan"),
        ({"bbox": np.array([True] * 4)}, "expected finite numbers as bbox, got True"),
        ({"bbox": np.ones((4, 1))}, r"expected finite numbers as bbox, got \[1.0\]"),
        ({"bbox": np.ones(3)}, r"expected a bbox \[x0, y0, w, h\], got \[1.0, 1.0, 1.0\]"),
        ({"bbox": [1, 1, 1e300, 1]}, r"expected numbers of at most 1e\+15 as bbox, got 1e\+300"),
        ({"bbox": [1, 1, 10**400, 1]}, r"expected numbers of at most 1e\+15 as bbox, got 1000"),
    ],
)
def test_what_is_no_number_or_id(change, message):
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 50, 50], "score": 0.9, **change}
    with pytest.raises(ValueError, match=rf"results: \[0\]: {message}"):
        evaluate_detections(TRUTH, [entry])


@pytest.mark.parametrize(
    "truth",
    [
        {**TRUTH, "annotations": []},
        {**TRUTH, "annotations": [{**TRUTH["annotations"][0], "iscrowd": 1}]},
    ],
)
def test_nothing_to_measure_is_said(truth):
    got = "1, all of them crowds" if truth["annotations"] else "none"
    with pytest.warns(UserWarning, match=f"annotations: expected annotations to measure on, got {got}") as caught:
        result = evaluate_detections(truth, [])
    assert [warning.filename for warning in caught] == [__file__]
    assert set(result.metrics.values()) == {-1.0}
