"""Draw some images of a dataset with their boxes on one contact sheet."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_convert

from conditional_detr.data.coco import Annotations
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.json_values import Id
from conditional_detr.inference.drawing import draw_boxes
from conditional_detr.inference.images import open_image, to_pil
from conditional_detr.inference.label_placement import MIN_FONT_SIZE
from conditional_detr.system.console import printable

CELL_SIZE = (400, 300)  # the maximum width and height of an image
COLUMNS = 4
GAP = 8


def draw_sheet(data: Annotations, images: str | Path, *, count: int = 20, seed: int = 0) -> Image.Image:
    """Draw some images of a dataset with their annotated boxes, crowds included.

    Args:
        data: the annotations.
        images: the folder of the images. Images that cannot be read are skipped.
        count: the maximum number of images. Every class is in one of them if the number suffices.
        seed: another seed selects other images.

    Returns:
        An RGB image.

    Raises:
        ValueError: no image can be read.
    """
    cells: list[tuple[str, Image.Image]] = []
    for image_id in _random_order(data, seed):
        name = data.images[image_id].get("file_name")
        try:
            image = to_pil(open_image(Path(images) / str(name), str(name)))
        except (OSError, ValueError):
            continue
        cells.append((str(name), _draw_cell(data, image_id, image)))
        if len(cells) == count:
            break
    if not cells:
        raise ValueError(f"{images}: expected images, got none that can be read")
    return _arrange(cells)


def draw_augmented(data: CocoData, *, count: int = 5) -> Image.Image:
    """Draw some images of a dataset as training augments them, a row an image, with the boxes that are kept.

    Args:
        data: the dataset, with its augmentation and seed.
        count: the maximum number of images. Every class is in one of them if the number suffices. Images that cannot
            be read are skipped.

    Returns:
        An RGB image, whose columns are epochs.

    Raises:
        ValueError: no image can be read.
    """
    index_of = {image_id: index for index, image_id in enumerate(data.annotations.images)}
    rows: list[list[tuple[str, Image.Image]]] = []
    for image_id in _random_order(data.annotations, data.seed):
        index = index_of[image_id]
        row: list[tuple[str, Image.Image]] = []
        try:
            for epoch in range(COLUMNS):
                data.set_epoch(epoch)
                row.append((Path(data.describe(index)).name, _draw_sample(data, index)))
        except (OSError, ValueError):
            continue
        rows.append(row)
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(f"{data.images}: expected images, got none that can be read")
    return _arrange([cell for row in rows for cell in row])


def _draw_sample(data: CocoData, index: int) -> Image.Image:
    """Draw a sample with its boxes at the size of a cell."""
    pixels, target = data[index]
    mean, std = (pixels.new_tensor(part)[:, None, None] for part in (data.preprocessing.mean, data.preprocessing.std))
    colours = ((pixels * std + mean).clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(colours.permute(1, 2, 0).numpy())
    scale = min(CELL_SIZE[0] / image.width, CELL_SIZE[1] / image.height)
    image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
    sides = target["boxes"].new_tensor([image.width, image.height] * 2)
    boxes = (box_convert(target["boxes"], "cxcywh", "xyxy") * sides).tolist()
    labels = target["labels"].tolist()
    return draw_boxes(image, boxes, labels, [str(data.class_names[label]) for label in labels], None)


def _random_order(data: Annotations, seed: int) -> list[Id]:
    """Return the image ids in random order, after one image of each class, the rarest class first."""
    image_ids = list(data.images)
    order = [image_ids[i] for i in np.random.default_rng(seed).permutation(len(image_ids))]
    rank = {image_id: i for i, image_id in enumerate(order)}
    by_category: dict[Id, set[Id]] = {}
    for annotation in data.annotations:
        by_category.setdefault(annotation["category_id"], set()).add(annotation["image_id"])
    first = {min(ids, key=rank.__getitem__): None for ids in sorted(by_category.values(), key=len)}
    return [*first, *(image_id for image_id in order if image_id not in first)]


def _draw_cell(data: Annotations, image_id: Id, image: Image.Image) -> Image.Image:
    """Resize an image to the size of a cell and draw its boxes, the smallest on top."""
    scale = min(CELL_SIZE[0] / image.width, CELL_SIZE[1] / image.height)
    size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    annotations = [annotation for annotation in data.annotations if annotation["image_id"] == image_id]
    annotations.sort(key=lambda annotation: annotation["bbox"][2] * annotation["bbox"][3])
    labels = {category_id: label for label, category_id in enumerate(sorted(data.categories))}
    boxes: list[Sequence[float]] = []
    for x, y, width, height in (annotation["bbox"] for annotation in annotations):
        boxes.append([scale * side for side in (x, y, x + width, y + height)])
    names = [data.categories[a["category_id"]] + (" (crowd)" if a["iscrowd"] else "") for a in annotations]
    return draw_boxes(image.resize(size), boxes, [labels[a["category_id"]] for a in annotations], names, None)


def _arrange(cells: list[tuple[str, Image.Image]]) -> Image.Image:
    """Arrange named images in rows, each with its name below."""
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
        canvas.text((x + CELL_SIZE[0] / 2, y + CELL_SIZE[1] + line / 2), printable(name)[-60:], "black", font, "mm")
    return sheet
