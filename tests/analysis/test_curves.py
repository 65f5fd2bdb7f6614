"""Thresholds, confusion and calibration: by hand, and against scikit-learn and supervision."""

import warnings

import numpy as np
import pytest

from conditional_detr.analysis.curves import best_threshold, calibration, confusion, f1_curve, kept_detections
from conditional_detr.analysis.matching import match
from helpers.analysis import arrays, random_arrays

RIGHT, WRONG = (0, 0, 10, 10), (60, 60, 10, 10)


def scored(*found, objects=4, ignored=()):
    """Matches of one class: in each image one object, or none; (image, correct, score) of each detection."""
    annotations = [(i, 0, *RIGHT) for i in range(objects)] + [(i, 0, *WRONG, 1) for i in ignored]
    detections = [(i, 0, *(RIGHT if correct else WRONG), score) for i, correct, score in found]
    return match(arrays(annotations, detections, images=9, categories=1))


def test_best_threshold_by_hand():
    """F1 after each detection: 2/5, 4/6, 4/7, 6/8, 6/9."""
    matches = scored((0, True, 0.9), (1, True, 0.8), (5, False, 0.7), (2, True, 0.6), (6, False, 0.4))
    best = best_threshold(matches, 0)
    assert best.threshold == pytest.approx(0.5)
    assert (best.correct, best.kept, best.annotations) == (3, 4, 4)
    assert best.f1 == pytest.approx(6 / 8)
    assert best.precision == best.recall == 0.75


def test_equal_scores_are_kept_together():
    """Without the wrong one of the same score F1 would be 1."""
    matches = scored((0, True, 0.9), (1, True, 0.5), (5, False, 0.5), objects=2)
    best = best_threshold(matches, 0)
    assert best.f1 == pytest.approx(4 / 5)
    assert best.threshold < 0.5
    assert best.kept == 3


def test_the_last_score_is_kept():
    best = best_threshold(scored((0, True, 0.5), objects=1), 0)
    assert 0.499 < best.threshold < 0.5
    assert best.f1 == 1


def test_no_threshold_finds_anything():
    for matches in (scored((0, False, 0.9)), scored(objects=2), scored((0, False, 0.7), objects=0)):
        best = best_threshold(matches, 0)
        assert best.threshold == 0.5
        assert best.f1 == best.precision == best.recall == 0


def test_ignored_detections_do_not_count():
    best = best_threshold(scored((0, True, 0.4), (8, False, 0.9), objects=1, ignored=(8,)), 0)
    assert (best.f1, best.kept) == (1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_f1_and_best_threshold_as_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    matches = match(random_arrays(seed))
    for category in range(4):
        own = (matches.classes == category) & ~matches.ignored
        objects = (matches.true_classes == category).sum()
        missed = objects - matches.correct[own].sum()
        truth = np.append(matches.correct[own], np.ones(missed, dtype=bool))
        scores = np.append(matches.scores[own], np.full(missed, -1.0))  # no threshold keeps what is not detected
        thresholds = np.arange(0, 1, 0.05)
        expected = [metrics.f1_score(truth, scores > threshold) for threshold in thresholds]
        assert f1_curve(matches, category, thresholds) == pytest.approx(np.array(expected))
        best = best_threshold(matches, category)
        at_all = [metrics.f1_score(truth, scores >= threshold) for threshold in matches.scores[own]]
        assert best.f1 == pytest.approx(max(at_all))
        assert metrics.f1_score(truth, scores > best.threshold) == pytest.approx(best.f1)


def test_confusion_by_hand():
    """A cat that is found, one that is taken for a dog, one that is missed; a dog where nothing is; one below."""
    given = arrays(
        [(0, 0, *RIGHT), (1, 0, *RIGHT), (2, 0, *RIGHT), (3, 1, *RIGHT), (3, 0, *WRONG, 1)],
        [
            (0, 0, *RIGHT, 0.9),
            (1, 1, *RIGHT, 0.8),
            (4, 1, *RIGHT, 0.8),
            (3, 1, *RIGHT, 0.3),  # below the threshold of dogs
            (3, 0, *WRONG, 0.9),  # in a crowd
        ],
        images=5,
    )
    matches = match(given)
    kept = kept_detections(matches, np.array([0.5, 0.3]))
    assert confusion(matches, kept, 2).tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 0]]


def test_own_class_before_a_larger_iou():
    """The dog fits the cat better than the cat's own detection does, which still counts."""
    given = arrays([(0, 0, *RIGHT)], [(0, 1, *RIGHT, 0.9), (0, 0, 0, 0, 10, 8, 0.6)])
    matches = match(given)
    assert confusion(matches, kept_detections(matches, np.array([0.5, 0.5])), 2).tolist() == [
        [1, 0, 0],
        [0, 0, 0],
        [0, 1, 0],
    ]


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_the_confusion_matrix(seed):
    """Rows are all annotations, columns all kept detections, the diagonal the correct ones."""
    matches = match(random_arrays(seed))
    thresholds = np.array([best_threshold(matches, k).threshold for k in range(4)])
    kept = kept_detections(matches, thresholds)
    counts = confusion(matches, kept, 4)
    assert counts[:-1].sum(axis=1).tolist() == np.bincount(matches.true_classes, minlength=4).tolist()
    assert counts[:, :-1].sum(axis=0).tolist() == np.bincount(matches.classes[kept], minlength=4).tolist()
    assert counts.diagonal()[:-1].tolist() == [best_threshold(matches, k).correct for k in range(4)]
    assert counts[-1, -1] == 0


@pytest.mark.parametrize("seed", range(3))
def test_confusion_as_supervision(seed):
    """Boxes far apart from each other, so that the order of pairs does not matter."""
    sv = pytest.importorskip("supervision")
    generator = np.random.default_rng(seed)
    annotations, detections = [], []
    for image in range(10):
        for cell in range(6):
            box = np.array([100 * cell, 0, 40, 40]) + generator.integers(0, 9, 4)
            kind = generator.integers(3)
            if kind < 2:
                annotations.append((image, generator.integers(3), *box))
            if kind > 0:
                detections.append((image, generator.integers(3), *(box + 1), generator.random()))
    given = arrays(annotations, detections, images=10, categories=3)
    matches = match(given)
    kept = kept_detections(matches, np.full(3, 0.3))

    def corners(rows):
        return np.column_stack((rows[:, 2:4], rows[:, 2:4] + rows[:, 4:6]))

    truth, found = [], []
    for image in range(10):
        own, seen = (rows[rows[:, 0] == image] for rows in (given.annotations, given.detections))
        truth.append(sv.Detections(corners(own), class_id=own[:, 1].astype(int)))
        scores = seen[:, 6].astype(float)
        found.append(sv.Detections(corners(seen), class_id=seen[:, 1].astype(int), confidence=scores))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sv.ConfusionMatrix.from_detections(
            predictions=found, targets=truth, classes=list("abc"), conf_threshold=0.3, iou_threshold=0.5
        ).matrix
    assert confusion(matches, kept, 3).tolist() == expected.tolist()


def test_calibration_by_hand():
    """Two of three are correct around 0.9, none of one at 0.25; the crowd's detection does not count."""
    found = ((0, True, 0.95), (1, True, 0.91), (5, False, 0.93), (6, False, 0.25), (8, False, 0.5))
    result = calibration(scored(*found, ignored=(8,)))
    low, high = result["bins"]
    assert (low["detections"], low["precision"], low["score"]) == (1, 0, 0.25)
    assert (high["low"], high["high"]) == pytest.approx((0.9, 1))
    assert high["precision"] == pytest.approx(2 / 3)
    assert high["score"] == pytest.approx(0.93)
    assert result["error"] == pytest.approx((0.25 + 3 * (0.93 - 2 / 3)) / 4)
    assert calibration(scored())["bins"] == []


@pytest.mark.parametrize("seed", range(3))
def test_calibration_as_scikit_learn(seed):
    curves = pytest.importorskip("sklearn.calibration")
    matches = match(random_arrays(seed))
    shares, means = curves.calibration_curve(
        matches.correct[~matches.ignored], matches.scores[~matches.ignored], n_bins=10
    )
    bins = calibration(matches)["bins"]
    assert [one["precision"] for one in bins] == pytest.approx(shares.tolist())
    assert [one["score"] for one in bins] == pytest.approx(means.tolist())
