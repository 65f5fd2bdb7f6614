"""How good a detector is, in COCO's twelve numbers: pycocotools computes them, here stands what leads to it.

Every query and class of an image competes for its 100 best places, whatever the scores: there is no threshold. What
is kept of an image is these 100 detections. Under torch.distributed each process detects on its share of the
images, the detections are gathered, and all processes get the same result.
"""

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from torch import distributed

from conditional_detr.data.coco import (
    Annotations,
    Id,
    check_size,
    image_paths,
    read_annotations,
    read_results,
)
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.modeling.conditional_detr import ConditionalDETR

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MAX_DETECTIONS = 100  # an image, all classes together; pycocotools counts as many of each class

Found: TypeAlias = dict[Id, np.ndarray]
"""Detections by image: (K, 6) of the category's place among the data set's, x0 y0 w h, score."""
T = TypeVar("T")


@dataclass(frozen=True)
class CocoResult:
    """COCO's measures of a set of detections; -1 where the data set has no object to measure them on.

    Attributes:
        metrics: the twelve, as fractions: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl.
        per_class: by class name: category_id, objects (their number, crowds apart), AP, AP50, AP75, AR100.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the twelve, then per_class, for json."""
        return {**self.metrics, "per_class": self.per_class}


def evaluate(
    detector: Detector | ConditionalDETR,
    annotations: str | Path | Mapping[str, Any] | Annotations,
    images: str | Path,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> CocoResult:
    """Detect objects on the images of a data set and measure how good the detections are.

    Args:
        detector: the detector, or a model, which becomes one. Its class names say which category is which: it must
            have all those of the data set, and is asked for no others.
        annotations: COCO's json of the data set, or what it holds, or what was read of it.
        images: the folder of its images.
        batch_size: the most images that run together.
        progress: called with the number of images done and of all, of this process.

    Raises:
        OSError: annotations or images that cannot be read or are not there.
        TypeError: no detector.
        ValueError: annotations that are none, classes that the detector does not know, a file that is no image or
            not of the size that the annotations say.
    """
    detector = detector if isinstance(detector, Detector) else Detector(detector)
    data = read_annotations(annotations)
    check_classes(detector, data)
    paths = image_paths(data, images)
    rank, processes = _process()
    share = sorted(paths)[rank::processes]

    def work() -> Found:
        return _detect(detector, data, {image: paths[image] for image in share}, batch_size, progress)

    return _with_all_processes(work, lambda parts: _measure(data, parts))


def evaluate_detections(
    annotations: str | Path | Mapping[str, Any], results: str | Path | Sequence[Mapping[str, Any]]
) -> CocoResult:
    """Measure how good detections are that were made elsewhere.

    Args:
        annotations: COCO's json of the data set, or what it holds.
        results: a json file in COCO's form for results, or what it holds. Under torch.distributed, those of this
            process; what several processes have of the same image counts once.

    Raises:
        OSError: a file that cannot be read.
        ValueError: annotations or results that are none; the message has the file and the place in it.
    """
    data = read_annotations(annotations)

    def work() -> Found:
        places = {category: place for place, category in enumerate(data.categories)}
        rows: dict[Id, list[list[float]]] = {}
        for result in read_results(results, data):
            row = [places[result["category_id"]], *result["bbox"], result["score"]]
            rows.setdefault(result["image_id"], []).append(row)
        return {image: np.array(found) for image, found in rows.items()}

    return _with_all_processes(work, lambda parts: _measure(data, parts))


def check_classes(detector: Detector, data: Annotations) -> None:
    """Raise ValueError unless the detector's classes have all the names of the data set's."""
    known = [name for name in detector.model.metadata.class_names if name is not None]
    wanted = list(data.categories.values())
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(
            f"{data.name}: expected classes that the model has by the same names, got {len(missing)} that it has not:"
            f" {', '.join(missing)}; the data set's: {', '.join(wanted)}; the model's: {', '.join(known)}"
        )


def _detect(
    detector: Detector,
    data: Annotations,
    paths: Mapping[Id, Path],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Found:
    """Return the best detections of each image."""
    names = list(data.categories.values())
    # Images of one size run together, so they come one after the other.
    order = sorted(paths, key=lambda image: [str(data.images[image].get(side)) for side in ("height", "width")])
    images = iter([paths[image] for image in order])
    several = detector(images, threshold=0.0, top_k=MAX_DETECTIONS, classes=names, batch_size=batch_size)
    found: Found = {}
    for image, detections in zip(order, several, strict=True):
        check_size(data.images[image], detections.size, paths[image], data.name)
        found[image] = _rows(detections, names)
        if progress is not None:
            progress(len(found), len(paths))
    return found


def _rows(detections: Detections, names: list[str]) -> np.ndarray:
    """Return detections (K, 6): the category's place, x0 y0 w h, score."""
    boxes = detections.boxes.double().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    places = np.array([names.index(name) for name in detections.names], dtype=np.float64)
    return np.column_stack((places, boxes, detections.scores.double().numpy()))


def _measure(data: Annotations, parts: Sequence[Found]) -> CocoResult:
    """Let pycocotools measure the detections of all processes."""
    from pycocotools.cocoeval import COCOeval

    found: Found = {}
    for part in parts:
        found = part | found  # of an image that several have, the first's
    categories = list(data.categories)
    detections = [
        {
            "image_id": image,
            "category_id": categories[int(place)],
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
        }
        for image, rows in found.items()
        for place, *box, score in rows.tolist()
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        evaluation = COCOeval(_indexed(data, data.objects), _indexed(data, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(METRICS, evaluation.stats.tolist(), strict=True))
    return CocoResult(metrics, _per_class(data, evaluation))


def _indexed(data: Annotations, objects: Sequence[Mapping[str, Any]]) -> Any:
    """Return objects as pycocotools' COCO, numbered from 1: it takes an object of number 0 for none at all."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in data.images],
        "categories": [{"id": category, "name": name} for category, name in data.categories.items()],
        "annotations": [{"iscrowd": 0, **entry, "id": i} for i, entry in enumerate(objects, start=1)],
    }
    coco.createIndex()
    return coco


def _per_class(data: Annotations, evaluation: Any) -> dict[str, dict[str, Any]]:
    """Return what pycocotools found out about each class, of any size and with 100 detections."""

    def mean(values: np.ndarray) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    precision = evaluation.eval["precision"][..., 0, -1]  # (IoU thresholds, recalls, classes)
    recall = evaluation.eval["recall"][..., 0, -1]  # (IoU thresholds, classes)
    counts = Counter(entry["category_id"] for entry in data.objects if not entry["iscrowd"])
    return {
        data.categories[category]: {
            "category_id": category,
            "objects": counts[category],
            "AP": mean(precision[:, :, place]),
            "AP50": mean(precision[0, :, place]),
            "AP75": mean(precision[5, :, place]),
            "AR100": mean(recall[:, place]),
        }
        for place, category in enumerate(sorted(data.categories))  # pycocotools' order
    }


def _process() -> tuple[int, int]:
    """Return the number of this process, and of how many."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _with_all_processes(work: Callable[[], Found], join: Callable[[list[Found]], CocoResult]) -> CocoResult:
    """Let each process do its work and the first one join the parts; the result, or the first error, is everyone's."""
    rank, processes = _process()
    if processes == 1:
        return join([work()])
    parts: list[Any] | None = [None] * processes if rank == 0 else None
    distributed.gather_object(_outcome(work), parts)
    outcome = [None if parts is None else _outcome(lambda: join([_value(part) for part in parts]))]
    distributed.broadcast_object_list(outcome)
    return _value(outcome[0])


def _outcome(work: Callable[[], T]) -> T | Exception:
    """Return what work returns, or the error it raises: one that stops alone lets the others wait for ever."""
    try:
        return work()
    except (OSError, TypeError, ValueError) as error:
        return error


def _value(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
