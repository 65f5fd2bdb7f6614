"""A data set at a glance: some of its images with their boxes, on one sheet."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from conditional_detr.data.coco import Annotations, Id
from conditional_detr.inference.drawing import MIN_FONT_SIZE, draw_boxes
from conditional_detr.inference.images import open_image, to_pil

CELL_SIZE = (400, 300)  # an image is fitted into this width and height
COLUMNS = 4
GAP = 8


def draw_sheet(annotations: Annotations, images: str | Path, *, count: int = 20, seed: int = 0) -> Image.Image:
    """Draw some images of a data set with the boxes that the annotations have, crowds too.

    Args:
        annotations: the annotations.
        images: the folder of the images; those that cannot be read are passed over.
        count: how many, at most. Every class is on one of them, where they suffice.
        seed: another one, other images.

    Returns:
        An RGB image.

    Raises:
        ValueError: no image can be read.
    """
    cells: list[tuple[str, Image.Image]] = []
    for image_id in _order(annotations, seed):
        name = annotations.images[image_id].get("file_name")
        try:
            image = to_pil(open_image(Path(images) / str(name), str(name)))
        except (OSError, ValueError):
            continue
        cells.append((str(name), _draw(annotations, image_id, image)))
        if len(cells) == count:
            break
    if not cells:
        raise ValueError(f"{images}: expected images, got none that can be read")
    return _lay_out(cells)


def _order(data: Annotations, seed: int) -> list[Id]:
    """Return images by chance, but first one of each class, the rarest class first."""
    order = [list(data.images)[i] for i in np.random.default_rng(seed).permutation(len(data.images))]
    rank = {image_id: i for i, image_id in enumerate(order)}
    of_class: dict[Id, set[Id]] = {}
    for entry in data.objects:
        of_class.setdefault(entry["category_id"], set()).add(entry["image_id"])
    first = {min(images, key=rank.__getitem__): None for images in sorted(of_class.values(), key=len)}
    return [*first, *(image_id for image_id in order if image_id not in first)]


def _draw(data: Annotations, image_id: Id, image: Image.Image) -> Image.Image:
    """Draw an image, as large as a cell, with its boxes, the small ones on top."""
    scale = min(CELL_SIZE[0] / image.width, CELL_SIZE[1] / image.height)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    objects = [entry for entry in data.objects if entry["image_id"] == image_id]
    objects.sort(key=lambda entry: entry["bbox"][2] * entry["bbox"][3])
    rows = {category: row for row, category in enumerate(sorted(data.categories))}
    boxes: list[Sequence[float]] = []
    for x, y, width, height in (entry["bbox"] for entry in objects):
        boxes.append([scale * side for side in (x, y, x + width, y + height)])
    names = [data.categories[e["category_id"]] + (" (crowd)" if e["iscrowd"] else "") for e in objects]
    return draw_boxes(image.resize(size), boxes, [rows[e["category_id"]] for e in objects], names, None)


def _lay_out(cells: list[tuple[str, Image.Image]]) -> Image.Image:
    """Lay images out in rows, with their names below."""
    columns = min(COLUMNS, len(cells))
    line = MIN_FONT_SIZE + 6
    step_x, step_y = CELL_SIZE[0] + GAP, CELL_SIZE[1] + line + GAP
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(MIN_FONT_SIZE)
    for i, (name, image) in enumerate(cells):
        x, y = GAP + i % columns * step_x, GAP + i // columns * step_y
        sheet.paste(image, (x + (CELL_SIZE[0] - image.width) // 2, y + (CELL_SIZE[1] - image.height) // 2))
        canvas.text((x + CELL_SIZE[0] / 2, y + CELL_SIZE[1] + line / 2), name[-60:], "black", font, "mm")
    return sheet
