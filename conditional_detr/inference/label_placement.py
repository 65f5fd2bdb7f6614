"""Fit labels of boxes to the image, and place them so that they hide neither each other nor small objects."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import TypeAlias

import numpy as np
from PIL import ImageFont

from conditional_detr.system.console import printable

Rectangle: TypeAlias = tuple[int, int, int, int]  # x0 y0 x1 y1 in whole pixels; x1 and y1 are exclusive

MIN_FONT_SIZE = 11  # pixels: the smallest size that is easy to read
_MOST_CELLS = 256  # along the longer side of the image
_LARGEST_HIDDEN_SHARE = 0.5  # of any box, by one label


def arrange_labels(
    frames: Sequence[Rectangle],
    scored_names: Sequence[tuple[str, float | None]],
    image: tuple[int, int],
    font_at: Callable[[int], ImageFont.FreeTypeFont],
) -> list[tuple[str, int, Rectangle]]:
    """Return the text, font size and rectangle of each label.

    Where labels would hide each other or objects, all get a smaller font. A label for which that is not enough loses
    its score, then its whole text: on a small or crowded image, the objects stay visible.

    Args:
        frames: K boxes, the best first.
        scored_names: K class names, each with its score or None.
        image: (width, height) of the image.
        font_at: returns the font of a size in pixels.
    """

    def width(text: str, size: int) -> int:
        return math.ceil(font_at(size).getlength(text)) + 2 * (size // 3)

    def height(size: int) -> int:
        return sum(font_at(size).getmetrics()) + 2

    largest = max(round(math.sqrt(image[0] * image[1]) / 44), MIN_FONT_SIZE + 1)
    for size in (max(round(share * largest), MIN_FONT_SIZE) for share in (1, 0.85, 0.7)):
        labels = [
            [
                fit_label(name, shown, image[0], size, width)
                for shown in dict.fromkeys((score, None if name else score))
            ]
            for name, score in scored_names
        ]
        labels = [[(text if height(fitted) <= image[1] else "", fitted) for text, fitted in one] for one in labels]
        sizes = [[(width(text, fitted), height(fitted)) if text else (0, 0) for text, fitted in one] for one in labels]
        placed = place_labels(frames, sizes, image)
        if all(chosen == 0 for chosen, _ in placed):
            break
    return [
        (*(("", size) if chosen is None else one[chosen]), rectangle)
        for one, (chosen, rectangle) in zip(labels, placed, strict=True)
    ]


def fit_label(
    name: str, score: float | None, max_width: float, size: int, measure: Callable[[str, int], float]
) -> tuple[str, int]:
    """Return the text and font size of a label that fits into a width.

    If the label is too wide, first the font size decreases to ``MIN_FONT_SIZE``, then the score is dropped, then the
    name is shortened, if necessary to nothing.

    Args:
        name: class name.
        score: score; None: only the name.
        max_width: largest width in pixels.
        size: largest font size in pixels.
        measure: returns the width of a text at a font size.
    """
    name = printable(" ".join(name.split()))
    text = name if score is None else f"{name} {score:.2f}".strip()
    for smaller in range(size, MIN_FONT_SIZE - 1, -1):
        if measure(text, smaller) <= max_width:
            return text, smaller
    return shorten(name, max_width, lambda part: measure(part, MIN_FONT_SIZE)), MIN_FONT_SIZE


def place_labels(
    boxes: Sequence[Rectangle], sizes: Sequence[Sequence[tuple[int, int]]], image: tuple[int, int]
) -> list[tuple[int | None, Rectangle]]:
    """Return a place for the label of each box; the first are placed first.

    Each rectangle is next to or inside its box, and inside the image. A candidate must not cover an earlier label, and
    not more than half of any box. Of the candidates, the one that covers the smallest shares of all boxes is used.

    Args:
        boxes: K boxes inside the image.
        sizes: K times the sizes (width, height) that the label may have, the best first.
        image: (width, height) of the image.

    Returns:
        K times the index of the first size that has a place, and the rectangle; None and an empty one if none has.
    """
    count = len(boxes)
    taken = np.array([*boxes, *boxes]).reshape(-1, 4)  # the boxes, then the labels that are placed
    areas = (taken[:count, 2:] - taken[:count, :2]).prod(1).clip(min=1)
    lengths = np.sqrt(areas).sum() + sum(math.sqrt(width * height) for (width, height), *_ in sizes)
    grid = _Grid(max(round(lengths / max(2 * count, 1)), max(image) // _MOST_CELLS, 1))
    for i, box in enumerate(boxes):
        grid.add(i, box)
    placed: list[tuple[int | None, Rectangle]] = []
    for i, (box, allowed) in enumerate(zip(boxes, sizes, strict=True)):
        placed.append((None, (*box[:2], *box[:2])))
        for number, size in enumerate(allowed):
            candidates = _candidates(box, size, image)
            near = grid.near(candidates.tolist())
            near_boxes = int(np.searchsorted(near, count))
            shared = _overlap(candidates, taken[near])
            # shares, not pixels: a label easily hides a small object; later candidates have a small penalty
            shares = shared[:, :near_boxes] / areas[near[:near_boxes]]
            hidden = shares.sum(1) + 0.05 * np.arange(len(candidates))
            hidden[shared[:, near_boxes:].any(1) | (shares > _LARGEST_HIDDEN_SHARE).any(1)] = math.inf
            best = int(hidden.argmin())
            if hidden[best] < math.inf:
                taken[count + i] = candidates[best]
                grid.add(count + i, candidates[best].tolist())
                x0, y0, x1, y1 = candidates[best].tolist()
                placed[-1] = number, (x0, y0, x1, y1)
                break
    return placed


class _Grid:
    """Rectangles by the cells of a grid that they touch: comparing all with all would take quadratic time.

    Args:
        side: pixels of a cell's side, about that of most rectangles.
    """

    def __init__(self, side: int) -> None:
        self._side = side
        self._cells: defaultdict[tuple[int, int], int] = defaultdict(int)  # a set of indices, as bits

    def add(self, index: int, rectangle: Sequence[int]) -> None:
        """Add a rectangle under an index."""
        for cell in self._touched(rectangle):
            self._cells[cell] |= 1 << index

    def near(self, rectangles: Iterable[Sequence[int]]) -> np.ndarray:
        """Return the indices of all rectangles that may overlap one of the given ones, in increasing order."""
        found = 0
        for cell in {cell for rectangle in rectangles for cell in self._touched(rectangle)}:
            found |= self._cells.get(cell, 0)
        bits = found.to_bytes(found.bit_length() // 8 + 1, "little")
        return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))

    def _touched(self, rectangle: Sequence[int]) -> Iterator[tuple[int, int]]:
        x0, y0, x1, y1 = (side // self._side for side in rectangle)
        return product(range(x0, x1 + 1), range(y0, y1 + 1))


def _candidates(box: Rectangle, size: tuple[int, int], image: tuple[int, int]) -> np.ndarray:
    """Return rectangles (P, 4) for a label inside the image, the best first."""
    (x0, y0, x1, y1), (width, height) = box, size
    last_x, last_y = image[0] - width, image[1] - height
    left, right, middle = (min(max(x, 0), last_x) for x in (x0, x1 - width, (x0 + x1 - width) // 2))
    above, inside, low, below = y0 - height, y0, y1 - height, y1
    positions = [(left, above), (left, inside), (right, above), (left, below), (right, below)]
    positions += [(x, y) for x in (x1, x0 - width) for y in (inside, low)]
    positions += [(middle, above), (middle, below), (right, inside), (left, low), (right, low), (middle, inside)]
    inner = [(x, y) for x, y in positions if 0 <= x <= last_x and 0 <= y <= last_y]
    corners = np.array([*inner, (left, min(inside, last_y))])
    return np.concatenate([corners, corners + np.array(size)], axis=1)


def _overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the intersection areas (A, B) of rectangles (A, 4) and (B, 4)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return (high - low).clip(min=0).prod(-1)


def shorten(text: str, max_width: float, measure: Callable[[str], float]) -> str:
    """Shorten a text with an ellipsis to a width; return an empty string if not even the ellipsis fits."""
    if measure(text) <= max_width:
        return text
    most = min(len(text) - 1, int(max_width))  # a character is about a pixel wide at least
    parts = (text[:end].rstrip() + "\N{HORIZONTAL ELLIPSIS}" for end in range(most, -1, -1))
    return next((part for part in parts if measure(part) <= max_width), "")
