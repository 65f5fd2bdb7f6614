"""Detect objects on views of an image: on overlapping tiles of a large one, and mirrored or at another scale."""

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conditional_detr.inference.batches import WORKERS, run_batches
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.downloads import Limits
from conditional_detr.inference.images import size_of, to_pil
from conditional_detr.inference.merging import merge_views
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.inference.postprocessing import Postprocessing
from conditional_detr.inference.preparation import Item, PreparedImage, prepare_by, read_images
from conditional_detr.inference.preprocessing import open_by_backend, planes_of, resize
from conditional_detr.inference.sources import ImageSource
from conditional_detr.modeling.detection_model import DetectionModel
from conditional_detr.modeling.metadata import Preprocessing

DEFAULT_OVERLAP = 0.25
SMALLEST_TILE = 32
"""Smallest side of a tile in pixels."""

_SCALE = 0.8  # of the additional scale; smaller ones cost less than larger ones
_IMAGES_AHEAD = 2  # opened at full size


class Tiling(NamedTuple):
    """How an image is divided and repeated, validated.

    Attributes:
        tile: height and width of a tile in pixels of the image; None: the whole image.
        overlap: least overlap of neighbouring tiles, as a fraction of the tile's side.
        augment: whether to detect also on the mirrored image, and on both at a smaller scale.
    """

    tile: tuple[int, int] | None
    overlap: float
    augment: bool

    def settings(self) -> dict[str, object]:
        """Return what decides the detections, for results to record."""
        tiles = {} if self.tile is None else {"tile": list(self.tile), "overlap": self.overlap}
        return {**tiles, **({"augment": True} if self.augment else {})}


class View(NamedTuple):
    """A part of an image as the model sees it.

    Attributes:
        box: x0 y0 x1 y1 in whole pixels of the image.
        mirrored: whether left and right are exchanged.
        scale: of the size after resizing.
    """

    box: tuple[int, int, int, int]
    mirrored: bool
    scale: float


def make_tiling(
    tile: int | tuple[int, int] | None = None, overlap: float | None = None, *, augment: bool = False
) -> Tiling | None:
    """Validate the options of a call.

    Args:
        tile: side of a square tile, or height and width, in pixels of the image, at least 32; None: no tiles.
        overlap: least overlap of neighbouring tiles, as a fraction of their side, above 0 and up to 0.5; None: 0.25.
        augment: whether to detect also on the mirrored image, and on both at a smaller scale.

    Returns:
        The tiling; None if the image is to be detected on as a whole, once.

    Raises:
        TypeError: ``tile`` is neither an integer nor two of them, or ``overlap`` is no number.
        ValueError: a number out of range, or an overlap without tiles.
    """
    if tile is None and overlap is not None:
        raise ValueError(f"overlap: expected a tile with it, got {overlap} alone")
    given: Any = DEFAULT_OVERLAP if overlap is None else overlap
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"overlap: expected a number, got {given!r}")
    overlap = float(given)
    if not 0 < overlap <= 0.5:
        raise ValueError(f"overlap: expected a fraction above 0 and up to 0.5, got {overlap}")
    if tile is None:
        return Tiling(None, overlap, True) if augment else None
    sides: Any = tile if isinstance(tile, tuple | list) else (tile, tile)
    if len(sides) != 2 or not all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides):
        raise TypeError(f"tile: expected an int, or height and width, got {repr(tile)[:60]}")
    if min(sides) < SMALLEST_TILE:
        raise ValueError(f"tile: expected sides of at least {SMALLEST_TILE} pixels, got {repr(tile)[:60]}")
    return Tiling((int(sides[0]), int(sides[1])), overlap, augment)


def views_of(size: tuple[int, int], tiling: Tiling, preprocessing: Preprocessing) -> list[list[View]]:
    """Return the views of an image: for each way to show the model the whole image, the views that cover it.

    Args:
        size: (height, width) of the image in pixels.
        tiling: the tiling.
        preprocessing: of the model; the smaller scale needs the resizing "edges", since others set the size.
    """
    height, width = size
    tile_height, tile_width = tiling.tile or size
    boxes = [
        (x, y, min(x + tile_width, width), min(y + tile_height, height))
        for y in _starts(height, tile_height, tiling.overlap)
        for x in _starts(width, tile_width, tiling.overlap)
    ]
    return [[View(box, *shown) for box in boxes] for shown in _rounds(tiling, preprocessing)]


def count_views(size: tuple[int, int], tiling: Tiling, preprocessing: Preprocessing) -> int:
    """Return the number of views that :func:`views_of` gives."""
    rows, columns = (
        _count(length, side, tiling.overlap) for length, side in zip(size, tiling.tile or size, strict=True)
    )
    return rows * columns * len(_rounds(tiling, preprocessing))


def _rounds(tiling: Tiling, preprocessing: Preprocessing) -> list[tuple[bool, float]]:
    """Return the ways to show the model the whole image: whether it is mirrored, and its scale."""
    if not tiling.augment:
        return [(False, 1.0)]
    scales = [1.0] if preprocessing.resizing != "edges" else [1.0, _SCALE]
    return [(mirrored, scale) for scale in scales for mirrored in (False, True)]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Return where tiles of a side begin: as few as cover the length, evenly spread, the last one at its end."""
    count = _count(length, tile, overlap)
    return [round(i * (length - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def _count(length: int, tile: int, overlap: float) -> int:
    """Return the number of tiles that cover a side."""
    if tile >= length:
        return 1
    step = max(tile - math.ceil(overlap * tile), 1)
    return math.ceil((length - tile) / step) + 1


def detect_tiled(
    model: DetectionModel,
    images: Iterable[ImageSource],
    postprocessing: Postprocessing,
    tiling: Tiling,
    *,
    batch_size: int | None,
    limits: Limits,
    keep: bool,
) -> Generator[Detections | Exception, None, None]:
    """Detect objects on the views of each image and merge them; yield errors instead of raising them.

    The views of an image run together in batches. A few opened images and a few batches of views are in memory.

    Args:
        model: the model.
        images: read a few ahead.
        postprocessing: what to report.
        tiling: the views.
        batch_size: run at most this many views together; None: the default for their size.
        limits: limits of downloads.
        keep: whether Detections keep the image.

    Returns:
        A generator with the Detections of each image, whose queries are -1; or the error that opening it raised.
    """
    preprocessing = model.metadata.preprocessing
    read = read_images(images, snapshots=not isinstance(images, list | tuple))
    open_one = partial(open_whole, preprocessing=preprocessing, limits=limits, keep=keep)
    with closing(map_in_threads(open_one, read, workers=1, depth=_IMAGES_AHEAD)) as opened:
        for image in opened:
            if isinstance(image, Exception):
                yield image
            else:
                yield detect_on_views(model, image, postprocessing, tiling, batch_size)


def open_whole(item: Item, preprocessing: Preprocessing, limits: Limits, *, keep: bool) -> PreparedImage | Exception:
    """Open an image for :func:`detect_on_views`, at its full size, or return the error that this raises."""
    return prepare_by(partial(_open_values, preprocessing=preprocessing), item, limits, keep=keep)


def _open_values(image: ImageSource, name: str, preprocessing: Preprocessing) -> tuple[Tensor, tuple[int, int]]:
    """Open an image at its full size and return its values (3, H, W), and (H, W)."""
    opened, size = open_by_backend(image, name, preprocessing)
    values = torch.from_numpy(np.stack(planes_of(opened))) if isinstance(opened, Image.Image) else opened
    return values, size


def detect_on_views(
    model: DetectionModel,
    image: PreparedImage,
    postprocessing: Postprocessing,
    tiling: Tiling,
    batch_size: int | None = None,
) -> Detections | Exception:
    """Detect objects on the views of one image and merge them.

    Args:
        model: the model.
        image: the image, from :func:`open_whole`.
        postprocessing: what to report.
        tiling: the views.
        batch_size: run at most this many views together; None: the default for their size.

    Returns:
        The detections, whose queries are -1, or the error of the first view that has one.
    """
    views = ImageViews(image, postprocessing, tiling, model.metadata.preprocessing)
    depth = WORKERS + (batch_size or 0)
    parts: list[Detections] = []
    with closing(map_in_threads(views.prepare, views.views, workers=WORKERS, depth=depth)) as prepared:
        for outcome in run_batches(model, prepared, views.postprocessing, batch_size=batch_size):
            if isinstance(outcome, Exception):
                return outcome
            parts.append(outcome)
    return views.merge(parts)


class ImageViews:
    """The views of an opened image: each of them prepared for the model, and what it found on all of them merged.

    Args:
        image: the image, from :func:`open_whole`.
        postprocessing: what to report.
        tiling: which views.
        preprocessing: of the model.

    Attributes:
        views: the views.
        postprocessing: of each view.
    """

    def __init__(
        self, image: PreparedImage, postprocessing: Postprocessing, tiling: Tiling, preprocessing: Preprocessing
    ) -> None:
        self._image, self._preprocessing, self._merged = image, preprocessing, postprocessing
        rounds = views_of(image.size, tiling, preprocessing)
        self.views = [view for views in rounds for view in views]
        self._rounds = [index for index, views in enumerate(rounds) for _ in views]
        # the merged score is the mean over the rounds: an object above the threshold may be below it in some of them
        self.postprocessing = postprocessing._replace(threshold=postprocessing.threshold / len(rounds))

    def prepare(self, view: View) -> PreparedImage:
        """Cut a view out of the image, and mirror and resize it."""
        image, preprocessing = self._image, self._preprocessing
        x0, y0, x1, y1 = view.box
        values = image.values[:, y0:y1, x0:x1]
        values = values.flip(-1) if view.mirrored else values
        exact = preprocessing.backend == "pil" and values.dtype == torch.uint8
        opened = to_pil(values) if exact else values
        if view.scale != 1:
            preprocessing = preprocessing.with_shortest_edge(max(round(view.scale * preprocessing.shortest_edge), 1))
        return PreparedImage(image.name, None, None, size_of(opened), resize(opened, preprocessing))

    def merge(self, parts: Sequence[Detections]) -> Detections:
        """Merge the detections on each view, in the order of :attr:`views`; their queries are -1."""
        on_image = [_on_image(view, part) for view, part in zip(self.views, parts, strict=True)]
        merged = merge_views(on_image, [view.box for view in self.views], self._rounds, self._image.size)
        best = merged[self._merged.keeps(merged.scores, merged.labels)][: self._merged.top_k]
        return replace(best, source=self._image.source, state=self._image.state)


def _on_image(view: View, found: Detections) -> Detections:
    """Return the detections on a view with their boxes in pixels of the image."""
    boxes = found.boxes
    x0, y0, x1, _ = view.box
    if view.mirrored:
        boxes = torch.stack([x1 - x0 - boxes[:, 2], boxes[:, 1], x1 - x0 - boxes[:, 0], boxes[:, 3]], dim=1)
    return replace(found, boxes=boxes + torch.tensor([x0, y0, x0, y0], dtype=boxes.dtype, device="cpu"))
