"""Draw boxes with class names and scores, and attention maps as heat maps over the image."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from conditional_detr.inference.label_placement import MIN_FONT_SIZE, Rectangle, arrange_labels, shorten
from conditional_detr.system.console import printable

Colour: TypeAlias = tuple[int, int, int]
Font: TypeAlias = ImageFont.FreeTypeFont

HALO_OPACITY = 150  # 0..255, of the thin contrasting line around boxes and labels
# One hexadecimal digit each of red, green and blue, for the 91 classes of the published checkpoint. The first seven
# differ in hue. Each of the others is the saturated colour with the largest distance (in OKLab, which models human
# vision) to all earlier colours, above all to the previous six.
COLOURS = (
    "37f f54 3d4 fd1 a3d 0cd f9c 562 c03 06b af0 c90 8ef e6f 080 a07 68b 62d fa6 0fb f5a 6a0 940 7af 75b fcf be9 d08 "
    "097 b60 b8f 81b 05e bc0 f88 077 a56 bbf 0b9 86f fd9 980 c2b c78 658 0ac 3d9 eb1 862 e10 c6b a0a 19f 8a7 e84 0f7 "
    "7cf f26 96a e9f bc8 b85 e4c 681 08a 846 a8c 7dc fba c54 f7d 9b4 949 b5f 78e 3fe a22 d8b 9e6 b48 074 65e 0bf 4a6 "
    "268 d98 d58 a25 a6d aec 0c6"
)
CELL_SIZE = (240, 300)  # attention: largest width and height of the image in a cell
MAX_COLUMNS = 8  # attention: heads per row; more heads, also those of several layers, wrap to another block of rows
BOX_COLOUR = (64, 224, 255)  # attention: does not occur in the grey image or the heat map
GAP = 6  # attention: pixels between cells
HEAT_COLOURS = np.array([(24, 14, 68), (98, 24, 138), (188, 42, 116), (238, 104, 62), (252, 182, 68), (255, 250, 204)])


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None,
    *,
    line_width: int | None = None,
    font: str | Path | None = None,
) -> Image.Image:
    """Draw boxes with class names and scores.

    Args:
        image: the image, in any mode; it is not changed.
        boxes: K boxes x0 y0 x1 y1 in pixels, the best first: earlier boxes are drawn on top, and their labels are
            placed first.
        labels: K class indices; they set the colours, see :func:`class_colour`.
        names: K class names.
        scores: K scores, drawn with two decimals; None: draw only the names.
        line_width: in pixels; None: by the size of the image.
        font: path of a TrueType font, for scripts that PIL's built-in font does not support.

    Returns:
        A new RGB image of the same size.

    Raises:
        OSError: the font file is missing or invalid.
        ValueError: different numbers of boxes, labels, names and scores, a box that is not four finite numbers, or a
            line width under 1.
    """
    if line_width is not None and line_width < 1:
        raise ValueError(f"line_width: expected at least 1 pixel, got {line_width}")
    scored: Sequence[float | None] = [None] * len(boxes) if scores is None else scores
    counts = [len(boxes), len(labels), len(names), len(scored)]
    if len(set(counts)) > 1:
        raise ValueError(f"expected equal numbers of boxes, labels, names and scores, got {counts}")
    font_at = load_font(font)
    drawn = image.convert("RGB")
    line = line_width or math.ceil(math.sqrt(drawn.width * drawn.height) / 350)
    frames = [_frame(box, line, drawn.size) for box in boxes]
    tags = arrange_labels(frames, list(zip(names, scored, strict=True)), drawn.size, font_at)
    colours = [class_colour(label) for label in labels]
    canvas = ImageDraw.Draw(drawn, "RGBA")
    for frame, colour in reversed(list(zip(frames, colours, strict=True))):
        _outline(canvas, frame, colour, line)
    for (text, size, (x0, y0, x1, y1)), colour in reversed(list(zip(tags, colours, strict=True))):
        if text:
            canvas.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour, outline=(*_contrast(colour), HALO_OPACITY))
            baseline = y0 + 1 + font_at(size).getmetrics()[0]
            canvas.text(((x0 + x1) / 2, baseline), text, _contrast(colour), font_at(size), "ms")
    return drawn


def side_by_side(
    images: Sequence[Image.Image], titles: Sequence[str], *, font: str | Path | None = None
) -> Image.Image:
    """Return an image of images of one size beside each other, each under its title."""
    width, height = images[0].size
    title_font = load_font(font)(max(round(math.sqrt(width * height) / 30), MIN_FONT_SIZE))
    top = sum(title_font.getmetrics()) + 2
    sheet = Image.new("RGB", (len(images) * (width + GAP) - GAP, top + height), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        x = i * (width + GAP)
        canvas.text((x, top - 1), shorten(printable(title), width, title_font.getlength), "black", title_font, "ld")
        sheet.paste(image, (x, top))
    return sheet


def class_colour(label: int) -> Colour:
    """Return the colour of a class index, modulo 91. All 91 differ, those of near indices the most."""
    red, green, blue = (17 * int(digit, 16) for digit in COLOURS.split()[label % 91])
    return red, green, blue


def draw_attention(
    image: Image.Image,
    content: Tensor,
    spatial: Tensor,
    combined: Tensor,
    *,
    box: Sequence[float] | None = None,
    title: str = "",
    font: str | Path | None = None,
) -> Image.Image:
    """Draw the cross-attention maps of one query, as in the paper's figure 1: rows of content, spatial and combined.

    Each map is scaled to its own maximum, so colours are comparable within a map, but not between maps.

    Args:
        image: the image, in any mode; it is not changed.
        content: (M, h, w), softmax of the content part, one map per head.
        spatial: (M, h, w), softmax of the spatial part.
        combined: (M, h, w), softmax of their sum.
        box: x0 y0 x1 y1 in pixels of the image, drawn on each map; None: no box.
        title: one line of text at the top, such as the class name and score.
        font: path of a TrueType font, for scripts that PIL's built-in font does not support.

    Returns:
        An RGB image with one column per head, and a new block of three rows after eight heads.

    Raises:
        OSError: the font file is missing or invalid.
        ValueError: maps of different shapes, empty, negative or not finite; a box that is not four finite numbers.
    """
    rows = {"content": content, "spatial": spatial, "combined": combined}
    for name, maps in rows.items():
        if maps.dim() != 3 or 0 in maps.shape or maps.shape != content.shape:
            raise ValueError(
                f"{name}: expected (M, h, w), not empty and the same for all three maps, got {tuple(maps.shape)}"
            )
        if not bool(torch.isfinite(maps).all()) or float(maps.min()) < 0:
            raise ValueError(f"{name}: expected finite values of at least 0, got {maps.min()}..{maps.max()}")
    scale = min(CELL_SIZE[0] / image.width, CELL_SIZE[1] / image.height)
    width, height = (max(round(scale * side), 1) for side in image.size)
    resized = image.convert("RGB").resize((width, height), reducing_gap=3)
    cells = {name: [overlay_heat(resized, attention) for attention in maps] for name, maps in rows.items()}
    if box is not None:
        frame = _frame([scale * side for side in box], 2, resized.size)
        for cell in (cell for row in cells.values() for cell in row):
            _outline(ImageDraw.Draw(cell, "RGBA"), frame, BOX_COLOUR, 2)
    return _compose_sheet(cells, title, load_font(font)(16))


def overlay_heat(image: Image.Image, attention: Tensor) -> Image.Image:
    """Return a dimmed grey image with a map (h, w) as heat: transparent at zero, pale yellow at the map's maximum."""
    values = attention.detach().float().cpu()[None, None]
    heat = F.interpolate(values, image.size[::-1], mode="bilinear", align_corners=False)[0, 0].numpy()
    heat = heat / max(heat.max(), np.finfo(np.float32).tiny)
    opacity = 0.9 * np.sqrt(heat)[..., None]
    grey = 0.55 * np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((grey * (1 - opacity) + heat_colours(heat) * opacity).round().astype(np.uint8))


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Return colours (..., 3) in 0..255 for values (...) in [0, 1], from dark violet to pale yellow."""
    positions = np.linspace(0, 1, len(HEAT_COLOURS))
    return np.stack([np.interp(values, positions, channel) for channel in HEAT_COLOURS.T], axis=-1)


def load_font(font: str | Path | None) -> Callable[[int], Font]:
    """Load a TrueType font, or PIL's built-in font, and return a function from a size in pixels to the font."""
    try:
        face = cast(Font, ImageFont.load_default(MIN_FONT_SIZE)) if font is None else ImageFont.truetype(font)
    except OSError as error:
        raise OSError(f"{font}: expected a TrueType font file that can be read, got: {error}") from error
    return cache(lambda size: face.font_variant(size=size))


def _frame(box: Sequence[float], line: int, image: tuple[int, int]) -> Rectangle:
    """Return the outer edge of a box's line. The line is outside the box, but inside the image."""
    if len(box) != 4 or not all(math.isfinite(side) for side in box):
        raise ValueError(f"expected a box of four finite numbers x0 y0 x1 y1, got {list(box)}")
    x0, y0, x1, y1 = (round(side) for side in box)
    x0, y0 = min(max(x0 - line, 0), image[0] - 1), min(max(y0 - line, 0), image[1] - 1)
    return x0, y0, max(min(x1 + line, image[0]), x0 + 1), max(min(y1 + line, image[1]), y0 + 1)


def _outline(canvas: ImageDraw.ImageDraw, frame: Rectangle, colour: Colour, line: int) -> None:
    """Draw the line of a box between two thin contrasting lines, so that it is visible on any background."""
    x0, y0, x1, y1 = frame
    halo = max(line // 3, 1)
    outer = (x0 - halo, y0 - halo, x1 - 1 + halo, y1 - 1 + halo)
    canvas.rectangle(outer, outline=(*_contrast(colour), HALO_OPACITY), width=line + 2 * halo)
    canvas.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=line)


def _contrast(colour: Colour) -> Colour:
    """Return black or white, the one with more contrast: by WCAG both are equal at a luminance of 0.179."""
    red, green, blue = ((value / 255) ** 2.2 for value in colour)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else (255, 255, 255)


def _compose_sheet(cells: dict[str, list[Image.Image]], title: str, font: Font) -> Image.Image:
    """Return an image of the cells in named rows and a numbered column per head, with a title and a colour scale."""
    heads, cell = len(cells["content"]), cells["content"][0]
    columns = math.ceil(heads / math.ceil(heads / MAX_COLUMNS))
    text = sum(font.getmetrics()) + 2  # height of a line of text
    step_x = max(cell.width, math.ceil(font.getlength(f"head {heads}"))) + GAP
    step_y = max(cell.height, text) + GAP
    block = text + 3 * step_y + GAP
    left = math.ceil(max(font.getlength(name) for name in cells)) + 3 * GAP
    top = text + 2 * GAP if title else GAP
    bottom = top + math.ceil(heads / columns) * block
    width = max(columns * step_x, 340) + GAP
    drawn = Image.new("RGB", (left + width, bottom + text + GAP), "white")
    canvas = ImageDraw.Draw(drawn)
    canvas.text(
        (left, top - GAP), shorten(printable(" ".join(title.split())), width, font.getlength), "black", font, "ld"
    )
    for row, (name, images) in enumerate(cells.items()):
        for head, image in enumerate(images):
            x = left + head % columns * step_x + (step_x - GAP - cell.width) // 2
            y = top + head // columns * block + text + row * step_y
            drawn.paste(image, (x, y))
            if row == 0:
                canvas.text((x + cell.width / 2, y - 2), f"head {head + 1}", "black", font, "md")
            if head % columns == 0:
                canvas.text((left - GAP, y + cell.height / 2), name, "black", font, "rm")
    scale = heat_colours(np.tile(np.linspace(0, 1, 120), (text - GAP, 1))).astype(np.uint8)
    drawn.paste(Image.fromarray(scale), (left + 15, bottom + GAP // 2))
    canvas.text((left, bottom), "0", "black", font, "la")
    canvas.text((left + 140, bottom), "maximum of each map", "black", font, "la")
    return drawn
