"""Analyse the detections of a detector, or of a results file, on a dataset."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conditional_detr.analysis.curves import (
    BestThreshold,
    best_threshold,
    calibration,
    confusion,
    f1_curve,
    kept_detections,
)
from conditional_detr.analysis.matching import Matches, match
from conditional_detr.analysis.suspicious import Describer, class_names, find_suspicious
from conditional_detr.analysis.tide import KINDS, Errors, find_errors
from conditional_detr.data.coco import Annotations, image_paths
from conditional_detr.data.formats.reading import DataSource, Format, image_folder_of
from conditional_detr.data.results import read_results
from conditional_detr.data.rotated_boxes import Rotated
from conditional_detr.evaluation.average_precision import average_precision
from conditional_detr.evaluation.coco import (
    CocoResult,
    ImageDetections,
    check_classes,
    detect_all,
    group_by_image,
    mean_of_measured,
    read_data,
    to_arrays,
    to_result,
)
from conditional_detr.inference.detector import Detector
from conditional_detr.modeling.detection_transformer import DetectionTransformer

THRESHOLDS = np.arange(101) / 100  # of the F1 curves
_SIZES = ("APs", "APm", "APl")


@dataclass(frozen=True)
class Analysis:
    """What goes wrong in detections on a dataset, and where.

    All but the metrics is for an IoU of 0.5; ``kept`` detections have a higher score than the best threshold of their
    class. Arrays follow the order of the category ids and of the image ids.

    Attributes:
        data: the dataset.
        images: the folder of its images; None if it was not found.
        matches: detections and annotations, and which belong together.
        errors: the kind of each error, and the cost of each kind.
        metrics: the evaluator's metrics.
        precision: (10 IoU thresholds, 101 recalls, C classes, 4 ranges of area), -1 where there are no annotations.
        best: by class name, its best threshold and the numbers at it.
        f1: (C, 101) F1 of each class at thresholds 0, 0.01 to 1.
        kept: (K,) bool, the detections above the best threshold of their class, without ignored ones.
        confusion: (C + 1, C + 1) annotated class, detected class; the last of each is the background.
        calibration: scores and the share of correct detections, see
            :func:`conditional_detr.analysis.curves.calibration`.
        suspicious: labels that may be wrong, see :func:`conditional_detr.analysis.suspicious.find_suspicious`.
    """

    data: Annotations
    images: Path | None
    matches: Matches
    errors: Errors
    metrics: CocoResult
    precision: np.ndarray
    best: dict[str, BestThreshold]
    f1: np.ndarray
    kept: np.ndarray
    confusion: np.ndarray
    calibration: dict[str, Any]
    suspicious: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Class names, in the order of their ids."""
        return class_names(self.data)

    @property
    def thresholds(self) -> dict[str, float]:
        """The best threshold by class name, as :class:`conditional_detr.Detector` takes it."""
        return {name: best.threshold for name, best in self.best.items()}

    @property
    def missed(self) -> np.ndarray:
        """Annotations that no kept detection finds, the largest first."""
        found = np.append(self.kept, False)[self.matches.detection_of]
        missed = np.flatnonzero(~found)
        return missed[np.argsort(-self.matches.annotations[missed, 6], kind="stable")]

    @property
    def false_positives(self) -> np.ndarray:
        """Kept detections that are not correct, the highest score first."""
        wrong = np.flatnonzero(self.kept & ~self.matches.correct)
        return wrong[np.argsort(-self.matches.scores[wrong], kind="stable")]

    @property
    def worst_images(self) -> list[tuple[int, int, int]]:
        """(position, false positives, missed annotations) of images with errors, most errors first."""
        count = len(self.data.images)
        wrong = np.bincount(self.matches.detections[self.false_positives, 0].astype(int), minlength=count)
        missed = np.bincount(self.matches.annotations[self.missed, 0].astype(int), minlength=count)
        order = np.argsort(-(wrong + missed), kind="stable")
        return [(int(i), int(wrong[i]), int(missed[i])) for i in order if wrong[i] + missed[i]]

    def kept_counts(self) -> dict[str, int]:
        """Return the number of errors of each kind among kept detections, and of annotations that these miss."""
        kinds = self.errors.kinds[self.false_positives]
        counts = {kind: int((kinds == i).sum()) for i, kind in enumerate(KINDS[:-1])}
        return {**counts, "missed": len(self.missed)}

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, and all missed objects, false positives and suspicious labels, for JSON."""
        kept, errors, describe = self.kept_counts(), self.errors, Describer(self.data, self.matches)
        kinds = {
            kind: {"cost": errors.costs[kind], "errors": errors.counts[kind], "above_threshold": kept[kind]}
            for kind in KINDS
        }
        return {
            "metrics": self.metrics.metrics,
            "per_class": self.per_class(),
            "errors": kinds,
            "false_positives_cost": errors.false_positives,
            "false_negatives_cost": errors.false_negatives,
            "confusion": {"classes": [*self.names, None], "counts": self.confusion.tolist()},
            "calibration": self.calibration,
            "precision_at_recall": {name: self.precision[0, :, k, 0].tolist() for k, name in enumerate(self.names)},
            "f1_at_threshold": {name: self.f1[k].tolist() for k, name in enumerate(self.names)},
            "worst_images": [
                {**describe.image(image), "false_positives": wrong, "missed": missed}
                for image, wrong, missed in self.worst_images
            ],
            "missed": [describe.labelled(int(annotation)) for annotation in self.missed],
            "false_positives": [
                {
                    **describe.image(int(self.matches.detections[detection, 0])),
                    **describe.detection(int(detection)),
                    "kind": KINDS[errors.kinds[detection]],
                }
                for detection in self.false_positives
            ],
            "suspicious": self.suspicious,
        }

    def per_class(self) -> dict[str, dict[str, Any]]:
        """Return the evaluator's metrics of each class, AP by size, and the best threshold."""
        result = {}
        for k, (name, metrics) in enumerate(self.metrics.per_class.items()):
            sizes = {
                size: mean_of_measured(self.precision[:, :, k, area]) for area, size in enumerate(_SIZES, start=1)
            }
            best = {key: value for key, value in asdict(self.best[name]).items() if key != "annotations"}
            result[name] = {**metrics, **sizes, **best}
        return result


def analyse(
    detector: Detector | DetectionTransformer,
    annotations: DataSource,
    images: str | Path | None = None,
    *,
    split: str = "val",
    format: Format | None = None,
    batch_size: int | None = None,
    rotated: Rotated = "box",
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Run a detector on the images of a dataset and analyse its errors.

    The arguments and errors are those of :func:`conditional_detr.evaluation.coco.evaluate`.
    """
    detector = detector if isinstance(detector, Detector) else Detector(detector)
    data, found = read_data(annotations, images, split=split, format=format, rotated=rotated)
    check_classes(detector, data)
    folder = image_folder_of(data, found)
    return _analyse(data, folder, detect_all(detector, data, image_paths(data, folder), batch_size, progress))


def analyse_detections(
    annotations: DataSource,
    results: str | Path | Sequence[Mapping[str, Any]],
    images: str | Path | None = None,
    *,
    split: str = "val",
    format: Format | None = None,
    rotated: Rotated = "box",
) -> Analysis:
    """Analyse the errors of given detections. A threshold that they were made with limits AP and the curves.

    The arguments and errors are those of :func:`conditional_detr.evaluation.coco.evaluate_detections`; images is the
    folder of the images, which only the gallery needs, by default where the format has them.
    """
    data, folder = read_data(annotations, images, split=split, format=format, rotated=rotated)
    found = read_results(results, data)
    scores = np.asarray(found.scores)
    if len(wrong := np.flatnonzero((scores < 0) | (scores > 1))):
        raise ValueError(f"results: [{wrong[0]}]: expected a score of 0..1, got {scores[wrong[0]]:g}")
    return _analyse(data, folder, group_by_image(found, data))


def _analyse(data: Annotations, images: Path | None, by_image: ImageDetections) -> Analysis:
    """Analyse the detections of each image."""
    arrays = to_arrays(data, by_image)
    result = average_precision(*arrays)
    matches = match(arrays)
    errors = find_errors(matches)
    names = class_names(data)
    best = {name: best_threshold(matches, k) for k, name in enumerate(names)}
    kept = kept_detections(matches, np.array([best[name].threshold for name in names]))
    return Analysis(
        data=data,
        images=images,
        matches=matches,
        errors=errors,
        metrics=to_result(data, result),
        precision=result.precision[..., -1],
        best=best,
        f1=np.stack([f1_curve(matches, k, THRESHOLDS) for k in range(len(names))]),
        kept=kept,
        confusion=confusion(matches, kept, len(names)),
        calibration=calibration(matches),
        suspicious=find_suspicious(data, matches, errors, kept),
    )
