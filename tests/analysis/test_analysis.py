"""The analysis as a whole: its sums agree with the evaluator, its lists have what is wrong, and where."""

import json

import numpy as np
import pytest

from conditional_detr import Detector
from conditional_detr.analysis.analysis import analyse, analyse_detections
from conditional_detr.analysis.tide import KINDS
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from conditional_detr.evaluation.coco import evaluate, evaluate_detections
from helpers.analysis import CAT, DOG, known_case


@pytest.fixture(scope="module")
def detector():
    return Detector.from_pretrained("shapes")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, detector):
    """Return annotations, images, and what the shipped weights detect on them."""
    folder = tmp_path_factory.mktemp("shapes")
    content = json.loads(write_shapes(folder, 4, seed=3, split="val").read_text())
    files = [folder / "val" / image["file_name"] for image in content["images"]]
    found = zip(content["images"], detector(files, threshold=0), strict=True)
    return content, folder / "val", [row for image, one in found for row in one.to_coco(image["id"])]


def test_lists_of_the_known_case():
    """Thresholds: of cats under 0.85 or 0.8 and over the duplicate; no dog is found, so 0.5."""
    content, results = known_case()
    analysis = analyse_detections(content, results)
    assert analysis.names == ["cat", "dog"]
    assert analysis.thresholds == {"cat": pytest.approx(0.775), "dog": 0.5}
    assert analysis.best["cat"].f1 == pytest.approx(4 / 7)
    numbers = analysis.to_dict()
    assert json.loads(json.dumps(numbers)) == numbers
    assert [one["score"] for one in numbers["false_positives"]] == [0.9, 0.85]
    assert [one["kind"] for one in numbers["false_positives"]] == ["classification", "localisation"]
    assert [(one["image"], one["annotation_id"]) for one in numbers["missed"]] == [
        *(("2.png", 102), ("3.png", 103), ("7.png", 107))
    ]
    assert [(one["image_id"], one["false_positives"], one["missed"]) for one in numbers["worst_images"]] == [
        *((2, 1, 1), (3, 1, 1), (7, 0, 1))
    ]
    assert numbers["confusion"]["counts"] == [[2, 1, 1], [0, 0, 1], [1, 0, 0]]
    above = {kind: numbers["errors"][kind]["above_threshold"] for kind in KINDS}
    assert above == {**dict.fromkeys(KINDS, 0), "classification": 1, "localisation": 1, "missed": 3}


def test_suspicious_labels_by_hand():
    """A label of another class than the detection, a box that is off, a missing label, and one that is there twice."""
    content, results = known_case()
    content["annotations"].append({"id": 200, "image_id": 6, "category_id": DOG, "bbox": [5, 5, 20, 20]})
    content["annotations"].append({"id": 201, "image_id": 6, "category_id": CAT, "bbox": [5, 5, 20, 19]})
    results.append({"image_id": 5, "category_id": CAT, "bbox": [40, 40, 10, 10], "score": 0.99})
    found = analyse_detections(content, results).suspicious
    shown = [(one["reason"], one["image"], one["annotation_id"], one["label"], one["detected"]) for one in found]
    assert shown == [
        ("unlabelled", "5.png", None, None, "cat"),
        ("class", "2.png", 102, "cat", "dog"),
        ("box", "3.png", 103, "cat", "cat"),
        ("unlabelled", "5.png", None, None, "cat"),  # below the threshold of cats
        ("repeated", "6.png", 200, "dog", "cat"),
    ]
    assert [one["score"] for one in found] == [0.99, 0.9, 0.85, 0.7, None]
    assert found[0]["detected_box"] == [40, 40, 10, 10]
    assert found[2]["box"] == [0, 0, 10, 10]
    assert found[2]["annotation"] == 2


def test_numbers_of_the_evaluator(shapes, detector):
    content, images, results = shapes
    steps = []
    analysis = analyse(Detector(detector.model, thresholds=dict.fromkeys(CLASS_NAMES, 0.9)), content, images)
    expected = evaluate_detections(content, results)
    assert analysis.metrics.metrics == pytest.approx(expected.metrics)  # of all detections, whatever the thresholds
    numbers = analysis.to_dict()
    for name, of_class in expected.per_class.items():
        shown = {key: numbers["per_class"][name][key] for key in of_class}
        assert shown == pytest.approx(of_class)
        if of_class["annotations"]:
            assert np.mean(numbers["precision_at_recall"][name]) == pytest.approx(of_class["AP50"])
    for size in ("APs", "APm", "APl"):
        of_classes = [one[size] for one in numbers["per_class"].values() if one[size] >= 0]
        assert expected.metrics[size] == pytest.approx(np.mean(of_classes) if of_classes else -1)
    thresholds = analysis.thresholds
    above = Detector(detector.model, thresholds=thresholds)
    only = evaluate(above, content, images, apply_thresholds=True, progress=lambda *done: steps.append(done))
    assert steps[-1] == (4, 4)
    kept = [row for row in results if row["score"] > thresholds[CLASS_NAMES[row["category_id"] - 1]]]
    assert len(kept) == analysis.kept.sum() < len(results)
    assert only.metrics == pytest.approx(evaluate_detections(content, kept).metrics)


def test_thresholds_find_what_they_promise(shapes, detector):
    """A detector with them finds as many objects, correct and false ones, as the analysis says."""
    content, images, results = shapes
    analysis = analyse_detections(content, results)
    with_thresholds = Detector(detector.model, thresholds=analysis.thresholds)
    found = with_thresholds([images / image["file_name"] for image in content["images"]])
    counts = {name: sum(one.names.count(name) for one in found) for name in CLASS_NAMES}
    assert counts == {name: best.kept for name, best in analysis.best.items()}
    assert sum(counts.values()) > 5


def test_a_removed_and_a_swapped_label_are_suspected(shapes):
    content, _, results = shapes
    clean = analyse_detections(content, results)
    sure = np.flatnonzero(clean.kept & clean.matches.correct & (clean.matches.scores > 0.5))
    removed, swapped = (int(clean.matches.indices[clean.matches.annotation_of[k]]) for k in sure[[0, -1]])
    damaged = json.loads(json.dumps(content))
    entry = damaged["annotations"][swapped]
    entry["category_id"] = entry["category_id"] % len(content["categories"]) + 1
    box = damaged["annotations"].pop(removed)["bbox"]
    found = analyse_detections(damaged, results).suspicious
    unlabelled = [one for one in found if one["reason"] == "unlabelled"]
    assert any(np.abs(np.subtract(one["detected_box"], box)).max() < 8 for one in unlabelled)
    assert entry["id"] in [one["annotation_id"] for one in found if one["reason"] == "class"]


def test_coco_results(shared):
    """Matched counts by class are the evaluator's recall at an IoU of 0.5; curves average to its AP50."""
    folder = shared / "data" / "coco_eval"
    paths = folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json"
    analysis = analyse_detections(*paths)
    assert analysis.metrics == evaluate_detections(*paths)
    curves = [curve for curve in analysis.to_dict()["precision_at_recall"].values() if curve[0] >= 0]
    assert np.mean(curves) == pytest.approx(analysis.metrics.metrics["AP50"])
    assert analysis.confusion[:-1].sum() == len(analysis.matches.annotations)


def test_without_detections_and_without_annotations():
    content, results = known_case()
    nothing = analyse_detections(content, [])
    assert nothing.thresholds == {"cat": 0.5, "dog": 0.5}
    assert len(nothing.missed) == 5
    with pytest.warns(UserWarning, match="expected annotations to measure on"):
        unlabelled = analyse_detections({**content, "annotations": []}, results)
    assert set(unlabelled.errors.costs.values()) == {0}
    assert unlabelled.thresholds == {"cat": 0.5, "dog": 0.5}


def test_wrong_input():
    content, results = known_case()
    with pytest.raises(ValueError, match=r"results: \[0\]: expected the id of an image .* image_id 99"):
        analyse_detections(content, [{**results[0], "image_id": 99}])
