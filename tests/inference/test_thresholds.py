"""A threshold for each class: read, checked, and used by the detector."""

import json

import pytest
import torch

from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing
from conditional_detr.inference.postprocessing import make_postprocessing, postprocess
from conditional_detr.inference.thresholds import check_thresholds, read_thresholds

NAMES = (None, "cat", "dog")
UNKNOWN = r"thresholds: expected class names of the model, got 'cow'; the names are cat, dog"


def test_postprocessing_by_hand():
    """Scores of cats 0.5 and 0.73, of dogs 0.88 and 0.05."""
    logits = torch.tensor([[9.0, 0.0, 2.0], [9.0, 1.0, -3.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4]])

    def kept(cat, dog, **options):
        options = {"threshold": {"cat": cat, "dog": dog}, "top_k": 10, "classes": None, **options}
        _, scores, labels, _ = postprocess(logits, boxes, (100, 200), make_postprocessing(NAMES, **options))
        return [(NAMES[label], round(score, 2)) for label, score in zip(labels.tolist(), scores.tolist(), strict=True)]

    assert kept(0.6, 0.0) == [("dog", 0.88), ("cat", 0.73), ("dog", 0.05)]
    assert kept(0.4, 0.9) == [("cat", 0.73), ("cat", 0.5)]
    assert kept(0.5, 0.9) == [("cat", 0.73)]  # a higher score, not an equal one
    assert kept(0.0, 0.0, classes=["dog"], threshold={"dog": 0.1}) == [("dog", 0.88)]
    with pytest.raises(ValueError, match=r"thresholds: expected one for each class .*, got none for dog"):
        kept(0.5, 0.5, threshold={"cat": 0.5})


def test_the_nearest_number_below_a_score_keeps_it():
    """Thresholds are compared in float64: in float32 this one would equal the score."""
    logits, boxes = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    score = logits.sigmoid()[0, 1].item()
    for threshold, count in ((score - 1e-12, 1), (score, 0)):
        options = make_postprocessing((None, "cat"), threshold={"cat": threshold}, top_k=5, classes=None)
        assert len(postprocess(logits, boxes, (10, 10), options)[0]) == count


@pytest.fixture(scope="module")
def model(tiny):
    model = ConditionalDETR.from_pretrained(tiny.folder)
    names = ("ant", "cat", "dog", "bird", "fish", "horse", None)
    model.metadata = Metadata(names, preprocessing=Preprocessing(shortest_edge=96, longest_edge=160))
    return model


def test_detector(model, photograph):
    """The same detections as of all, filtered; a threshold of the call counts instead."""
    detections = Detector(model)(photograph, threshold=0)
    middle = detections.scores.median().item()
    thresholds = {**dict.fromkeys(("ant", "bird", "fish", "horse"), 1.0), "cat": middle, "dog": 0}
    detector = Detector(model, thresholds=thresholds)
    expected = [row for row in detections if row[1] > thresholds[row[2]]]
    assert 0 < len(expected) < len(detections)
    assert list(detector(photograph)) == expected
    assert list(detector(photograph, threshold=0)) == list(detections)
    assert detector.settings(detector.postprocessing())["threshold"] == thresholds
    assert detector.settings(detector.postprocessing(classes=["dog"]))["threshold"] == {"dog": 0}
    assert detector.settings(detector.postprocessing(threshold=0.3))["threshold"] == 0.3
    assert json.dumps(detector.settings(detector.postprocessing()))


def test_the_default_is_a_half(model):
    assert Detector(model).postprocessing().threshold == 0.5


WRONG = [
    ([0.5], TypeError, "thresholds: expected an object of class names and thresholds, got list"),
    ({"cat": "0.5"}, ValueError, "thresholds: cat: expected a threshold of 0..1, got '0.5'"),
    ({"cat": True}, ValueError, "thresholds: cat: expected a threshold of 0..1, got True"),
    ({"cat": 1.5}, ValueError, "thresholds: cat: expected a threshold of 0..1, got 1.5"),
    ({"cat": float("nan")}, ValueError, "thresholds: cat: expected a threshold of 0..1, got nan"),
    ({"cow": 0.5}, ValueError, UNKNOWN),
    ({None: 0.5}, ValueError, "thresholds: expected class names of the model, got None"),
]


@pytest.mark.parametrize(("thresholds", "error", "message"), WRONG)
def test_wrong_thresholds(model, thresholds, error, message):
    with pytest.raises(error, match=message.replace("; the names are cat, dog", "")):
        Detector(model, thresholds=thresholds)
    with pytest.raises(error, match=message):
        check_thresholds(thresholds, class_names=NAMES)


def test_files(tmp_path):
    path = tmp_path / "thresholds.json"
    path.write_text('{"cat": 0.25, "dog": 1}')
    assert read_thresholds(path) == {"cat": 0.25, "dog": 1.0}
    for content, message in (
        ("[0.5]", "expected an object of class names and thresholds, got list"),
        ("{", "expected JSON, got something else"),
        ('{"cat": null}', "cat: expected a threshold of 0..1, got None"),
    ):
        path.write_text(content)
        with pytest.raises((TypeError, ValueError), match=message) as raised:
            read_thresholds(path)
        assert str(path) in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"none\.json: cannot be read: No such file"):
        read_thresholds(tmp_path / "none.json")
