"""A data set of our own: shapes on textured grounds, for where nothing can be downloaded.

Every image follows from a seed and its index alone. Shapes have textures of their own, any size and turn, and lie
over each other; a box is around what is visible of its shape, and no shape is mostly hidden.
"""

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from conditional_detr.system.atomic_files import write_atomically

CLASS_NAMES = ("disc", "square", "triangle", "star", "ring", "cross")
SIZE = (192, 256)  # height and width of an image
MOST_OBJECTS = 8
LEAST_VISIBLE = 0.5  # of a shape; what would hide more of it is not drawn
_FINER = 3  # masks are drawn so many times larger and averaged: smooth edges
_RADII = 0.06, 0.35  # of the image's shorter side
_NOISE = 1.0, 6.0  # standard deviation, of 255
_PATTERNS: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: np.zeros_like(u),  # plain
    lambda u, v: np.tanh(3 * np.sin(u)),  # stripes
    lambda u, v: np.tanh(4 * np.sin(u) * np.sin(v)),  # checks
    lambda u, v: np.tanh(4 * (np.cos(u) + np.cos(v) - 1)),  # dots
)


class _Shape(NamedTuple):
    label: int
    visible: np.ndarray  # (H, W) bool
    area: int  # pixels, before others came to lie on it


def draw_image(seed: int, index: int, *, size: tuple[int, int] = SIZE) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Draw an image with one to eight shapes.

    Args:
        seed: another one, other images.
        index: which of the seed's images.
        size: height and width in pixels, each at least 64.

    Returns:
        The image, in RGB; boxes (T, 4) x0 y0 x1 y1 around the visible pixels, float64; labels (T,) int64, places in
        ``CLASS_NAMES``.

    Raises:
        ValueError: a size under 64 pixels, a negative seed or index.
    """
    if min(size) < 64 or min(seed, index) < 0:
        got = f"{size[0]} x {size[1]}, {seed} and {index}"
        raise ValueError(f"expected sides of at least 64 pixels, seed and index of at least 0, got {got}")
    random = np.random.default_rng((seed, index))
    pixels = _texture(random, size, _colour(random), 40, min(size))
    shapes: list[_Shape] = []
    for _ in range(int(random.integers(1, MOST_OBJECTS + 1))):
        label = int(random.integers(len(CLASS_NAMES)))
        mask = _mask(random, CLASS_NAMES[label], size)
        covered = mask > 0.5
        beneath = [shape._replace(visible=shape.visible & ~covered) for shape in shapes]
        if any(shape.visible.sum() < LEAST_VISIBLE * shape.area for shape in beneath):
            continue
        shapes = [*beneath, _Shape(label, covered, int(covered.sum()))]
        pixels = pixels * (1 - 0.35 * _shadow(mask))[..., None]
        colour = _colour(random, unlike=pixels[covered].mean(axis=0))
        x0, y0, x1, y1 = _box(mask > 0)
        fill = _texture(random, (y1 - y0, x1 - x0), colour, 25, min(size))
        pixels[y0:y1, x0:x1] += mask[y0:y1, x0:x1, None] * (fill - pixels[y0:y1, x0:x1])
    pixels += random.normal(0, random.uniform(*_NOISE), pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    labels = np.array([shape.label for shape in shapes], dtype=np.int64)
    return image, np.array([_box(shape.visible) for shape in shapes], dtype=np.float64), labels


def index_in(split: str, place: int) -> int:
    """Return the index under which :func:`draw_image` draws one of the images, from 0, of a split."""
    return (zlib.crc32(split.encode()) << 32) + place


def write_shapes(
    folder: str | Path,
    images: int,
    *,
    seed: int,
    split: str,
    size: tuple[int, int] = SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a data set in COCO's form: images into ``folder/split``, and ``folder/instances_split.json``.

    Args:
        folder: where it goes; made if it is not there.
        images: how many.
        seed: another one, other images.
        split: such as "train" or "val": no image of one is in another.
        size: height and width of the images.
        progress: called with the number of images written and of all.

    Returns:
        The json's path.

    Raises:
        OSError: something cannot be written.
        ValueError: no image at all, a size under 64 pixels, a negative seed.
    """
    if images < 1:
        raise ValueError(f"images: expected at least 1, got {images}")
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for i in range(images):
        image, boxes, labels = draw_image(seed, index_in(split, i), size=size)
        name = f"{i:06d}.jpg"
        image.save(folder / split / name, quality=92)
        entries.append({"id": i + 1, "file_name": name, "height": image.height, "width": image.width})
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            objects.append(_object(len(objects) + 1, i + 1, label + 1, box))
        if progress is not None:
            progress(i + 1, images)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
    text = json.dumps({"images": entries, "annotations": objects, "categories": categories})
    path = folder / f"instances_{split}.json"
    write_atomically({path: lambda unfinished: unfinished.write_text(text, encoding="utf-8")})
    return path


def _object(number: int, image: int, category: int, box: list[float]) -> dict[str, Any]:
    """Return an object as COCO's json has it."""
    x0, y0, x1, y1 = box
    bbox, area = [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0}


def _outline(name: str) -> np.ndarray:
    """Return the corners (P, 2) of a shape that touches the unit circle."""
    if name == "cross":
        arm = 0.32
        quarter = np.array([(arm, 1), (arm, arm), (1, arm)])
        turn = np.array([(0, -1), (1, 0)])  # a quarter to the right, as rows are multiplied
        return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)]) / math.hypot(1, arm)
    count = {"square": 4, "triangle": 3, "star": 10}.get(name, 72)
    angles = np.arange(count) * 2 * math.pi / count
    radii = np.where(np.arange(count) % 2, 0.42, 1.0) if name == "star" else np.ones(count)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _mask(random: np.random.Generator, name: str, size: tuple[int, int]) -> np.ndarray:
    """Draw how much of each pixel (H, W) a shape of random size, place, turn and stretch covers, in [0, 1]."""
    height, width = size
    low, high = np.log(_RADII)
    radius = math.exp(random.uniform(low, high)) * min(size)
    centre = [random.uniform(0.5 * radius, side - 0.5 * radius) for side in (width, height)]
    turn, stretch = random.uniform(0, 2 * math.pi), math.exp(random.uniform(-0.2, 0.2))
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    corners = _outline(name) * [stretch, 1 / stretch] @ rotation.T * radius
    canvas = Image.new("L", (width * _FINER, height * _FINER))
    draw = ImageDraw.Draw(canvas)
    draw.polygon([tuple(corner) for corner in ((corners + centre) * _FINER).tolist()], fill=255)
    if name == "ring":
        draw.polygon([tuple(corner) for corner in ((corners * 0.55 + centre) * _FINER).tolist()], fill=0)
    return np.asarray(canvas.reduce(_FINER), dtype=np.float64) / 255


def _texture(
    random: np.random.Generator, size: tuple[int, int], colour: np.ndarray, strength: float, unit: int
) -> np.ndarray:
    """Paint a ground (H, W, 3) of about one colour: clouds, with stripes, checks, dots or nothing on them.

    ``unit`` is the number of pixels that the sizes of patterns are shares of.
    """
    y, x = np.mgrid[: size[0], : size[1]] / unit
    clouds = np.sum([_noise(random, size, cells / unit) / cells**0.5 for cells in (3, 8, 24)], axis=0)
    values = clouds[..., None] * random.uniform(0.3, 1.0, 3)
    turn, step = random.uniform(0, math.pi), random.uniform(0.04, 0.2)
    u = 2 * math.pi * (x * math.cos(turn) + y * math.sin(turn)) / step
    v = 2 * math.pi * (y * math.cos(turn) - x * math.sin(turn)) / step
    pattern = _PATTERNS[random.integers(len(_PATTERNS))](u, v)
    values += pattern[..., None] * random.uniform(0.2, 0.7, 3) * random.choice([-1, 1])
    return colour + strength * values


def _noise(random: np.random.Generator, size: tuple[int, int], frequency: float) -> np.ndarray:
    """Return smooth noise (H, W) with about so many hills a pixel along a side."""
    coarse = random.normal(size=[max(round(frequency * side), 2) for side in size])
    image = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float64)


def _colour(random: np.random.Generator, unlike: np.ndarray | None = None) -> np.ndarray:
    """Draw a colour (3,) in 0..255; of eight, the first that is plainly unlike another, or the most unlike."""
    colours = random.uniform(20, 235, (8, 3))
    if unlike is None:
        return colours[0]
    distances = np.linalg.norm(colours - unlike, axis=1)
    return colours[np.argmax(distances > 90) if (distances > 90).any() else np.argmax(distances)]


def _shadow(mask: np.ndarray) -> np.ndarray:
    """Return the soft shadow (H, W) in [0, 1] that a shape throws to the right and down."""
    image = Image.fromarray((mask * 255).round().astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(2.5))
    return np.roll(np.asarray(blurred, dtype=np.float64) / 255, (2, 2), axis=(0, 1))


def _box(visible: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box x0 y0 x1 y1 around a mask's pixels."""
    rows, columns = (np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
