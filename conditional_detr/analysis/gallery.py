"""Draw examples of errors: annotations on the left, detections on the right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from conditional_detr.analysis.analysis import Analysis
from conditional_detr.analysis.tide import KINDS
from conditional_detr.data.coco import image_paths
from conditional_detr.inference.drawing import draw_boxes
from conditional_detr.inference.images import open_image, to_pil

CELL = 480  # pixels: the longer side of each of the two halves
GAP = 6
MIN_CONTEXT = 64  # pixels around a single box


@dataclass(frozen=True)
class Example:
    """A drawn example of an error.

    Attributes:
        caption: what it shows.
        image: RGB; annotations on the left, detections above their thresholds on the right.
    """

    caption: str
    image: Image.Image


class _Wanted(NamedTuple):
    """An example to draw: a position in the order of image ids, a box x0 y0 w h to show closely or None, a caption."""

    image: int
    box: np.ndarray | None
    caption: str


def draw_gallery(
    analysis: Analysis, images: str | Path, *, count: int = 12, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[Example]]:
    """Draw the worst images, the largest missed objects and the most confident false positives.

    Args:
        analysis: the analysis.
        images: the folder of the images.
        count: the maximum number of examples of each.
        progress: called with the number of drawn examples, and the total.

    Returns:
        Examples by title.

    Raises:
        OSError: an image cannot be read or does not exist.
        ValueError: an image is not an image file.
    """
    paths = image_paths(analysis.data, images)
    in_order = [paths[image_id] for image_id in sorted(paths)]
    wanted = {title: list(of_title) for title, of_title in _choose(analysis, count).items()}
    total, done = sum(map(len, wanted.values())), 0
    gallery: dict[str, list[Example]] = {title: [] for title in wanted}
    for title, examples in wanted.items():
        for example in examples:
            path = in_order[example.image]
            drawn = _draw(analysis, to_pil(open_image(path, str(path))), example)
            gallery[title].append(Example(f"{path.name}: {example.caption}", drawn))
            done += 1
            if progress is not None:
                progress(done, total)
    return gallery


def _choose(analysis: Analysis, count: int) -> dict[str, Iterator[_Wanted]]:
    """Return what to draw, by title."""
    matches, names = analysis.matches, analysis.names
    annotations, detections = matches.annotations, matches.detections
    return {
        "Worst images": (
            _Wanted(image, None, f"{wrong} false positives, {missed} missed")
            for image, wrong, missed in analysis.worst_images[:count]
        ),
        "Missed objects": (
            _Wanted(int(annotations[g, 0]), annotations[g, 2:6], f"missed {names[int(annotations[g, 1])]}")
            for g in analysis.missed[:count]
        ),
        "Confident false positives": (
            _Wanted(
                int(detections[k, 0]),
                detections[k, 2:6],
                f"{names[int(detections[k, 1])]} {detections[k, 6]:.2f}, error: {KINDS[analysis.errors.kinds[k]]}",
            )
            for k in analysis.false_positives[:count]
        ),
    }


def _draw(analysis: Analysis, image: Image.Image, example: _Wanted) -> Image.Image:
    """Draw annotations and detections of an image, or of the part around a box, side by side."""
    x0, y0, x1, y1 = _part(image, example.box)
    scale = CELL / max(x1 - x0, y1 - y0)
    size = max(round((x1 - x0) * scale), 1), max(round((y1 - y0) * scale), 1)
    part = image.convert("RGB").resize(size, box=(x0, y0, x1, y1))
    matches = analysis.matches
    shown = matches.annotations[:, 0] == example.image, (matches.detections[:, 0] == example.image) & analysis.kept
    halves = []
    for rows, scores in ((matches.annotations[shown[0]], None), (matches.detections[shown[1]], 6)):
        corners = np.column_stack((rows[:, 2:4], rows[:, 2:4] + rows[:, 4:6]))
        visible = (corners[:, :2] < (x1, y1)).all(axis=1) & (corners[:, 2:] > (x0, y0)).all(axis=1)
        rows, corners = rows[visible], (corners[visible] - np.tile((x0, y0), 2)) * scale
        labels = rows[:, 1].astype(int).tolist()
        values = None if scores is None else rows[:, scores].tolist()
        names = [analysis.names[label] for label in labels]
        halves.append(draw_boxes(part, corners.tolist(), labels, names, values))
    both = Image.new("RGB", (2 * size[0] + GAP, size[1]), "white")
    both.paste(halves[0], (0, 0))
    both.paste(halves[1], (size[0] + GAP, 0))
    return both


def _part(image: Image.Image, box: np.ndarray | None) -> tuple[float, float, float, float]:
    """Return the part of an image to show, x0 y0 x1 y1: all of it, or a box with as much again on each side."""
    if box is None:
        return 0, 0, image.width, image.height
    x, y, width, height = np.clip(box, 0, max(image.size)).tolist()
    margin_x, margin_y = max(width, MIN_CONTEXT), max(height, MIN_CONTEXT)
    x0, y0 = max(min(x, image.width - 1) - margin_x, 0), max(min(y, image.height - 1) - margin_y, 0)
    return x0, y0, min(x + width + margin_x, image.width), min(y + height + margin_y, image.height)
