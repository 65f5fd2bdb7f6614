"""Boxes that an annotation program writes as they were before a rotation."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from conditional_detr.data.json_values import to_plain

if TYPE_CHECKING:
    from conditional_detr.data.coco import Annotations

Rotated: TypeAlias = Literal["box", "hull"]
"""What to use of an annotation whose attributes rotate its box: the box before the rotation, or the upright box around
the rotated one."""

ROTATED = "are rotated by their attributes, and bbox is their box before the rotation"


def rotation_of(entry: Mapping[str, Any]) -> float:
    """Return the rotation of an annotation's box in degrees, in [0, 360); 0 if it has none.

    It is under ``rotation`` in the annotation, or in its ``attributes``, as CVAT writes it.
    """
    for holder in (entry.get("attributes"), entry):
        value = to_plain(holder.get("rotation")) if isinstance(holder, Mapping) else None
        try:
            degrees = 0.0 if value is None or isinstance(value, bool) else float(value) % 360
        except (TypeError, ValueError, OverflowError):  # an attribute of the user's own, which is not an angle
            continue
        if 1e-6 < degrees < 360 - 1e-6:
            return degrees
    return 0.0


def rotated_indices(data: "Annotations") -> list[int]:
    """Return the indices of the annotations whose box is the one before a rotation."""
    return [i for i, annotation in enumerate(data.annotations) if "rotation" in annotation]


def choose_boxes(data: "Annotations", rotated: Rotated) -> "Annotations":
    """Return annotations with the chosen box where attributes rotate one.

    Args:
        data: the annotations.
        rotated: "box", the box before the rotation; or "hull", the smallest upright box around the rotated one. A box
            turns about its centre. Its area stays that of the rotated box.

    Raises:
        ValueError: rotated is unknown.
    """
    if rotated not in get_args(Rotated):
        raise ValueError(f"rotated: expected 'box' or 'hull', got {rotated!r}")
    if rotated == "box":
        return data
    annotations = []
    for annotation in data.annotations:
        upright = {key: value for key, value in annotation.items() if key != "rotation"}
        if "rotation" in annotation:
            upright["bbox"] = _hull(annotation["bbox"], annotation["rotation"])
        annotations.append(upright)
    return replace(data, annotations=annotations)


def _hull(bbox: list[float], degrees: float) -> list[float]:
    """Return the upright box [x0, y0, w, h] around a box that turns about its centre."""
    x, y, width, height = bbox
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    hull_width, hull_height = width * cos + height * sin, width * sin + height * cos
    return [x + (width - hull_width) / 2, y + (height - hull_height) / 2, hull_width, hull_height]
