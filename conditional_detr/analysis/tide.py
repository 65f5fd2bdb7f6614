"""Sort errors into six kinds and compute what each costs, after TIDE (Bolya et al., ECCV 2020, arXiv 2008.08115)."""

from dataclasses import dataclass

import numpy as np

from conditional_detr.analysis.matching import MATCH_IOU, Matches

BACKGROUND_IOU = 0.1
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)
_RECALLS = np.arange(101) / 100


@dataclass(frozen=True)
class Errors:
    """The errors of K detections and G annotations.

    Attributes:
        kinds: (K,) index of the kind in ``KINDS``, -1 for correct detections. Ignored detections have one, too: a
            correction can make them correct.
        missed: (G,) bool, True where no correction of a detection finds the annotation.
        fixes: (K,) the annotation that a detection has once its class or box is correct; -1 if it has none or
            another detection with a higher score has it.
        counts: the number of errors by kind, without ignored detections.
        costs: by kind, the AP at an IoU of 0.5 that is gained if all errors of the kind are corrected, in [0, 1].
        false_positives: the AP that is gained if every false positive has a lower score than all correct detections.
        false_negatives: the AP that is gained if annotations without a detection do not count.
    """

    kinds: np.ndarray
    missed: np.ndarray
    fixes: np.ndarray
    counts: dict[str, int]
    costs: dict[str, float]
    false_positives: float
    false_negatives: float


def find_errors(matches: Matches) -> Errors:
    """Sort all errors into kinds, and compute their costs.

    A detection without annotation is, in this order: of wrong localisation if its IoU with an annotation of its class
    is 0.1 to 0.5; of wrong class if that with one of another class is at least 0.5; a duplicate if that with an
    annotation that is taken is at least 0.5; background if no IoU is over 0.1; else both are wrong.

    AP is the mean over the classes that have annotations.
    """
    kinds = _kinds(matches)
    fixes = _fixes(matches, kinds)
    unmatched = matches.detection_of < 0
    missed = unmatched.copy()
    missed[targets_of(matches, kinds)[np.isin(kinds, (CLASSIFICATION, LOCALISATION))]] = False
    counted = kinds[~matches.ignored]
    counts = {kind: int((counted == i).sum()) for i, kind in enumerate(KINDS)}
    counts["missed"] = int(missed.sum())
    classes, scores, correct = matches.classes, matches.scores, matches.correct
    positives = np.bincount(matches.true_classes).astype(float)
    positives[positives == 0] = np.nan  # AP is the mean over the other classes
    kept = ~matches.ignored
    now = _mean_ap(classes[kept], scores[kept], correct[kept], positives)
    costs = {}
    for i, kind in enumerate(KINDS[:MISSED]):
        fixed = (kinds == i) & (fixes >= 0)
        rows = (kept & (kinds != i)) | fixed
        fixed_classes = classes.copy()
        fixed_classes[fixed] = matches.true_classes[fixes[fixed]]
        ap = _mean_ap(fixed_classes[rows], scores[rows], (correct | fixed)[rows], positives)
        costs[kind] = max(ap - now, 0.0)
    fewer = positives - np.bincount(matches.true_classes[missed], minlength=len(positives))
    costs["missed"] = max(_mean_ap(classes[kept], scores[kept], correct[kept], fewer) - now, 0.0)
    found = positives - np.bincount(matches.true_classes[unmatched], minlength=len(positives))
    return Errors(
        kinds=kinds,
        missed=missed,
        fixes=fixes,
        counts=counts,
        costs=costs,
        false_positives=_mean_ap(classes[kept], correct[kept].astype(float), correct[kept], positives) - now,
        false_negatives=_mean_ap(classes[kept], scores[kept], correct[kept], found) - now,
    )


def _kinds(matches: Matches) -> np.ndarray:
    """Return the kind of each detection's error, -1 for correct ones."""
    same, other = matches.nearest_iou.T
    conditions = [
        matches.correct,
        (same >= BACKGROUND_IOU) & (same <= MATCH_IOU),
        other >= MATCH_IOU,
        matches.taken_iou >= MATCH_IOU,
        np.maximum(same, other) <= BACKGROUND_IOU,
    ]
    return np.select(conditions, [-1, LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND], BOTH)


def targets_of(matches: Matches, kinds: np.ndarray) -> np.ndarray:
    """Return the annotation that each detection with a wrong class or box comes nearest to."""
    return np.where(kinds == CLASSIFICATION, matches.nearest[:, 1], matches.nearest[:, 0])


def _fixes(matches: Matches, kinds: np.ndarray) -> np.ndarray:
    """Return the annotation that each correction gives a detection; only the highest score gets an annotation."""
    fixes = np.full(len(kinds), -1)
    rows = np.flatnonzero(np.isin(kinds, (CLASSIFICATION, LOCALISATION)))
    targets = targets_of(matches, kinds)[rows]
    rows, targets = rows[free := matches.detection_of[targets] < 0], targets[free]
    _, first = np.unique(targets, return_index=True)  # of an image's detections, the first has the highest score
    fixes[rows[first]] = targets[first]
    return fixes


def _mean_ap(classes: np.ndarray, scores: np.ndarray, correct: np.ndarray, positives: np.ndarray) -> float:
    """Return the mean AP of the classes; ``positives`` has the number of annotations of each, NaN if it has none."""
    values = []
    for category in np.flatnonzero(~np.isnan(positives)):
        own = classes == category
        if positives[category] or own.any():  # otherwise nothing is left to find, and nothing is wrong
            values.append(_ap(scores[own], correct[own], int(positives[category])))
    return float(np.mean(values)) if values else 1.0


def _ap(scores: np.ndarray, correct: np.ndarray, positives: int) -> float:
    """Return the mean, over 101 recalls, of the highest precision at this or a higher recall."""
    if not positives:
        return 0.0
    found = np.cumsum(correct[np.argsort(-scores, kind="stable")])
    precision = found / np.arange(1, len(found) + 1)
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(found / positives, _RECALLS)
    return float(highest[reached[reached < len(found)]].sum() / len(_RECALLS))
