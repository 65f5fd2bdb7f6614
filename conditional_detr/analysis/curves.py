"""Scores: the best threshold of each class, confusion at given thresholds, and calibration."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from conditional_detr.analysis.matching import Matches

DEFAULT_THRESHOLD = 0.5  # of a class with nothing to choose one from
BINS = 10  # of scores


@dataclass(frozen=True)
class BestThreshold:
    """The threshold of a class with the highest F1 at an IoU of 0.5: the harmonic mean of precision and recall.

    Attributes:
        threshold: detections with a higher score are kept; 0.5 if no threshold has an F1 over 0.
        precision: the share of kept detections that are correct.
        recall: the share of annotations that are found.
        f1: 2 · correct / (kept + annotations).
        correct: the number of correct detections.
        kept: the number of kept detections.
        annotations: the number of annotations.
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    correct: int
    kept: int
    annotations: int


def best_threshold(matches: Matches, category: int) -> BestThreshold:
    """Return the threshold of a class with the highest F1; of several, the highest one.

    It lies halfway between two scores, so that rounding of a score changes nothing.
    """
    scores, found = _sorted(matches, category)
    annotations = int((matches.true_classes == category).sum())
    if not annotations or not found.any():
        return _at(scores, found, annotations, DEFAULT_THRESHOLD)
    f1 = 2 * found / (np.arange(1, len(found) + 1) + annotations)
    separable = np.append(scores[:-1] > scores[1:], True)  # equal scores are kept together
    best = int(np.where(separable, f1, -1).argmax())
    last = best + 1 == len(scores)
    below = np.nextafter(scores[best], 0) if last else (scores[best] + scores[best + 1]) / 2
    return _at(scores, found, annotations, float(below))


def f1_curve(matches: Matches, category: int, thresholds: np.ndarray) -> np.ndarray:
    """Return the F1 of a class at each threshold (T,), at an IoU of 0.5; 0 where there is nothing to find."""
    scores, found = _sorted(matches, category)
    annotations = int((matches.true_classes == category).sum())
    return np.array([_at(scores, found, annotations, threshold).f1 for threshold in thresholds])


def _sorted(matches: Matches, category: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of a class's detections, the highest first, and the number of correct ones up to each."""
    own = (matches.classes == category) & ~matches.ignored
    order = np.argsort(-matches.scores[own], kind="stable")
    return matches.scores[own][order], np.cumsum(matches.correct[own][order])


def _at(scores: np.ndarray, found: np.ndarray, annotations: int, threshold: float) -> BestThreshold:
    """Return the numbers of a class at a threshold."""
    kept = int((scores > threshold).sum())
    correct = int(found[kept - 1]) if kept else 0
    precision, recall = correct / max(kept, 1), correct / max(annotations, 1)
    f1 = 2 * correct / max(kept + annotations, 1)
    return BestThreshold(threshold, precision, recall, f1, correct, kept, annotations)


def kept_detections(matches: Matches, thresholds: np.ndarray) -> np.ndarray:
    """Return which detections (K,) have a higher score than the threshold (C,) of their class, and are not ignored."""
    return (matches.scores > thresholds[matches.classes]) & ~matches.ignored


def confusion(matches: Matches, kept: np.ndarray, categories: int) -> np.ndarray:
    """Count annotations by class and the class they are detected as, at an IoU of 0.5.

    Detections take annotations of their own class first, as for AP, so that the diagonal has the correct detections;
    then those that are left take annotations of other classes, the largest IoU first.

    Args:
        matches: the matches.
        kept: (K,) bool, the detections to count, from :func:`kept_detections`.
        categories: the number of classes, C.

    Returns:
        (C + 1, C + 1) annotated class, detected class. The last row counts detections on the background, the last
        column missed annotations.
    """
    counts = np.zeros((categories + 1, categories + 1), dtype=int)
    left = kept & ~matches.correct
    taken = np.zeros(len(matches.annotations), dtype=bool)
    pairs = matches.annotation_of[kept & matches.correct]
    taken[pairs] = True
    np.add.at(counts, (matches.true_classes[pairs], matches.true_classes[pairs]), 1)
    for k, g, _ in matches.overlaps[np.argsort(-matches.overlaps[:, 2], kind="stable")]:
        detection, annotation = int(k), int(g)
        if left[detection] and not taken[annotation]:
            left[detection], taken[annotation] = False, True
            counts[matches.true_classes[annotation], matches.classes[detection]] += 1
    counts[-1, :-1] = np.bincount(matches.classes[left], minlength=categories)
    counts[:-1, -1] = np.bincount(matches.true_classes[~taken], minlength=categories)
    return counts


def calibration(matches: Matches) -> dict[str, Any]:
    """Compare scores with the share of correct detections, at an IoU of 0.5, in ten bins of equal width.

    Returns:
        {"bins": of each bin that has detections {"low", "high", "detections", "score": their mean, "precision": the
        share of correct ones}, "error": the mean difference of score and precision, weighted by the detections}.
    """
    counted = ~matches.ignored
    scores, correct = matches.scores[counted], matches.correct[counted]
    edges = np.linspace(0, 1, BINS + 1)
    of_bin = np.searchsorted(edges[1:-1], scores)
    bins = [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "detections": int((of_bin == i).sum()),
            "score": float(scores[of_bin == i].mean()),
            "precision": float(correct[of_bin == i].mean()),
        }
        for i in np.unique(of_bin)
    ]
    gaps = sum(one["detections"] * abs(one["score"] - one["precision"]) for one in bins)
    return {"bins": bins, "error": gaps / max(len(scores), 1)}
