"""Map COCO annotations to class indices and training targets, and collect problems."""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from conditional_detr.data.coco import Annotations
from conditional_detr.data.json_values import Id, shorten_list

MIN_SIDE = 0.01  # pixels: a shorter side is zero within float32's precision
TOLERANCE = 1.0  # pixels that a box may extend outside its image without a warning, for rounding
MAX_EXAMPLES = 3  # in a message

ZERO_AREA = "have zero area and are excluded from the targets"
OUTSIDE = "lie outside their images and are excluded from the targets"
PARTLY_OUTSIDE = f"extend more than {TOLERANCE:g} pixel outside their images and are clipped"
DUPLICATE = "repeat an earlier annotation (same image, category and bbox) and are kept"
GROUPING = "have no annotations and only group others"
DUPLICATE_ID = "repeat the id of an earlier annotation and are kept"


class CheckedBoxes(NamedTuple):
    """The boxes of the K annotations that are not crowds, clipped to their images.

    Attributes:
        boxes: (K, 4) x0 y0 x1 y1 in pixels, float64.
        usable: (K,) bool, True where the clipped box is not empty.
        indices: K indices into the list of annotations.
        problems: indices of annotations, by problem: one of the texts above.
    """

    boxes: np.ndarray
    usable: np.ndarray
    indices: list[int]
    problems: dict[str, list[int]]


def check_boxes(data: Annotations, sizes: Mapping[Id, tuple[int, int]]) -> CheckedBoxes:
    """Clip the boxes of annotations to their images and collect problems.

    Args:
        data: the annotations.
        sizes: (height, width) of each image.

    Returns:
        The clipped boxes of the annotations that are not crowds, and the problems.
    """
    indices, given, bounds = _boxes_and_bounds(data, sizes)
    bounds = np.tile(bounds, 2)  # (K, 4): width, height, width, height
    corners = np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], axis=1)
    boxes = np.clip(corners, 0, bounds)
    zero_area = (given[:, 2:] < MIN_SIDE).any(axis=1)
    outside = ~zero_area & (boxes[:, 2:] - boxes[:, :2] < MIN_SIDE).any(axis=1)
    partly_outside = ~zero_area & ~outside & (np.abs(corners - boxes) > TOLERANCE).any(axis=1)
    masks = {ZERO_AREA: zero_area, OUTSIDE: outside, PARTLY_OUTSIDE: partly_outside}
    problems = {problem: [indices[k] for k in np.flatnonzero(mask)] for problem, mask in masks.items()}
    checked = [data.annotations[i] for i in indices]
    keys = [(annotation["image_id"], annotation["category_id"], *annotation["bbox"]) for annotation in checked]
    problems[DUPLICATE] = [indices[k] for k in duplicates(keys)]
    problems[DUPLICATE_ID] = duplicates([annotation["id"] for annotation in data.annotations])
    return CheckedBoxes(boxes, ~zero_area & ~outside, indices, problems)


def guess_box_format(data: Annotations, sizes: Mapping[Id, tuple[int, int]]) -> str:
    """Return which other format the boxes together seem to have, or '' if they look like x0 y0 w h in pixels."""
    _, given, bounds = _boxes_and_bounds(data, sizes)
    if not len(given):
        return ""
    if given.max() <= 1 and bounds.max() > 1 and given.max() > 0:
        return "looks like fractions of the image: multiply by its width and height"
    ends = given[:, :2] + given[:, 2:]
    corners = (given[:, 2:] > given[:, :2]).all(axis=1) & (given[:, 2:] <= bounds + TOLERANCE).all(axis=1)
    if corners.all() and (ends > bounds + TOLERANCE).any(axis=1).mean() >= 0.5:
        return "looks like x0 y0 x1 y1: subtract x0 and y0 from x1 and y1"
    if len(check_boxes(data, sizes).problems[OUTSIDE]) > len(given) / 2:
        return "looks like boxes of images of another size"
    return ""


def map_classes(
    data: Annotations, class_names: Sequence[str | None] | None
) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """Return the class name and the category id of each row of the class head.

    Args:
        data: the annotations.
        class_names: the class names in the wanted order, None for an unused row. Default: the categories of the
            annotations, sorted by id.

    Returns:
        The class names; and one category id per class: that of the annotations if it is an integer, else an unused
        one.

    Raises:
        TypeError: class_names is a single string.
        ValueError: class_names lacks a category of the annotations or has duplicates.
    """
    ids = {name: category_id for category_id, name in data.categories.items()}
    if isinstance(class_names, str):
        raise TypeError(f"class_names: expected a sequence of strings, got {class_names!r}")
    if class_names is None:
        class_names = [data.categories[i] for i in sorted(data.categories, key=lambda i: (str(type(i)), i))]
    used = [name for name in class_names if name is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"class_names: expected distinct names, got {shorten_list(used)}")
    known = set(used)
    if missing := [name for name in ids if name not in known]:
        raise ValueError(
            f"class_names: expected all categories of {data.name}, got {shorten_list(used)}"
            f" without {shorten_list(missing)}"
        )
    integer_ids = {i for i in ids.values() if isinstance(i, int)}
    free_ids = (i for i in range(len(class_names) + len(integer_ids)) if i not in integer_ids)
    given_ids = [ids.get(name) if name is not None else None for name in class_names]
    return tuple(class_names), tuple(i if isinstance(i, int) else next(free_ids) for i in given_ids)


def warn_of_problems(data: Annotations, problems: Mapping[str, Sequence[int]]) -> None:
    """Warn once per kind of problem, with the number of annotations and the first of them."""
    for problem, indices in problems.items():
        if indices:
            examples = ", ".join(describe_annotation(data, i) for i in indices[:MAX_EXAMPLES])
            more = f" and {len(indices) - MAX_EXAMPLES} more" if len(indices) > MAX_EXAMPLES else ""
            total = len(data.annotations)
            message = f"{data.name}: {len(indices)} of {total} annotations {problem}: {examples}{more}"
            warnings.warn(message, stacklevel=4)


def warn_of_left_out_categories(data: Annotations, *, stacklevel: int = 3) -> None:
    """Warn of categories that only group others and are no classes."""
    if data.left_out:
        names = shorten_list(map(repr, data.left_out.values()))
        message = f"{data.name}: left out {len(data.left_out)} categories that {GROUPING}: {names}"
        warnings.warn(message, stacklevel=stacklevel)


def count_unusable(data: Annotations) -> str:
    """Describe annotations none of which can be trained on, for messages."""
    count, crowds = len(data.annotations), sum(annotation["iscrowd"] for annotation in data.annotations)
    if not count:
        return "none"
    if crowds == count:
        return f"{count}, all of them crowds"
    return f"{count}: {crowds} crowds, and {count - crowds} with zero area or outside their images"


def warn_of_duplicate_images(data: Annotations) -> None:
    """Warn of image files that the annotations list more than once."""
    names = [str(info["file_name"]) for info in data.images.values()]
    if repeated := sorted({names[i] for i in duplicates(names)}):
        more = f" and {len(repeated) - MAX_EXAMPLES} more" if len(repeated) > MAX_EXAMPLES else ""
        examples = ", ".join(repeated[:MAX_EXAMPLES])
        message = f"{data.name}: {len(repeated)} images are listed more than once: {examples}{more}"
        warnings.warn(message, stacklevel=4)


def describe_annotation(data: Annotations, index: int) -> str:
    """Return an annotation's position in the file and the name of its image, for messages."""
    annotation = data.annotations[index]
    image_id = annotation["image_id"]
    return f"annotations[{annotation['index']}] of {data.images[image_id].get('file_name', f'image {image_id}')}"


def duplicates(keys: Sequence[Hashable]) -> list[int]:
    """Return the indices of keys that occur earlier in the sequence; None is not a key."""
    seen: set[Hashable] = set()
    indices = []
    for i, key in enumerate(keys):
        if key is not None and key in seen:
            indices.append(i)
        seen.add(key)
    return indices


def _boxes_and_bounds(
    data: Annotations, sizes: Mapping[Id, tuple[int, int]]
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return the indices of the annotations that are not crowds, their boxes (K, 4) and their images' (K, 2) w h."""
    indices = [i for i, annotation in enumerate(data.annotations) if not annotation["iscrowd"]]
    boxes = np.array([data.annotations[i]["bbox"] for i in indices], dtype=np.float64).reshape(-1, 4)
    bounds = np.array([sizes[data.annotations[i]["image_id"]][::-1] for i in indices], dtype=np.float64)
    return indices, boxes, bounds.reshape(-1, 2)
