"""Read and check detections in COCO's results format, or as ``conditional-detr detect`` writes them."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from conditional_detr.data.coco import MAX_COORDINATE, Annotations, check_fields, read_json
from conditional_detr.data.detect_results import is_from_detect, read_detect_results
from conditional_detr.data.json_values import Id, describe_content, get_value, to_id, to_number


class Results(NamedTuple):
    """K detections.

    Attributes:
        image_ids: K ids of images of the annotations.
        category_ids: K ids of categories of the annotations.
        boxes: (K, 4) x0 y0 w h in pixels, float64.
        scores: (K,) float64.
    """

    image_ids: list[Id]
    category_ids: list[Id]
    boxes: np.ndarray
    scores: np.ndarray


def read_results(source: str | Path | Sequence[Mapping[str, Any]], data: Annotations) -> Results:
    """Read detections in COCO's results format: a list of image_id, category_id, bbox [x0, y0, w, h] and score.

    A folder or a ``.jsonl`` file is read as results of ``conditional-detr detect``: see
    :func:`conditional_detr.data.detect_results.read_detect_results`.

    Detections of categories that are left out are skipped with a warning: without annotations they do not count.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not in this format, or has an image or category that the annotations lack; the
            message has the file and the position in it.
    """
    if is_from_detect(source):
        path = Path(source)  # type: ignore[arg-type]
        name, content = str(path), read_detect_results(path, data)
    else:
        name, content = read_json(source, "results")
    if isinstance(content, Mapping | str) or not isinstance(content, Sequence):
        raise ValueError(f"{name}: expected a list of detections, got {describe_content(content)}")
    results = _read_columns(content, data)
    if results is not None:
        return results
    image_ids, category_ids, boxes, scores, skipped = [], [], [], [], 0
    for i, entry in enumerate(content):
        where = f"{name}: [{i}]"
        if data.left_out and to_id(get_value(entry, "category_id", where)) in data.left_out:
            skipped += 1
            continue
        fields = check_fields(entry, data, where)
        image_ids.append(fields["image_id"])
        category_ids.append(fields["category_id"])
        boxes.append(fields["bbox"])
        scores.append(to_number(get_value(entry, "score", where), "score", where))
    if skipped:
        names = ", ".join(data.left_out.values())
        message = f"{name}: skipped {skipped} detections of categories that only group others: {names}"
        warnings.warn(message, stacklevel=3)
    return Results(image_ids, category_ids, np.array(boxes, np.float64).reshape(-1, 4), np.array(scores, np.float64))


def _read_columns(content: Sequence[Any], data: Annotations) -> Results | None:
    """Check all detections together, which takes a fifth of the time.

    Returns:
        The detections; None where they must be checked one by one: one is invalid, its category is left out, or its
        values are of other types than JSON's.
    """
    if not _types(content) <= {dict}:
        return None
    keys = ("image_id", "category_id", "bbox", "score")
    try:
        image_ids, category_ids, boxes, scores = ([entry[key] for entry in content] for key in keys)
    except KeyError:
        return None
    if not (_types(image_ids) | _types(category_ids) <= {int, str} and _types(boxes) <= {list, tuple}):
        return None
    if not (set(image_ids) <= data.images.keys() and set(category_ids) <= data.categories.keys()):
        return None
    coordinates = list(chain.from_iterable(boxes))
    if not (set(map(len, boxes)) <= {4} and _types(coordinates) | _types(scores) <= {int, float}):
        return None
    try:
        columns = np.array(coordinates, np.float64).reshape(-1, 4), np.array(scores, np.float64)
    except OverflowError:  # an integer that is too large
        return None
    in_range = (np.abs(columns[0]) <= MAX_COORDINATE).all() and (columns[0][:, 2:] >= 0).all()  # NaN is not
    return Results(image_ids, category_ids, *columns) if in_range and np.isfinite(columns[1]).all() else None


def _types(values: Sequence[Any]) -> set[type]:
    """Return the types of values."""
    return set(map(type, values))
