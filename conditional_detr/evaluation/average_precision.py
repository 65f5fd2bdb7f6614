"""Compute average precision and recall with hotcoco, or with pycocotools where hotcoco cannot be imported.

Both give the same numbers, bit by bit. hotcoco is compiled and takes arrays; it needs about a hundredth of the time.
"""

import contextlib
import functools
import io
import os
import warnings
from typing import Any, NamedTuple

import numpy as np


class AveragePrecision(NamedTuple):
    """COCO's metrics; -1 where there are no annotations to compute one from.

    Attributes:
        summary: the twelve metrics, in COCO's order.
        precision: (10 IoU thresholds, 101 recall thresholds, categories, 4 ranges of area, 3 limits of detections).
        recall: (10 IoU thresholds, categories, 4 ranges of area, 3 limits of detections).
    """

    summary: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def average_precision(
    images: int, categories: int, annotations: np.ndarray, detections: np.ndarray
) -> AveragePrecision:
    """Compute COCO's average precision and recall of bounding boxes.

    Images and categories are numbered from 0 on, in the order of their ids. The order of detections matters where
    scores are equal.

    Args:
        images: the number of images.
        categories: the number of categories.
        annotations: (K, 8) image, category, x0, y0, w, h, area, iscrowd.
        detections: (K, 7) image, category, x0, y0, w, h, score.

    Returns:
        The metrics.
    """
    # hotcoco's threads do not survive a fork: a child of a process that used it would wait for them forever.
    compute = _with_hotcoco if _has_hotcoco() and _first_process() == os.getpid() else _with_pycocotools
    return compute(images, categories, annotations, detections)


@functools.cache
def _has_hotcoco() -> bool:
    """Return whether hotcoco can be imported; warn once if it cannot."""
    try:
        import hotcoco  # noqa: F401
    except ImportError as error:
        message = f"hotcoco cannot be imported ({error}); pycocotools computes the same metrics, but slowly"
        warnings.warn(f"{message}: pip install hotcoco", stacklevel=7)  # the caller of evaluation.coco's functions
        return False
    return True


@functools.cache
def _first_process() -> int:
    """Return the id of the process that called this first; a forked process gets that of its parent."""
    return os.getpid()


def _with_hotcoco(images: int, categories: int, annotations: np.ndarray, detections: np.ndarray) -> AveragePrecision:
    """Compute the metrics with hotcoco."""
    from hotcoco import COCO, COCOeval

    truth = COCO.from_arrays(
        [{"id": number} for number in range(images)],
        [{"id": number, "name": str(number)} for number in range(categories)],
        *(annotations[:, 0], annotations[:, 1], annotations[:, 2:6]),
        area=annotations[:, 6],
        iscrowd=annotations[:, 7].astype(bool),
    )
    evaluation = COCOeval(truth, truth.load_res(detections[:, [0, 2, 3, 4, 5, 6, 1]]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()
    return _collect(evaluation)


def _with_pycocotools(
    images: int, categories: int, annotations: np.ndarray, detections: np.ndarray
) -> AveragePrecision:
    """Compute the metrics with pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def to_coco(rows: np.ndarray, **columns: np.ndarray) -> Any:
        columns = {"image_id": rows[:, 0].astype(int), "category_id": rows[:, 1].astype(int), **columns}
        columns["bbox"] = rows[:, 2:6]
        columns["id"] = np.arange(1, len(rows) + 1)  # pycocotools does not match an annotation with id 0
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        coco = COCO()
        coco.dataset = {
            "images": [{"id": number} for number in range(images)],
            "categories": [{"id": number} for number in range(categories)],
            "annotations": [dict(zip(columns, of_one, strict=True)) for of_one in values],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = to_coco(annotations, area=annotations[:, 6], iscrowd=annotations[:, 7].astype(int))
        no_crowds = np.zeros(len(detections), dtype=int)
        areas = detections[:, 4] * detections[:, 5]
        found = to_coco(detections, area=areas, score=detections[:, 6], iscrowd=no_crowds)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return _collect(evaluation)


def _collect(evaluation: Any) -> AveragePrecision:
    """Return the metrics of an evaluation, which both libraries name alike."""
    return AveragePrecision(evaluation.stats, evaluation.eval["precision"], evaluation.eval["recall"])
