"""Prepare images of any kind for a model: open and resize each, normalise a batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conditional_detr.inference.downloads import Limits
from conditional_detr.inference.images import snapshot
from conditional_detr.inference.preprocessing import PixelBuffer, normalise, open_resized
from conditional_detr.inference.sources import (
    ImageSource,
    ReadableSource,
    resolve_source,
    source_name,
    source_state,
)
from conditional_detr.modeling.metadata import Preprocessing

IMAGE_ERRORS = (OSError, TypeError, ValueError)
"""The exceptions that opening an image raises."""

Item: TypeAlias = tuple[ImageSource | Exception, str]  # an image, or the error of reading it, and its name


class PreparedImage(NamedTuple):
    """An image ready for a batch.

    Attributes:
        name: its path or URL, or its position, for messages.
        source: the image, if it is kept.
        state: state of the source, from ``sources.source_state``.
        size: (height, width) of the original.
        values: (3, H, W), not yet normalised; resized, unless views of the image are still to be cut out.
    """

    name: str
    source: ReadableSource | None
    state: tuple[int, ...] | None
    size: tuple[int, int]
    values: Tensor


def read_images(images: Iterable[ImageSource], *, snapshots: bool) -> Iterator[Item]:
    """Yield each image, or the error that reading it raises, and its name; runs in the consumer's thread."""
    for index, image in enumerate(images):
        name = source_name(image, f"images[{index}]")
        in_memory = isinstance(image, Image.Image | np.ndarray | Tensor)
        item: ImageSource | Exception = image
        if snapshots or not in_memory:
            try:
                item = snapshot(image, name)
            except IMAGE_ERRORS as error:
                item = error
        yield item, name


def prepare(item: Item, preprocessing: Preprocessing, limits: Limits, *, keep: bool) -> PreparedImage | Exception:
    """Open and resize an image, or return the error that this raises."""
    return prepare_by(partial(open_resized, preprocessing=preprocessing), item, limits, keep=keep)


def prepare_by(
    open_values: Callable[[ReadableSource, str], tuple[Tensor, tuple[int, int]]],
    item: Item,
    limits: Limits,
    *,
    keep: bool,
) -> PreparedImage | Exception:
    """Open an image by a function that returns values and the original (height, width), or return the error."""
    image, default_name = item
    if isinstance(image, Exception):
        return image
    name = source_name(image, default_name)
    try:
        source = resolve_source(image, name, limits)
        kept = source if keep or isinstance(source, Path) else None
        state = source_state(source) if isinstance(source, Path) else None
        values, size = open_values(source, name)
        if kept is not None and not isinstance(kept, Path):
            state = source_state(kept)  # now that a PIL image is decoded
    except IMAGE_ERRORS as error:
        return error
    return PreparedImage(name, kept, state, size, values)


def batch_pixels(
    images: Sequence[Tensor],
    preprocessing: Preprocessing,
    device: torch.device,
    dtype: torch.dtype,
    buffer: PixelBuffer,
) -> Tensor:
    """Normalise resized images of one shape and return (B, 3, H, W) on a device; on a CPU, in the buffer's memory."""
    shape = (len(images), *images[0].shape)
    if device.type == "cpu":
        pixels = buffer.take(shape, dtype)
        for values, out in zip(images, pixels, strict=True):
            normalise(values, preprocessing, out)
        return pixels
    # 8-bit values are a quarter of the bytes; from pinned memory they are copied while the device computes
    stacked = torch.empty(shape, dtype=images[0].dtype, device="cpu", pin_memory=device.type == "cuda")
    for values, place in zip(images, stacked, strict=True):
        place.copy_(values)
    return normalise(stacked.to(device, non_blocking=True), preprocessing)
