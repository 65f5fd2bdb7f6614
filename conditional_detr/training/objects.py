"""Which objects of annotations become targets, and what stands in the way of the others."""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from conditional_detr.training.coco_files import Annotations, Id

SMALLEST_SIDE = 0.01  # pixels: in float32, nothing finer can be told from nothing
ROUNDING = 1.0  # pixels that a box may reach outside its picture before it is worth a word
SHOWN = 3  # examples in a message

ZERO_AREA = "have zero area, and are left out of the targets"
OUTSIDE = "lie outside their pictures, and are left out of the targets"
REACHING = f"reach more than {ROUNDING:g} pixel outside their pictures, and are clipped"
TWICE = "stand twice, the same box of the same class, and both count"
NAME_TWICE = "pictures have a file_name that stood before, and both count"
ID_TWICE = "have an id that stood before"


class Objects(NamedTuple):
    """The objects of a data set that are no crowds, K in all, clipped to their pictures.

    Attributes:
        boxes: (K, 4) x0 y0 x1 y1 in pixels, float64.
        usable: (K,) bool, whether something of them is left in their pictures.
        places: which of the annotations' objects they are.
        findings: places of objects by what is to be said of them, one of the sentences above.
    """

    boxes: np.ndarray
    usable: np.ndarray
    places: list[int]
    findings: dict[str, list[int]]


def clip_objects(data: Annotations, sizes: Mapping[Id, tuple[int, int]]) -> Objects:
    """Clip the boxes of objects to their pictures and find out what is odd about them.

    Args:
        data: the annotations.
        sizes: (height, width) of each picture.
    """
    places = [place for place, entry in enumerate(data.objects) if not entry["iscrowd"]]
    given = np.array([data.objects[place]["bbox"] for place in places], dtype=np.float64).reshape(-1, 4)
    bounds = np.array([sizes[data.objects[place]["image_id"]][::-1] for place in places], dtype=np.float64)
    bounds = np.tile(bounds.reshape(-1, 2), 2)  # (K, 4): width, height, width, height
    corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)
    boxes = np.clip(corners, 0, bounds)
    zero_area = (given[:, 2:] < SMALLEST_SIDE).any(axis=1)
    outside = ~zero_area & (boxes[:, 2:] - boxes[:, :2] < SMALLEST_SIDE).any(axis=1)
    reaching = ~zero_area & ~outside & (np.abs(corners - boxes) > ROUNDING).any(axis=1)
    masks = {ZERO_AREA: zero_area, OUTSIDE: outside, REACHING: reaching, TWICE: _repeated(data, places)}
    findings = {what: [places[row] for row in np.flatnonzero(mask)] for what, mask in masks.items()}
    return Objects(boxes, ~zero_area & ~outside, places, findings)


def misread(data: Annotations, sizes: Mapping[Id, tuple[int, int]]) -> str:
    """Say what boxes look like if all of them together look like something else than x0 y0 w h in pixels, or ''."""
    found = clip_objects(data, sizes)
    given = np.array([data.objects[place]["bbox"] for place in found.places], dtype=np.float64).reshape(-1, 4)
    bounds = np.array([sizes[data.objects[place]["image_id"]][::-1] for place in found.places]).reshape(-1, 2)
    if not len(given):
        return ""
    if given.max() <= 1 and bounds.max() > 1 and given.max() > 0:
        return "looks like fractions of the picture: multiply by its width and height"
    ends = given[:, :2] + given[:, 2:]
    corners = (given[:, 2:] > given[:, :2]).all(axis=1) & (given[:, 2:] <= bounds + ROUNDING).all(axis=1)
    if corners.all() and (ends > bounds + ROUNDING).any(axis=1).mean() >= 0.5:
        return "looks like x0 y0 x1 y1: subtract x0 and y0 from x1 and y1"
    if len(found.findings[OUTSIDE]) > len(given) / 2:
        return "looks like boxes of pictures of another size"
    return ""


def warn_of(data: Annotations, findings: Mapping[str, Sequence[int]]) -> None:
    """Warn of each kind of finding once, with its number and the first of its objects."""
    for what, places in findings.items():
        if places:
            message = f"{data.name}: {len(places)} of {len(data.objects)} objects {what}: {name_objects(data, places)}"
            warnings.warn(message, stacklevel=3)


def name_objects(data: Annotations, places: Sequence[int]) -> str:
    """Name the first of some objects: their place in the file and their picture."""
    named = []
    for place in places[:SHOWN]:
        entry = data.objects[place]
        picture = data.images[entry["image_id"]].get("file_name", f"picture {entry['image_id']}")
        named.append(f"annotations[{entry['place']}] of {picture}")
    return ", ".join(named) + (f" and {len(places) - SHOWN} more" if len(places) > SHOWN else "")


def _repeated(data: Annotations, places: Sequence[int]) -> np.ndarray:
    """Tell which objects stood before: the same picture, class and box."""
    seen = set()
    repeated = np.zeros(len(places), dtype=bool)
    for row, place in enumerate(places):
        entry = data.objects[place]
        key = (entry["image_id"], entry["category_id"], *entry["bbox"])
        repeated[row] = key in seen
        seen.add(key)
    return repeated
