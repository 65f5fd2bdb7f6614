"""Match detections to annotations at an IoU of 0.5, by the evaluator's rules."""

from dataclasses import dataclass

import numpy as np

from conditional_detr.evaluation.coco import EvaluationArrays

MATCH_IOU = 0.5
MAX_PER_CLASS = 100  # detections per image and class, COCO's limit


@dataclass(eq=False)
class Matches:
    """K detections and the G annotations that are not crowds.

    The detection with the highest score of an image and class takes the annotation of its class with the largest IoU,
    then the next one takes one of those that are left. A detection that gets none, but lies in a crowd of its class,
    is ignored.

    Attributes:
        detections: (K, 7) image, category, x0, y0, w, h, score; by image, the highest score first.
        annotations: (G, 8) image, category, x0, y0, w, h, area, iscrowd.
        indices: (G,) index of each annotation in the dataset, crowds included.
        annotation_of: (K,) the matched annotation, -1 if there is none.
        detection_of: (G,) the matched detection, -1 if there is none.
        ignored: (K,) bool.
        nearest: (K, 2) annotation with the largest IoU among those of the detection's class, and of other classes.
        nearest_iou: (K, 2) their IoU, 0 if there are none.
        taken_iou: (K,) largest IoU with an annotation of the same class that another detection has taken.
        overlaps: (P, 3) detection, annotation, IoU of all pairs with an IoU of at least 0.5, of any class.
    """

    detections: np.ndarray
    annotations: np.ndarray
    indices: np.ndarray
    annotation_of: np.ndarray
    detection_of: np.ndarray
    ignored: np.ndarray
    nearest: np.ndarray
    nearest_iou: np.ndarray
    taken_iou: np.ndarray
    overlaps: np.ndarray

    @property
    def classes(self) -> np.ndarray:
        """(K,) category of each detection."""
        return self.detections[:, 1].astype(int)

    @property
    def true_classes(self) -> np.ndarray:
        """(G,) category of each annotation."""
        return self.annotations[:, 1].astype(int)

    @property
    def scores(self) -> np.ndarray:
        """(K,) score of each detection."""
        return self.detections[:, 6]

    @property
    def correct(self) -> np.ndarray:
        """(K,) bool, True where a detection has an annotation."""
        return self.annotation_of >= 0


def match(arrays: EvaluationArrays) -> Matches:
    """Match the detections of each image to its annotations.

    Args:
        arrays: the dataset and the detections. Those beyond the best 100 of an image and class are left out.

    Returns:
        The matches.
    """
    detections = _best(arrays)
    indices = np.flatnonzero(arrays.annotations[:, 7] == 0)
    indices = indices[np.argsort(arrays.annotations[indices, 0], kind="stable")]
    annotations, crowds = arrays.annotations[indices], arrays.annotations[arrays.annotations[:, 7] == 1]
    count = len(detections)
    matches = Matches(
        detections=detections,
        annotations=annotations,
        indices=indices,
        annotation_of=np.full(count, -1),
        detection_of=np.full(len(annotations), -1),
        ignored=np.zeros(count, dtype=bool),
        nearest=np.zeros((count, 2), dtype=int),
        nearest_iou=np.zeros((count, 2)),
        taken_iou=np.zeros(count),
        overlaps=np.empty((0, 3)),
    )
    crowds = crowds[np.argsort(crowds[:, 0], kind="stable")]
    of_image = np.arange(arrays.images + 1)
    bounds = [np.searchsorted(rows[:, 0], of_image) for rows in (detections, annotations, crowds)]
    overlaps = [matches.overlaps]
    for image in range(arrays.images):
        k, g, c = (slice(bound[image], bound[image + 1]) for bound in bounds)
        overlaps.append(_match_image(matches, k, g, crowds[c]))
    matches.overlaps = np.concatenate(overlaps)
    return matches


def _best(arrays: EvaluationArrays) -> np.ndarray:
    """Return the best detections of each image and class; by image, the highest score first."""
    rows = arrays.detections[np.lexsort((-arrays.detections[:, 6], arrays.detections[:, 0]))]
    groups = rows[:, 0] * arrays.categories + rows[:, 1]
    order = np.argsort(groups, kind="stable")
    ranks = np.arange(len(rows)) - np.searchsorted(groups[order], groups[order])
    return rows[np.sort(order[ranks < MAX_PER_CLASS])]


def _match_image(matches: Matches, k: slice, g: slice, crowds: np.ndarray) -> np.ndarray:
    """Fill in the matches of an image's detections and annotations; return its overlaps."""
    detections, annotations = matches.detections[k], matches.annotations[g]
    if not len(detections):
        return np.empty((0, 3))
    ious = box_ious(detections[:, 2:6], annotations[:, 2:6])
    same = detections[:, None, 1] == annotations[None, :, 1]
    crowd_ious = box_ious(detections[:, 2:6], crowds[:, 2:6], crowds=True)
    crowd_ious *= detections[:, None, 1] == crowds[None, :, 1]
    free = np.ones(len(annotations), dtype=bool)
    for i, candidates in enumerate(np.where(same, ious, -1)):
        available = np.where(free, candidates, -1)
        if available.max(initial=-1) >= MATCH_IOU:
            best = len(available) - 1 - available[::-1].argmax()  # the last one of equals, as in pycocotools
            free[best] = False
            matches.annotation_of[k.start + i] = g.start + best
            matches.detection_of[g.start + best] = k.start + i
        else:
            matches.ignored[k.start + i] = crowd_ious[i].max(initial=0) >= MATCH_IOU
    if len(annotations):
        for column, of_class in enumerate((same, ~same)):
            masked = np.where(of_class, ious, 0)
            matches.nearest[k, column] = g.start + masked.argmax(axis=1)
            matches.nearest_iou[k, column] = masked.max(axis=1)
        matches.taken_iou[k] = np.where(same & ~free, ious, 0).max(axis=1)
    first, second = np.nonzero(ious >= MATCH_IOU)
    return np.column_stack((k.start + first, g.start + second, ious[first, second]))


def box_ious(first: np.ndarray, second: np.ndarray, *, crowds: bool = False) -> np.ndarray:
    """Return the IoU (K, G) of boxes x0 y0 w h; with ``crowds``, the share of the first box that the second covers."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    from pycocotools.mask import iou

    arrays = [np.ascontiguousarray(boxes, dtype=np.float64) for boxes in (first, second)]
    return np.asarray(iou(*arrays, [int(crowds)] * len(second)))
