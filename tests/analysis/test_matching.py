"""Matches: the rules of COCO's evaluation, by hand and against pycocotools and the evaluator's recall."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from conditional_detr.analysis.matching import box_ious, match
from conditional_detr.evaluation.average_precision import average_precision
from helpers.analysis import arrays, random_arrays

BOX = (0, 0, 10, 10)


def matched_by_pycocotools(given) -> set[tuple[int, int]]:
    """Return (detection, annotation) of all detections; the annotation is -1 for none, -2 if it is ignored."""

    def coco(rows, **columns):
        made = COCO()
        made.dataset = {
            "images": [{"id": i} for i in range(given.images)],
            "categories": [{"id": i} for i in range(given.categories)],
            "annotations": [
                {"id": i + 1, "image_id": int(r[0]), "category_id": int(r[1]), "bbox": r[2:6].tolist()}
                | {"area": r[4] * r[5], "iscrowd": int(r[7]) if len(r) > 7 else 0, "score": r[6]}
                for i, r in enumerate(rows)
            ],
        }
        made.createIndex()
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco(given.annotations), coco(given.detections), "bbox")
        evaluation.evaluate()
    pairs = set()
    for one in evaluation.evalImgs:
        if one is not None and one["aRng"] == evaluation.params.areaRng[0]:
            rows = zip(one["dtIds"], one["dtMatches"][0], one["dtIgnore"][0], strict=True)
            pairs |= {(d - 1, -2 if ignored else int(g) - 1) for d, g, ignored in rows}
    return pairs


@pytest.mark.parametrize("seed", range(5))
def test_as_pycocotools(seed):
    given = random_arrays(seed, crowds=0.2)
    matches = match(given)
    position = {tuple(row): i for i, row in enumerate(given.detections)}
    annotation = np.where(matches.annotation_of < 0, -1, matches.indices[matches.annotation_of])
    annotation = np.where(matches.ignored, -2, annotation)
    ours = {(position[tuple(row)], int(g)) for row, g in zip(matches.detections, annotation, strict=True)}
    assert ours == matched_by_pycocotools(given)
    assert {-2, -1} < {g for _, g in ours}
    for g, k in enumerate(matches.detection_of):
        assert k < 0 or matches.annotation_of[k] == g
    assert (matches.detection_of >= 0).sum() == matches.correct.sum()


@pytest.mark.parametrize("seed", range(3))
def test_matched_counts_are_the_evaluators_recall(seed):
    given = random_arrays(seed, categories=3)
    matches = match(given)
    total = np.bincount(matches.true_classes, minlength=3)
    found = np.bincount(matches.true_classes[matches.detection_of >= 0], minlength=3)
    assert average_precision(*given).recall[0, :, 0, 2] * total == pytest.approx(found, abs=1e-9)


def test_higher_scores_choose_first_and_the_largest_iou_wins():
    """Both annotations fit the first detection; the second detection gets what is left."""
    given = arrays(
        [(0, 0, 0, 0, 10, 10), (0, 0, 2, 0, 10, 10)],
        [(0, 0, 1, 0, 10, 10, 0.5), (0, 0, 2, 0, 10, 10, 0.9), (0, 1, *BOX, 0.99)],
    )
    matches = match(given)
    assert matches.scores.tolist() == [0.99, 0.9, 0.5]
    assert matches.annotation_of.tolist() == [-1, 1, 0]
    assert matches.detection_of.tolist() == [2, 1]
    assert matches.nearest_iou[0].tolist() == [0, 1]  # of its class nothing, of the other class the same box
    assert matches.taken_iou[2] == pytest.approx(9 / 11)


def test_crowds_ignore_any_number_of_detections_of_their_class():
    given = arrays(
        [(0, 0, *BOX), (0, 0, 50, 0, 30, 30, 1)],
        [(0, 0, 50, 0, 5, 5, 0.9), (0, 0, 60, 0, 5, 5, 0.8), (0, 1, 50, 0, 5, 5, 0.7), (0, 0, *BOX, 0.6)],
    )
    matches = match(given)
    assert matches.ignored.tolist() == [True, True, False, False]
    assert matches.correct.tolist() == [False, False, False, True]
    assert matches.indices.tolist() == [0]


def test_a_hundred_detections_of_each_image_and_class():
    detections = [(image, c, *BOX, 1 - i / 1000) for image in (0, 1) for c in (0, 1) for i in range(102 + image)]
    matches = match(arrays([(0, 0, *BOX)], detections[::-1], images=2))
    assert len(matches.scores) == 400
    assert matches.scores.min() == 1 - 99 / 1000
    assert matches.detections[:, 0].tolist() == sorted(matches.detections[:, 0])


def test_nothing():
    for given in (arrays([], []), arrays([(0, 0, *BOX)], []), arrays([], [(0, 0, *BOX, 0.5)])):
        matches = match(given)
        assert not matches.correct.any()
        assert matches.overlaps.shape == (0, 3)


def test_iou_by_hand():
    ious = box_ious(np.array([[0, 0, 10, 10]]), np.array([[5, 0, 10, 10], [0, 0, 10, 40]]))
    assert ious == pytest.approx(np.array([[50 / 150, 0.25]]))
    assert box_ious(np.array([[0, 0, 10, 10]]), np.array([[5, 0, 10, 10]]), crowds=True).item() == 0.5
