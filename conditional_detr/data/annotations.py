"""Which rows of the class head, and which targets, annotations come to; and what stands in the way."""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from conditional_detr.data.coco import Annotations, Id

SMALLEST_SIDE = 0.01  # pixels: in float32, nothing finer can be told from nothing
ROUNDING = 1.0  # pixels that a box may reach outside its image before it is worth a word
SHOWN = 3  # examples in a message

ZERO_AREA = "have zero area, and are left out of the targets"
OUTSIDE = "lie outside their images, and are left out of the targets"
REACHING = f"reach more than {ROUNDING:g} pixel outside their images, and are clipped"
TWICE = "stand twice, the same box of the same class, and both count"
ID_TWICE = "have an id that stood before, and both count"


class Objects(NamedTuple):
    """The objects of a data set that are no crowds, K in all, clipped to their images.

    Attributes:
        boxes: (K, 4) x0 y0 x1 y1 in pixels, float64.
        usable: (K,) bool, whether something of them is left in their images.
        places: which of the annotations' objects they are.
        findings: places of objects by what is to be said of them, one of the sentences above.
    """

    boxes: np.ndarray
    usable: np.ndarray
    places: list[int]
    findings: dict[str, list[int]]


def clip_objects(data: Annotations, sizes: Mapping[Id, tuple[int, int]]) -> Objects:
    """Clip the boxes of objects to their images and find out what is odd about them.

    Args:
        data: the annotations.
        sizes: (height, width) of each image.
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
    masks = {ZERO_AREA: zero_area, OUTSIDE: outside, REACHING: reaching}
    findings = {what: [places[row] for row in np.flatnonzero(mask)] for what, mask in masks.items()}
    kept = [data.objects[place] for place in places]
    boxes_of_class = [(entry["image_id"], entry["category_id"], *entry["bbox"]) for entry in kept]
    findings[TWICE] = [places[row] for row in repeated(boxes_of_class)]
    findings[ID_TWICE] = repeated([entry["id"] for entry in data.objects])
    return Objects(boxes, ~zero_area & ~outside, places, findings)


def misread(data: Annotations, sizes: Mapping[Id, tuple[int, int]]) -> str:
    """Say what boxes look like if all of them together look like something else than x0 y0 w h in pixels, or ''."""
    found = clip_objects(data, sizes)
    given = np.array([data.objects[place]["bbox"] for place in found.places], dtype=np.float64).reshape(-1, 4)
    bounds = np.array([sizes[data.objects[place]["image_id"]][::-1] for place in found.places]).reshape(-1, 2)
    if not len(given):
        return ""
    if given.max() <= 1 and bounds.max() > 1 and given.max() > 0:
        return "looks like fractions of the image: multiply by its width and height"
    ends = given[:, :2] + given[:, 2:]
    corners = (given[:, 2:] > given[:, :2]).all(axis=1) & (given[:, 2:] <= bounds + ROUNDING).all(axis=1)
    if corners.all() and (ends > bounds + ROUNDING).any(axis=1).mean() >= 0.5:
        return "looks like x0 y0 x1 y1: subtract x0 and y0 from x1 and y1"
    if len(found.findings[OUTSIDE]) > len(given) / 2:
        return "looks like boxes of images of another size"
    return ""


def name_rows(
    data: Annotations, class_names: Sequence[str | None] | None
) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """Return the class of each row of the class head, and the data set's id of it.

    Args:
        data: the annotations.
        class_names: the rows that are wanted; None: the annotations' classes, by their ids.

    Returns:
        The names; and an id a row: the annotations' where it is a number, else one that is not taken.

    Raises:
        TypeError: one string in place of names.
        ValueError: a class of the annotations that has no row, or a name that stands twice.
    """
    ids = {name: category for category, name in data.categories.items()}
    if isinstance(class_names, str):
        raise TypeError(f"class_names: expected a sequence of strings, got {class_names!r}")
    if class_names is None:
        class_names = [
            data.categories[category] for category in sorted(data.categories, key=lambda i: (str(type(i)), i))
        ]
    named = [name for name in class_names if name is not None]
    if len(set(named)) < len(named):
        raise ValueError(f"class_names: expected each name once, got {', '.join(named)}")
    if missing := [name for name in ids if name not in named]:
        raise ValueError(
            f"class_names: expected all classes of {data.name}, got {', '.join(named)} without {', '.join(missing)}"
        )
    taken = {category for category in ids.values() if isinstance(category, int)}
    free = (number for number in range(len(class_names) + len(taken)) if number not in taken)
    known = [ids.get(name) if name is not None else None for name in class_names]
    return tuple(class_names), tuple(i if isinstance(i, int) else next(free) for i in known)


def warn_of(data: Annotations, findings: Mapping[str, Sequence[int]]) -> None:
    """Warn of each kind of finding once, with its number and the first of its objects."""
    for what, places in findings.items():
        if places:
            named = ", ".join(name_object(data, place) for place in places[:SHOWN])
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            warnings.warn(
                f"{data.name}: {len(places)} of {len(data.objects)} objects {what}: {named}{more}", stacklevel=4
            )


def warn_of_names(data: Annotations) -> None:
    """Warn of images that are in the annotations more than once."""
    names = [str(entry["file_name"]) for entry in data.images.values()]
    if twice := sorted({names[place] for place in repeated(names)}):
        more = f" and {len(twice) - SHOWN} more" if len(twice) > SHOWN else ""
        message = f"{data.name}: {len(twice)} images are there more than once: {', '.join(twice[:SHOWN])}{more}"
        warnings.warn(message, stacklevel=4)


def name_object(data: Annotations, place: int) -> str:
    """Name one of the annotations' objects: its place in the file, and its image."""
    entry = data.objects[place]
    image = data.images[entry["image_id"]].get("file_name", f"image {entry['image_id']}")
    return f"annotations[{entry['place']}] of {image}"


def repeated(keys: Sequence[Hashable]) -> list[int]:
    """Return the places of keys that stood before; None is no key."""
    seen: set[Hashable] = set()
    places = []
    for place, key in enumerate(keys):
        if key is not None and key in seen:
            places.append(place)
        seen.add(key)
    return places
