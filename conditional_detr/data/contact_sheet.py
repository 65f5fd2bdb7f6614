"""A data set at a glance: some of its pictures with their boxes, on one sheet."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from conditional_detr.data.coco import Annotations, Id
from conditional_detr.inference.drawing import READABLE, draw_boxes
from conditional_detr.inference.images import open_picture, to_pil

CELL = (400, 300)  # a picture is fitted into this width and height
COLUMNS = 4
GAP = 8


def draw_sheet(annotations: Annotations, images: str | Path, *, pictures: int = 20, seed: int = 0) -> Image.Image:
    """Draw some pictures of a data set with the boxes that the annotations have, crowds too.

    Args:
        annotations: the annotations.
        images: the folder of the pictures; those that cannot be read are passed over.
        pictures: how many, at most. Every class is on one of them, where they suffice.
        seed: another one, other pictures.

    Returns:
        An RGB picture.

    Raises:
        ValueError: no picture can be read.
    """
    cells: list[tuple[str, Image.Image]] = []
    for image in _order(annotations, seed):
        name = annotations.images[image].get("file_name")
        try:
            picture = to_pil(open_picture(Path(images) / str(name), str(name)))
        except (OSError, ValueError):
            continue
        cells.append((str(name), _draw(annotations, image, picture)))
        if len(cells) == pictures:
            break
    if not cells:
        raise ValueError(f"{images}: expected pictures, got none that can be read")
    return _lay_out(cells)


def _order(data: Annotations, seed: int) -> list[Id]:
    """Return pictures by chance, but first one of each class, the rarest class first."""
    order = [list(data.images)[i] for i in np.random.default_rng(seed).permutation(len(data.images))]
    rank = {image: i for i, image in enumerate(order)}
    of_class: dict[Id, set[Id]] = {}
    for entry in data.objects:
        of_class.setdefault(entry["category_id"], set()).add(entry["image_id"])
    first = {min(pictures, key=rank.__getitem__): None for pictures in sorted(of_class.values(), key=len)}
    return [*first, *(image for image in order if image not in first)]


def _draw(data: Annotations, image: Id, picture: Image.Image) -> Image.Image:
    """Draw a picture, as large as a cell, with its boxes, the small ones on top."""
    scale = min(CELL[0] / picture.width, CELL[1] / picture.height)
    size = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    objects = [entry for entry in data.objects if entry["image_id"] == image]
    objects.sort(key=lambda entry: entry["bbox"][2] * entry["bbox"][3])
    rows = {category: row for row, category in enumerate(sorted(data.categories))}
    boxes: list[Sequence[float]] = []
    for x, y, width, height in (entry["bbox"] for entry in objects):
        boxes.append([scale * side for side in (x, y, x + width, y + height)])
    names = [data.categories[e["category_id"]] + (" (crowd)" if e["iscrowd"] else "") for e in objects]
    return draw_boxes(picture.resize(size), boxes, [rows[e["category_id"]] for e in objects], names, None)


def _lay_out(cells: list[tuple[str, Image.Image]]) -> Image.Image:
    """Lay pictures out in rows, with their names below."""
    columns = min(COLUMNS, len(cells))
    line = READABLE + 6
    step_x, step_y = CELL[0] + GAP, CELL[1] + line + GAP
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(READABLE)
    for i, (name, picture) in enumerate(cells):
        x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
        sheet.paste(picture, (x + (CELL[0] - picture.width) // 2, y + (CELL[1] - picture.height) // 2))
        canvas.text((x + CELL[0] / 2, y + CELL[1] + line / 2), name[-60:], "black", font, "mm")
    return sheet
