"""Run a model on batches of prepared images, and on a stream of images of any size."""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.downloads import Limits
from conditional_detr.inference.exported import InferenceError
from conditional_detr.inference.pipeline import map_in_batches, map_in_threads
from conditional_detr.inference.postprocessing import Postprocessing, check_head, postprocess
from conditional_detr.inference.preparation import PreparedImage, batch_pixels, prepare, read_images
from conditional_detr.inference.preprocessing import PixelBuffer
from conditional_detr.inference.sources import ImageSource
from conditional_detr.modeling.detection_model import DetectionModel
from conditional_detr.modeling.layers import evaluation_mode

DEFAULT_BATCH_SIZE = 8
WORKERS = min(4, os.cpu_count() or 1)
"""Threads that open and resize images ahead of the model."""

_WINDOW = 4  # how many batches an image of a rare shape waits for others of its shape
_BATCH_PIXELS_ON_CPU = 400_000  # above, the feature maps of a batch leave the caches: it takes longer than its images

Result = TypeVar("Result")


def default_batch_size(device: torch.device, height: int, width: int) -> int:
    """Return how many images of a size after resizing run together on a device by default."""
    if device.type != "cpu":
        return DEFAULT_BATCH_SIZE
    return min(max(_BATCH_PIXELS_ON_CPU // (height * width), 1), DEFAULT_BATCH_SIZE)


def detect_in_batches(
    model: DetectionModel,
    images: Iterable[ImageSource],
    postprocessing: Postprocessing,
    *,
    batch_size: int | None,
    limits: Limits,
    keep: bool,
) -> Generator[Detections | Exception, None, None]:
    """Detect objects on many images, in order and in bounded memory; yield errors instead of raising them.

    Args:
        model: the model.
        images: read a few batches ahead.
        postprocessing: what to report.
        batch_size: run at most this many images together; None: the default for their size.
        limits: limits of downloads.
        keep: whether Detections keep the image.

    Returns:
        A generator with the Detections of each image, or the error that opening it raised.
    """
    read = read_images(images, snapshots=not isinstance(images, list | tuple))
    open_one = partial(prepare, preprocessing=model.metadata.preprocessing, limits=limits, keep=keep)
    depth = (batch_size or DEFAULT_BATCH_SIZE) + WORKERS
    prepared = map_in_threads(open_one, read, workers=WORKERS, depth=depth)
    with closing(prepared):
        yield from run_batches(model, prepared, postprocessing, batch_size=batch_size)


def run_batches(
    model: DetectionModel,
    prepared: Iterable[PreparedImage | Exception],
    postprocessing: Postprocessing,
    *,
    batch_size: int | None,
) -> Iterator[Detections | Exception]:
    """Run a model on prepared images of any shapes; images of one shape and dtype run together.

    Args:
        model: the model.
        prepared: the images, or errors, which are passed on.
        postprocessing: what to report.
        batch_size: run at most this many images together; None: the default for their size.

    Returns:
        An iterator of the detections on each image, or its error.
    """
    buffer = PixelBuffer()

    def key(item: PreparedImage | Exception) -> tuple[Any, ...] | None:
        return (item.values.shape, item.values.dtype) if isinstance(item, PreparedImage) else None

    def run(items: list[PreparedImage | Exception]) -> list[Detections | Exception]:
        if isinstance(items[0], Exception):
            return [items[0]]
        group = [item for item in items if isinstance(item, PreparedImage)]
        return run_batch(model, group, [postprocessing] * len(group), buffer)

    def limit(key: Any) -> int:
        (_, height, width), _ = key
        return batch_size or default_batch_size(model.device, height, width)

    window = _WINDOW * (batch_size or DEFAULT_BATCH_SIZE)
    yield from map_in_batches(prepared, key, run, batch_size=limit, window=window)


def run_batch(
    model: DetectionModel,
    group: Sequence[PreparedImage],
    postprocessings: Sequence[Postprocessing],
    buffer: PixelBuffer | None = None,
) -> list[Detections | Exception]:
    """Run a model on prepared images whose values have one shape and dtype.

    Args:
        model: the model.
        group: the images.
        postprocessings: what to report of each.
        buffer: memory that batches after one another use.

    Returns:
        The detections on each image, or its error.
    """
    try:
        return [*_detect(model, group, postprocessings, buffer or PixelBuffer())]
    except InferenceError as error:  # the runtime of an exported model refuses this shape
        return [InferenceError(f"{image.name}: {error}") for image in group]


def _detect(
    model: DetectionModel,
    group: Sequence[PreparedImage],
    postprocessings: Sequence[Postprocessing],
    buffer: PixelBuffer,
) -> Iterator[Detections | Exception]:
    """Run a model on images of one shape; yield the detections of each, or its error."""
    metadata = model.metadata
    values = [image.values for image in group]
    pixels = batch_pixels(values, metadata.preprocessing, model.device, model.dtype, buffer)
    output = evaluate(model, model, pixels)
    logits, boxes = (x[-1].float().cpu() for x in output)  # (B, N, C), (B, N, 4)
    check_head(model.scores.num_classes(logits.shape[-1]), metadata.class_names)
    for image, postprocessing, image_logits, image_boxes in zip(group, postprocessings, logits, boxes, strict=True):
        if not (image_logits.isfinite().all() and image_boxes.isfinite().all()):
            yield ValueError(f"{image.name}: the model returned logits or boxes that are not finite")
            continue
        corners, scores, labels, queries = postprocess(image_logits, image_boxes, image.size, postprocessing)
        rows = labels.tolist()
        yield Detections(
            boxes=corners,
            scores=scores,
            labels=labels,
            names=tuple(str(metadata.class_names[row]) for row in rows),
            category_ids=tuple(metadata.category_ids[row] for row in rows),
            queries=queries,
            size=image.size,
            source=image.source,
            state=image.state,
        )


@torch.inference_mode()
def evaluate(model: DetectionModel, function: Callable[[Tensor], Result], pixels: Tensor) -> Result:
    """Apply a model, or a method of it, to pixels in eval mode, and restore its mode."""
    with evaluation_mode(model):
        return function(pixels.to(model.device, model.dtype))
