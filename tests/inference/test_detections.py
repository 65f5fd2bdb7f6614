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


def test_pandas(detections):
    frame = detections.to_pandas()
    assert frame.columns.tolist() == ["x0", "y0", "x1", "y1", "score", "label", "name", "category_id"]
    assert frame.groupby("name")["score"].max().to_dict() == {"cat": 0.75, "dog": pytest.approx(0.9)}
    assert frame.iloc[0][["x0", "y0", "x1", "y1"]].tolist() == [10.0, 20.0, 30.5, 40.0]
    assert frame["category_id"].tolist() == [18, 17, 18]
    assert len(detections[[]].to_pandas()) == 0


def test_pandas_not_installed(detections, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        detections.to_pandas()


def test_boxes_from_elsewhere(photograph):
    """Of torchvision's and numpy's kinds; labels are by the alphabet, and boxes end at the image, 128 x 96."""
    made = Detections.from_boxes(np.array([[-5, 10, 20, 200], [1, 2, 3, 4]]), ["dog", "cat"], image=photograph)
    assert made.boxes.tolist() == [[0, 10, 20, 96], [1, 2, 3, 4]]
    assert (made.labels.tolist(), made.scores.tolist(), made.size) == ([1, 0], [1, 1], (96, 128))
    assert made.draw().size == (128, 96)
    assert [name for _, _, name in made.filter(classes=["cat"])] == ["cat"]
    assert len(Detections.from_boxes([], [], size=(10, 10))) == 0


def test_coco_there_and_back(detections):
    """The results that pycocotools reads become the same detections, and annotations have the score 1."""
    results = detections.to_coco(3)
    back = Detections.from_coco(results, {17: "cat", 18: "dog", 44: "bottle"}, size=(48, 64))
    torch.testing.assert_close(back.boxes, detections.boxes)
    torch.testing.assert_close(back.scores, detections.scores)
    assert (back.names, back.category_ids, back.labels.tolist()) == (("dog", "cat", "dog"), (18, 17, 18), [1, 0, 1])
    annotations = [{"id": 1, "image_id": 3, "category_id": 44, "bbox": [1, 2, 3, 4], "iscrowd": 0}]
    (only,) = Detections.from_coco(annotations, {44: "bottle"}, size=(48, 64))
    assert only == ([1, 2, 4, 6], 1.0, "bottle")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": None}, "expected either image or size, got neither"),
        ({"image": np.zeros((9, 9, 3), np.uint8)}, "expected either image or size, got both"),
        ({"names": ["a"]}, r"expected equal numbers of values, got \{'boxes': 2, 'names': 1,"),
        ({"scores": [0.5]}, r"expected equal numbers of values, got .*'scores': 1"),
        ({"scores": [0.5, 1.5]}, r"scores: expected 0\.\.1, got \[0\.5, 1\.5\]"),
        ({"boxes": [[0, 0, 1, 1], [5, 5, 4, 9]]}, r"boxes\[1\]: expected finite x0 y0 x1 y1, .* got \[5\.0, 5\.0, 4"),
        ({"boxes": [[0, 0, 1, float("nan")], [5, 5, 6, 9]]}, r"boxes\[0\]: expected finite"),
    ],
)
def test_invalid_boxes_from_elsewhere(options, message):
    values = {"boxes": [[0, 0, 1, 1], [1, 1, 2, 2]], "names": ["a", "b"], "size": (10, 10), **options}
    with pytest.raises(ValueError, match=message):
        Detections.from_boxes(**values)


@pytest.mark.parametrize("entry", [{"category_id": 5, "bbox": [1, 2, 3, 4]}, {"category_id": 1}, {"bbox": [1, 2, 3]}])
def test_invalid_coco_entries(entry):
    good = {"category_id": 1, "bbox": [1, 2, 3, 4]}
    with pytest.raises(ValueError, match=r"entries\[1\]: expected a bbox and a category_id of categories, got"):
        Detections.from_coco([good, entry], {1: "a"}, size=(10, 10))


def changed(one: Image.Image, other: Image.Image) -> np.ndarray:
    return (np.asarray(one) != np.asarray(other)).any(-1)


def test_labels_and_lines_can_be_chosen():
    """On black, by counting pixels: a box of 100 x 80 has a line on its outside."""
    made = Detections.from_boxes([[50, 60, 150, 140]], ["cat"], image=Image.new("RGB", (300, 200)), scores=[0.5])
    black = Image.new("RGB", (300, 200))
    plain = made.draw(labels=False, scores=False)
    assert changed(plain, made.draw()).any()
    inside = np.zeros((200, 300), dtype=bool)
    inside[60:140, 50:150] = True
    for width in (1, 4):
        drawn = made.draw(labels=False, scores=False, line_width=width)
        coloured = (np.asarray(drawn) == np.asarray(drawn)[59, 100]).all(-1)
        assert coloured.sum() == (100 + 2 * width) * (80 + 2 * width) - 100 * 80
        assert not changed(black, drawn)[62 + width : 138 - width, 52 + width : 148 - width].any()
    texts = [made.draw(labels=labels, scores=scores) for labels in (True, ["a longer text"]) for scores in (0, 1)]
    assert len({image.tobytes() for image in (plain, *texts)}) == 5
    assert made.draw(labels=["cat"]).tobytes() == made.draw().tobytes()
    with pytest.raises(ValueError, match="expected equal numbers of boxes, labels, names and scores"):
        made.draw(labels=["a", "b"])
    with pytest.raises(ValueError, match="line_width: expected at least 1 pixel, got 0"):
        made.draw(line_width=0)


def test_ground_truth_and_detections_side_by_side(photograph):
    """Each half is what draw() draws, under its title."""
    truth = Detections.from_boxes([[50, 60, 90, 80]], ["cat"], size=(96, 128))
    found = Detections.from_boxes(
        [[40, 50, 90, 80], [1, 1, 9, 9]], ["cat", "dog"], image=photograph, scores=[0.9, 0.4]
    )
    sheet = found.draw_beside(truth)
    top = sheet.height - 96
    assert 8 < top < 40
    left, right = (sheet.crop((x, top, x + 128, sheet.height)) for x in (0, sheet.width - 128))
    assert left.tobytes() == truth.draw(photograph, scores=False).tobytes()
    assert right.tobytes() == found.draw().tobytes()
    assert sheet.crop((0, 0, 128, top)).getextrema()[0][0] < 100  # the title


def test_drawing_a_deleted_image(detections, tmp_path):
    from dataclasses import replace

    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: no such file"):
        replace(detections, source=tmp_path / "gone.jpg").draw()
