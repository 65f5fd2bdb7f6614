"""Generate a synthetic dataset of shapes on textured backgrounds, without a download.

Every image depends on a seed and its index alone. Shapes have their own textures, random sizes and rotations, and
overlap. A box encloses the visible part of its shape; at least half of each shape is visible.
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
MAX_SHAPES = 8  # per image
MIN_VISIBLE = 0.5  # fraction of a shape; another shape that would hide more of it is not drawn
_SUPERSAMPLING = 3  # masks are drawn this many times larger and averaged, for smooth edges
_RADII = 0.06, 0.35  # minimum and maximum, as fractions of the image's shorter side
_NOISE = 1.0, 6.0  # minimum and maximum standard deviation, for pixel values up to 255
_PATTERNS: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: np.zeros_like(u),  # plain
    lambda u, v: np.tanh(3 * np.sin(u)),  # stripes
    lambda u, v: np.tanh(4 * np.sin(u) * np.sin(v)),  # checks
    lambda u, v: np.tanh(4 * (np.cos(u) + np.cos(v) - 1)),  # dots
)


class _Shape(NamedTuple):
    label: int
    visible: np.ndarray  # (H, W) bool
    area: int  # in pixels, including hidden ones


def draw_image(seed: int, index: int, *, size: tuple[int, int] = SIZE) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Draw an image with one to eight shapes.

    Args:
        seed: another seed gives other images.
        index: the index of the image.
        size: height and width in pixels, each at least 64.

    Returns:
        The image, in RGB; boxes (T, 4) x0 y0 x1 y1 around the visible pixels, float64; labels (T,) int64, indices
        into ``CLASS_NAMES``.

    Raises:
        ValueError: a side is under 64 pixels, or seed or index is negative.
    """
    if min(size) < 64 or min(seed, index) < 0:
        got = f"{size[0]} x {size[1]}, {seed} and {index}"
        raise ValueError(f"expected sides of at least 64 pixels, seed and index of at least 0, got {got}")
    random = np.random.default_rng((seed, index))
    pixels = _texture(random, size, _colour(random), 40, min(size))
    shapes: list[_Shape] = []
    for _ in range(int(random.integers(1, MAX_SHAPES + 1))):
        label = int(random.integers(len(CLASS_NAMES)))
        mask = _mask(random, CLASS_NAMES[label], size)
        covered = mask > 0.5
        lower = [shape._replace(visible=shape.visible & ~covered) for shape in shapes]
        if any(shape.visible.sum() < MIN_VISIBLE * shape.area for shape in lower):
            continue
        shapes = [*lower, _Shape(label, covered, int(covered.sum()))]
        pixels = pixels * (1 - 0.35 * _shadow(mask))[..., None]
        colour = _colour(random, unlike=pixels[covered].mean(axis=0))
        x0, y0, x1, y1 = _box(mask > 0)
        fill = _texture(random, (y1 - y0, x1 - x0), colour, 25, min(size))
        pixels[y0:y1, x0:x1] += mask[y0:y1, x0:x1, None] * (fill - pixels[y0:y1, x0:x1])
    pixels += random.normal(0, random.uniform(*_NOISE), pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    labels = np.array([shape.label for shape in shapes], dtype=np.int64)
    return image, np.array([_box(shape.visible) for shape in shapes], dtype=np.float64), labels


def image_index(split: str, position: int) -> int:
    """Return the index for :func:`draw_image` of the image at a position, from 0, in a split."""
    return (zlib.crc32(split.encode()) << 32) + position


def write_shapes(
    folder: str | Path,
    images: int,
    *,
    seed: int,
    split: str,
    size: tuple[int, int] = SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a synthetic dataset in COCO format: images to ``folder/split``, and ``folder/instances_split.json``.

    Args:
        folder: the target folder; it is created if necessary.
        images: the number of images.
        seed: another seed gives other images.
        split: such as "train" or "val". Different splits have different images.
        size: height and width of the images.
        progress: called with the number of written images, and the total.

    Returns:
        The path of the JSON file.

    Raises:
        OSError: a file cannot be written.
        ValueError: images is less than 1, a side is under 64 pixels, or seed is negative.
    """
    if images < 1:
        raise ValueError(f"images: expected at least 1, got {images}")
    folder = Path(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    image_infos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(images):
        image, boxes, labels = draw_image(seed, image_index(split, i), size=size)
        name = f"{i:06d}.jpg"
        image.save(folder / split / name, quality=92)
        image_infos.append({"id": i + 1, "file_name": name, "height": image.height, "width": image.width})
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            annotations.append(_annotation(len(annotations) + 1, i + 1, label + 1, box))
        if progress is not None:
            progress(i + 1, images)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
    text = json.dumps({"images": image_infos, "annotations": annotations, "categories": categories})
    path = folder / f"instances_{split}.json"
    write_atomically({path: lambda unfinished: unfinished.write_text(text, encoding="utf-8")})
    return path


def _annotation(annotation_id: int, image_id: int, category_id: int, box: list[float]) -> dict[str, Any]:
    """Return an annotation in COCO format."""
    x0, y0, x1, y1 = box
    bbox, area = [x0, y0, x1 - x0, y1 - y0], (x1 - x0) * (y1 - y0)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": bbox,
        "area": area,
        "iscrowd": 0,
    }


def _outline(name: str) -> np.ndarray:
    """Return the corners (P, 2) of a shape inscribed in the unit circle."""
    if name == "cross":
        arm = 0.32
        quarter = np.array([(arm, 1), (arm, arm), (1, arm)])
        rotation = np.array([(0, -1), (1, 0)])  # 90 degrees clockwise, multiplied from the right
        return np.concatenate([quarter @ np.linalg.matrix_power(rotation, k) for k in range(4)]) / math.hypot(1, arm)
    count = {"square": 4, "triangle": 3, "star": 10}.get(name, 72)
    angles = np.arange(count) * 2 * math.pi / count
    radii = np.where(np.arange(count) % 2, 0.42, 1.0) if name == "star" else np.ones(count)
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _mask(random: np.random.Generator, name: str, size: tuple[int, int]) -> np.ndarray:
    """Draw a random shape, rotated and stretched, and return its coverage of each pixel (H, W) in [0, 1]."""
    height, width = size
    low, high = np.log(_RADII)
    radius = math.exp(random.uniform(low, high)) * min(size)
    centre = [random.uniform(0.5 * radius, side - 0.5 * radius) for side in (width, height)]
    angle, stretch = random.uniform(0, 2 * math.pi), math.exp(random.uniform(-0.2, 0.2))
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = _outline(name) * [stretch, 1 / stretch] @ rotation.T * radius
    canvas = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    draw.polygon([tuple(corner) for corner in ((corners + centre) * _SUPERSAMPLING).tolist()], fill=255)
    if name == "ring":
        draw.polygon([tuple(corner) for corner in ((corners * 0.55 + centre) * _SUPERSAMPLING).tolist()], fill=0)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float64) / 255


def _texture(
    random: np.random.Generator, size: tuple[int, int], colour: np.ndarray, strength: float, unit: int
) -> np.ndarray:
    """Return a texture (H, W, 3) around one colour: smooth noise, plain or with stripes, checks or dots.

    Sizes of patterns are fractions of ``unit`` pixels.
    """
    y, x = np.mgrid[: size[0], : size[1]] / unit
    noise = np.sum([_noise(random, size, cells / unit) / cells**0.5 for cells in (3, 8, 24)], axis=0)
    values = noise[..., None] * random.uniform(0.3, 1.0, 3)
    angle, step = random.uniform(0, math.pi), random.uniform(0.04, 0.2)
    u = 2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / step
    v = 2 * math.pi * (y * math.cos(angle) - x * math.sin(angle)) / step
    pattern = _PATTERNS[random.integers(len(_PATTERNS))](u, v)
    values += pattern[..., None] * random.uniform(0.2, 0.7, 3) * random.choice([-1, 1])
    return colour + strength * values


def _noise(random: np.random.Generator, size: tuple[int, int], frequency: float) -> np.ndarray:
    """Return smooth noise (H, W) with about ``frequency`` maxima per pixel along a side."""
    coarse = random.normal(size=[max(round(frequency * side), 2) for side in size])
    image = Image.fromarray(coarse.astype(np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float64)


def _colour(random: np.random.Generator, unlike: np.ndarray | None = None) -> np.ndarray:
    """Return a random colour (3,) in 0..255; with ``unlike``, one that differs clearly from that colour."""
    colours = random.uniform(20, 235, (8, 3))
    if unlike is None:
        return colours[0]
    distances = np.linalg.norm(colours - unlike, axis=1)
    return colours[np.argmax(distances > 90) if (distances > 90).any() else np.argmax(distances)]


def _shadow(mask: np.ndarray) -> np.ndarray:
    """Return a shape's soft shadow (H, W) in [0, 1], shifted to the right and down."""
    image = Image.fromarray((mask * 255).round().astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(2.5))
    return np.roll(np.asarray(blurred, dtype=np.float64) / 255, (2, 2), axis=(0, 1))


def _box(visible: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box x0 y0 x1 y1 around the pixels of a mask."""
    rows, columns = (np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
