"""Detections of one image: indexing, sorting, and the formats of other libraries."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conditional_detr import Detections


@pytest.fixture
def detections() -> Detections:
    return Detections(
        boxes=torch.tensor([[10.0, 20.0, 30.5, 40.0], [0.0, 0.0, 64.0, 48.0], [5.0, 1.0, 6.0, 3.0]]),
        scores=torch.tensor([0.9, 0.75, 0.5]),
        labels=torch.tensor([2, 0, 2]),
        names=("dog", "cat", "dog"),
        category_ids=(18, 17, 18),
        queries=torch.tensor([7, 3, 9]),
        size=(48, 64),
        source=Image.new("RGB", (64, 48)),
    )


def test_single_index(detections):
    assert detections[0] == ([10.0, 20.0, 30.5, 40.0], pytest.approx(0.9), "dog")
    assert detections[-1] == detections[2] == list(detections)[2]
    assert detections[np.int64(1)][2] == "cat"
    assert detections[detections.scores.argmax()] == detections[np.array(0)] == detections[0]
    with pytest.raises(TypeError, match=r"got 'cat'; for class names use filter\(\)"):
        detections["cat"]
    with pytest.raises(IndexError):
        detections[3]


@pytest.mark.parametrize(
    ("index", "queries"),
    [
        (slice(1, None), [3, 9]),
        (slice(None, None, -1), [9, 3, 7]),
        ([2, 0], [9, 7]),
        ([], []),
        (torch.tensor([True, False, True]), [7, 9]),
        (np.array([False, True, False]), [3]),
        (torch.tensor([1, 1]), [3, 3]),
    ],
)
def test_several_indices(detections, index, queries):
    some = detections[index]
    assert isinstance(some, Detections)
    assert some.queries.tolist() == queries
    rows = [detections.queries.tolist().index(query) for query in queries]
    assert some.boxes.tolist() == [detections.boxes[row].tolist() for row in rows]
    assert some.scores.tolist() == [detections.scores[row].item() for row in rows]
    assert some.labels.tolist() == [detections.labels[row].item() for row in rows]
    assert some.names == tuple(detections.names[row] for row in rows)
    assert some.category_ids == tuple(detections.category_ids[row] for row in rows)
    assert (some.size, some.source) == (detections.size, detections.source)


@pytest.mark.parametrize("index", [torch.tensor([True]), torch.tensor([0.5]), torch.zeros(2, 2), [[0]]])
def test_invalid_indices(detections, index):
    with pytest.raises(IndexError, match="expected a mask of 3 bools or a list of integers, got"):
        detections[index]


def test_filter(detections):
    assert detections.filter(threshold=0.5).queries.tolist() == [7, 3]
    assert detections.filter(classes=["dog"]).queries.tolist() == [7, 9]
    assert detections.filter(classes=[0, "ant"]).queries.tolist() == [3]
    assert detections.filter(threshold=0.6, classes=["dog"]).queries.tolist() == [7]
    assert len(detections.filter(classes=[])) == 0
    with pytest.raises(TypeError, match="classes: expected a list of names or rows, got the string 'dog'"):
        detections.filter(classes="dog")


@pytest.mark.parametrize(
    ("by", "queries"),
    [("score", [7, 3, 9]), ("area", [3, 7, 9]), ("name", [3, 7, 9]), ("x", [3, 9, 7]), ("y", [3, 9, 7])],
)
def test_sort(detections, by, queries):
    assert detections.sort(by).queries.tolist() == queries
    assert detections[::-1].sort("score").queries.tolist() == [7, 3, 9]


def test_sort_by_an_unsupported_key(detections):
    with pytest.raises(ValueError, match="by: expected any of score, area, name, x, y, got 'size'"):
        detections.sort("size")


def test_repr(detections):
    assert repr(detections) == "Detections(3 on 48x64: dog 0.90, cat 0.75, dog 0.50)"
    assert repr(detections[[0] * 7]).endswith("dog 0.90, and 2 more)")
    assert repr(detections[[]]) == "Detections(0 on 48x64: )"


def test_pycocotools_reads_the_coco_results(detections):
    from pycocotools.coco import COCO

    results = detections.to_coco(image_id=42)
    assert results[0] == {
        "image_id": 42,
        "category_id": 18,
        "bbox": [10.0, 20.0, 20.5, 20.0],
        "score": pytest.approx(0.9),
    }
    truth = COCO()
    truth.dataset = {"images": [{"id": 42}], "categories": [{"id": 17}, {"id": 18}], "annotations": []}
    truth.createIndex()
    read = truth.loadRes(json.loads(json.dumps(results)))
    assert [a["area"] for a in read.loadAnns(read.getAnnIds())] == [410.0, 64.0 * 48, 2.0]


def test_torchvision_operations_take_the_dict(detections):
    from torchvision.ops import batched_nms

    result = detections.to_torchvision()
    assert result.keys() == {"boxes", "scores", "labels"}
    assert batched_nms(result["boxes"], result["scores"], result["labels"], 0.5).tolist() == [0, 1, 2]


def test_transformers_dicts(detections):
    assert detections.to_transformers()[1] == {
        "score": 0.75,
        "label": "cat",
        "box": {"xmin": 0.0, "ymin": 0.0, "xmax": 64.0, "ymax": 48.0},
    }


def test_dict_is_json(detections):
    content = json.loads(json.dumps(detections.to_dict()))
    assert content["size"] == {"height": 48, "width": 64}
    assert content["detections"][2] == {"box": [5.0, 1.0, 6.0, 3.0], "score": 0.5, "label": 2, "name": "dog"}


@pytest.mark.filterwarnings("ignore:OpenCV")  # which it can do without here
def test_supervision(detections):
    import supervision

    converted = detections.to_supervision()
    assert isinstance(converted, supervision.Detections)
    assert converted.area.tolist() == [410.0, 64.0 * 48, 2.0]
    assert converted.class_id.tolist() == [2, 0, 2]
    assert converted["class_name"].tolist() == ["dog", "cat", "dog"]
    assert converted[converted.confidence > 0.8].xyxy.tolist() == [[10.0, 20.0, 30.5, 40.0]]
    assert len(detections[[]].to_supervision()) == 0


def test_supervision_not_installed(detections, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        detections.to_supervision()


def test_drawing_a_deleted_image(detections, tmp_path):
    from dataclasses import replace

    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such file"):
        replace(detections, source=tmp_path / "gone.jpg").draw()
