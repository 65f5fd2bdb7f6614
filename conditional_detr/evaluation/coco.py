"""Evaluate detections by COCO's twelve metrics.

Of all object queries and classes of an image, the 100 detections with the highest scores are evaluated; there is no
score threshold. Under torch.distributed, each process detects on a part of the images, the detections are gathered,
and all processes get the same result.
"""

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from conditional_detr.data.annotations import count_unusable, warn_of_left_out_categories, warn_of_problems
from conditional_detr.data.coco import Annotations, check_size, image_paths
from conditional_detr.data.formats.reading import DataSource, Format, image_folder_of, read_split
from conditional_detr.data.json_values import Id, shorten_list
from conditional_detr.data.results import Results, read_results
from conditional_detr.data.rotated_boxes import ROTATED, Rotated, choose_boxes, rotated_indices
from conditional_detr.evaluation.average_precision import AveragePrecision, average_precision
from conditional_detr.evaluation.processes import gather, process_rank
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.sources import ImageSource
from conditional_detr.modeling.detection_transformer import DetectionTransformer

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MAX_DETECTIONS = 100  # per image, all classes together; COCO's own limit is per image and class

ImageDetections: TypeAlias = dict[Id, np.ndarray]
"""Detections by image id: (K, 6) with the category's index in the annotations, x0 y0 w h in pixels, score."""


class EvaluationArrays(NamedTuple):
    """A dataset and detections on it; images and categories are positions in the order of their ids.

    Attributes:
        images: the number of images.
        categories: the number of categories.
        annotations: (K, 8) image, category, x0, y0, w, h, area, iscrowd, in the order of the dataset.
        detections: (K, 7) image, category, x0, y0, w, h, score.
    """

    images: int
    categories: int
    annotations: np.ndarray
    detections: np.ndarray


@dataclass(frozen=True)
class CocoResult:
    """COCO's metrics; -1 where the dataset has no annotations to compute one from.

    Attributes:
        metrics: the twelve metrics, in [0, 1]: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl.
        per_class: by class name: category_id, annotations (their number, without crowds), AP, AP50, AP75, AR100.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the twelve metrics, then per_class, for JSON."""
        return {**self.metrics, "per_class": self.per_class}


def evaluate(
    detector: Detector | DetectionTransformer,
    annotations: DataSource,
    images: str | Path | Mapping[Id, ImageSource] | None = None,
    *,
    split: str = "val",
    format: Format | None = None,
    apply_thresholds: bool = False,
    batch_size: int | None = None,
    rotated: Rotated = "box",
    progress: Callable[[int, int], None] | None = None,
) -> CocoResult:
    """Run a detector on the images of a dataset and evaluate the detections.

    Args:
        detector: the detector, or a model. Classes are matched by name: the detector must have all categories of the
            dataset, and only these are detected.
        annotations: a file or folder in any format; the content of a COCO JSON file; or annotations that are already
            read.
        images: the folder of the images, or what the detector is to open, by image id; default: where the format has
            them.
        split: the split of a dataset that has several.
        format: the format; default: recognised by the content.
        apply_thresholds: whether only detections above the detector's thresholds count. Default: all count, as AP is
            defined.
        batch_size: the maximum number of images that run together; default: that of the detector.
        rotated: which box to use of an annotation whose attributes rotate its box, as CVAT writes them: "box", its box
            before the rotation, with a warning; or "hull", the smallest upright box around the rotated one.
        progress: called with the number of processed images, and the total, both of this process.

    Returns:
        The metrics, the same in all processes.

    Raises:
        OSError: the annotations or an image cannot be read or do not exist.
        TypeError: detector is of another type.
        ValueError: the annotations are invalid, the detector lacks a category, or an image is not an image file or
            not of the size in the annotations.
    """
    detector = detector if isinstance(detector, Detector) else Detector(detector)
    given = images if isinstance(images, Mapping) else None
    folder = None if isinstance(images, Mapping) else images
    data, folder = read_data(annotations, folder, split=split, format=format, rotated=rotated)
    check_classes(detector, data)
    sources = image_paths(data, image_folder_of(data, folder)) if given is None else given
    if missing := data.images.keys() - sources.keys():
        got = f"{len(missing)} of {len(data.images)} without, such as {next(iter(missing))}"
        raise ValueError(f"images: expected one for each image of {data.name}, got {got}")
    rank, processes = process_rank()
    if given is None:
        image_ids = sorted(data.images)[rank::processes]
    else:  # they may be in files that several of them share
        order = list(data.images)
        image_ids = [order[i] for i in np.array_split(np.arange(len(order)), processes)[rank]]

    def detect() -> ImageDetections:
        options = {"apply_thresholds": apply_thresholds}
        return detect_all(detector, data, sources, batch_size, progress, image_ids=image_ids, **options)

    return gather(detect, lambda parts: _compute_metrics(data, parts))


def evaluate_detections(
    annotations: DataSource,
    results: str | Path | Sequence[Mapping[str, Any]],
    *,
    split: str = "val",
    format: Format | None = None,
    rotated: Rotated = "box",
) -> CocoResult:
    """Evaluate given detections.

    Args:
        annotations: as in :func:`evaluate`; the images are not needed.
        results: a JSON file in COCO's results format, or its content; or a folder or ``.jsonl`` file of
            ``conditional-detr detect``. Under torch.distributed, the results of this process; if several processes
            have results of one image, those of the lowest rank are used.
        split: as in :func:`evaluate`.
        format: as in :func:`evaluate`.
        rotated: as in :func:`evaluate`.

    Returns:
        The metrics, the same in all processes.

    Raises:
        OSError: a file cannot be read.
        ValueError: the annotations or results are invalid; the message has the file and the position in it.
    """
    data, _ = read_data(annotations, split=split, format=format, rotated=rotated)

    def read() -> ImageDetections:
        return group_by_image(read_results(results, data), data)

    return gather(read, lambda parts: _compute_metrics(data, parts))


def read_data(
    source: DataSource,
    images: str | Path | None = None,
    *,
    split: str,
    format: Format | None,
    rotated: Rotated,
) -> tuple[Annotations, Path | None]:
    """Read a split to measure on, and warn of what may be unintended, unless it was already read.

    Returns:
        The annotations, and the folder of the images, None if it was not found.
    """
    read, folder = read_split(source, images, split=split, format=format)
    data = choose_boxes(read, rotated)
    if read is not source:
        warn_of_left_out_categories(data, stacklevel=4)
        warn_of_problems(data, {ROTATED: rotated_indices(data)})
        if all(annotation["iscrowd"] for annotation in data.annotations):
            message = (
                f"{data.name}: expected annotations to measure on, got {count_unusable(data)}: all metrics are -1"
            )
            warnings.warn(message, stacklevel=3)
    return data, folder


def check_classes(detector: Detector, data: Annotations) -> None:
    """Raise ValueError if a category of the dataset is not a class name of the detector."""
    class_names = {name: None for name in detector.model.metadata.class_names if name is not None}
    categories = list(data.categories.values())
    if missing := [name for name in categories if name not in class_names]:
        raise ValueError(
            f"{data.name}: expected categories that are class names of the model, got {len(missing)} that are not:"
            f" {shorten_list(missing)}; all categories: {shorten_list(categories)};"
            f" the model's: {shorten_list(class_names, 100)}"
        )


def detect_all(
    detector: Detector,
    data: Annotations,
    images: Mapping[Id, ImageSource],
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
    *,
    image_ids: Sequence[Id] | None = None,
    apply_thresholds: bool = False,
) -> ImageDetections:
    """Return the detections of each image, or of some of them."""
    indices = {name: index for index, name in enumerate(data.categories.values())}
    order = list(images if image_ids is None else image_ids)
    if isinstance(images, dict):  # images of one size run together; others are read in their own order
        order.sort(key=lambda image_id: [str(data.images[image_id].get(side)) for side in ("height", "width")])
    threshold = None if apply_thresholds else 0.0
    opened = (_named(images[image_id], data.images[image_id].get("file_name")) for image_id in order)
    results = detector(opened, threshold=threshold, top_k=MAX_DETECTIONS, classes=list(indices), batch_size=batch_size)
    by_image: ImageDetections = {}
    for image_id, detections in zip(order, results, strict=True):
        source, name = images[image_id] if isinstance(images, dict) else None, data.images[image_id].get("file_name")
        check_size(data, image_id, detections.size, source if isinstance(source, Path) else str(name))
        by_image[image_id] = _to_rows(detections, indices)
        if progress is not None:
            progress(len(by_image), len(order))
    return by_image


def _named(image: ImageSource, name: Any) -> ImageSource:
    """Return the bytes of an image as a file with a name, for messages; any other source as it is."""
    if not isinstance(image, bytes):
        return image
    file = io.BytesIO(image)
    file.name = str(name)
    return file


def _to_rows(detections: Detections, index_of: Mapping[str, int]) -> np.ndarray:
    """Return detections (K, 6): the category's index, x0 y0 w h, score."""
    boxes = detections.boxes.double().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    indices = np.array([index_of[name] for name in detections.names], dtype=np.float64)
    return np.column_stack((indices, boxes, detections.scores.double().numpy()))


def group_by_image(results: Results, data: Annotations) -> ImageDetections:
    """Return the detections of each image that has any, in their order."""
    images = _positions(results.image_ids, data.images)
    order = np.argsort(images, kind="stable")
    categories = _positions(results.category_ids, data.categories)
    rows = np.column_stack((categories, results.boxes, results.scores))[order]
    ends = np.searchsorted(images[order], np.arange(1, len(data.images)))
    return {image_id: part for image_id, part in zip(data.images, np.split(rows, ends), strict=True) if len(part)}


def _compute_metrics(data: Annotations, parts: Sequence[ImageDetections]) -> CocoResult:
    """Compute the metrics of the detections of all processes."""
    by_image: ImageDetections = {}
    for part in parts:
        by_image = part | by_image  # the lowest rank's detections of an image take precedence
    return to_result(data, average_precision(*to_arrays(data, by_image)))


def to_arrays(data: Annotations, by_image: ImageDetections) -> EvaluationArrays:
    """Return what :func:`~conditional_detr.evaluation.average_precision.average_precision` takes."""
    image_ids, category_ids = sorted(data.images), sorted(data.categories)
    annotations = np.empty((len(data.annotations), 8))
    annotations[:, 0] = _positions([annotation["image_id"] for annotation in data.annotations], image_ids)
    annotations[:, 1] = _positions([annotation["category_id"] for annotation in data.annotations], category_ids)
    annotations[:, 2:] = [(*a["bbox"], a["area"], a["iscrowd"]) for a in data.annotations] or np.empty((0, 6))
    rows = np.concatenate([np.empty((0, 6)), *by_image.values()])
    images = np.repeat(_positions(list(by_image), image_ids), [len(of_image) for of_image in by_image.values()])
    categories = _positions(list(data.categories), category_ids)[rows[:, 0].astype(int)]
    detections = np.column_stack((images, categories, rows[:, 1:]))
    return EvaluationArrays(len(image_ids), len(category_ids), annotations, detections)


def to_result(data: Annotations, result: AveragePrecision) -> CocoResult:
    """Return the twelve metrics, and those of each class."""
    return CocoResult(dict(zip(METRICS, result.summary.tolist(), strict=True)), _metrics_per_class(data, result))


def _positions(ids: Sequence[Id], all_ids: Iterable[Id]) -> np.ndarray:
    """Return the positions of ids among all ids."""
    positions = {key: position for position, key in enumerate(all_ids)}
    return np.array([positions[key] for key in ids], dtype=np.int64)


def mean_of_measured(values: np.ndarray) -> float:
    """Return the mean of the values that are not -1; -1 if there are none."""
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


def _metrics_per_class(data: Annotations, result: AveragePrecision) -> dict[str, dict[str, Any]]:
    """Return the metrics of each class, for boxes of all sizes and 100 detections."""
    precision, recall = result.precision[..., 0, -1], result.recall[..., 0, -1]
    counts = Counter(annotation["category_id"] for annotation in data.annotations if not annotation["iscrowd"])
    return {
        data.categories[category_id]: {
            "category_id": category_id,
            "annotations": counts[category_id],
            "AP": mean_of_measured(precision[:, :, k]),
            "AP50": mean_of_measured(precision[0, :, k]),
            "AP75": mean_of_measured(precision[5, :, k]),
            "AR100": mean_of_measured(recall[:, k]),
        }
        for k, category_id in enumerate(sorted(data.categories))
    }
