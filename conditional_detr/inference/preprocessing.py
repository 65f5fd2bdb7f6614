"""Preprocess images to pixels: resize and normalise them.

The backend "pil" has the pixels of the authors' code and of transformers' PIL processors, to the last bit. The backend
"torchvision" is faster; its values before normalisation differ by 1 of 255 where rounding differs, and by more where a
large JPEG file is reduced while it is decoded.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from conditional_detr.inference.downloads import DEFAULT_LIMITS, Limits
from conditional_detr.inference.images import open_fast, open_image, size_of
from conditional_detr.inference.sources import ImageSource
from conditional_detr.modeling.metadata import Preprocessing

_BLOCK = 1 << 17  # values that are normalised together: they stay in the processor's cache


def resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the (height, width) that an image is resized to. Sides are truncated as in transformers."""
    if preprocessing.resizing == "none":
        return height, width
    if preprocessing.size is None:
        return edges_size(height, width, preprocessing.shortest_edge, preprocessing.longest_edge)
    if preprocessing.resizing == "stretch":
        return preprocessing.size
    scale = min(preprocessing.size[0] / height, preprocessing.size[1] / width)
    return max(int(height * scale), 1), max(int(width * scale), 1)


def edges_size(height: int, width: int, shortest_edge: int, longest_edge: float) -> tuple[int, int]:
    """Return the (height, width) of an image resized to two edges. The aspect ratio is kept.

    The shorter side becomes ``shortest_edge``; if the longer side then exceeds ``longest_edge``, it becomes
    ``longest_edge`` instead. Sides are truncated to whole pixels, as in transformers.
    """
    short, long = min(height, width), max(height, width)
    shortest: float = shortest_edge
    if long / short * shortest > longest_edge:
        shortest = longest_edge * short / long
    if round(shortest) == short:
        return height, width
    new_short = max(round(shortest), 1)
    if width < height:
        return max(int(shortest * height / width), 1), new_short
    return new_short, max(int(shortest * width / height), 1)


def open_resized(
    image: ImageSource, name: str, preprocessing: Preprocessing, limits: Limits = DEFAULT_LIMITS
) -> tuple[Tensor, tuple[int, int]]:
    """Open and resize an image.

    Args:
        image: the image.
        name: name for messages, such as ``images[3]``.
        preprocessing: the resizing.
        limits: limits of a download.

    Returns:
        The resized values, as of :func:`resize`; and the (height, width) of the original.

    Raises:
        OSError, TypeError, ValueError: as :func:`~conditional_detr.inference.images.open_image`.
    """
    if preprocessing.backend == "pil":
        opened = open_image(image, name, limits)
        return resize(opened, preprocessing), size_of(opened)
    needed = partial(resized_size, preprocessing=preprocessing)
    opened, size = open_fast(image, name, limits, needed=needed)
    return _resize_to(opened, needed(*size), preprocessing), size


def to_pixels(opened: Image.Image | Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resize and normalise an opened image and return (3, H, W) float32."""
    return normalise(resize(opened, preprocessing), preprocessing)


def resize(opened: Image.Image | Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resize an opened image to the size that the model was trained with.

    Args:
        opened: a result of :func:`~conditional_detr.inference.images.open_image`.
        preprocessing: the resizing, and the backend.

    Returns:
        (3, H, W): uint8 for a PIL image, resized with bilinear interpolation and antialiasing, as in training;
        floating point for a tensor of that type, resized in the same way but without rounding to 8 bits.
    """
    return _resize_to(opened, resized_size(*size_of(opened), preprocessing), preprocessing)


def _resize_to(opened: Image.Image | Tensor, size: tuple[int, int], preprocessing: Preprocessing) -> Tensor:
    """Resize an opened image to (height, width) by the backend."""
    if isinstance(opened, Tensor) and opened.is_floating_point():
        return F.interpolate(opened[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    if isinstance(opened, Image.Image) and preprocessing.backend == "pil":
        return planes_of(opened.resize(size[::-1], Image.Resampling.BILINEAR))
    from torchvision.transforms.v2 import functional

    values = planes_of(opened) if isinstance(opened, Image.Image) else opened
    return functional.resize(values, list(size), antialias=True)


def planes_of(image: Image.Image) -> Tensor:
    """Return an RGB image as (3, H, W) uint8, one contiguous plane per channel."""
    values = np.empty((3, image.height, image.width), np.uint8)
    for plane, band in zip(values, image.split(), strict=True):
        plane[:] = np.asarray(band)
    return torch.from_numpy(values)


def normalise(values: Tensor, preprocessing: Preprocessing, out: Tensor | None = None) -> Tensor:
    """Subtract the mean and divide by the standard deviation.

    Args:
        values: (..., 3, H, W), uint8 or floating point in [0, 1].
        preprocessing: mean and std.
        out: (..., 3, H, W), where to write the result, in any floating point type; default: a new float32 tensor.

    Returns:
        (..., 3, H, W) contiguous, on the device of the values.
    """
    if out is None:
        out = empty_pixels(values.shape, device=values.device)
    images, results = (x.flatten(0, -4) if x.dim() > 3 else x[None] for x in (values, out))
    rows = max(_BLOCK // max(values.shape[-1], 1), 1) if values.device.type == "cpu" else values.shape[-2]
    # All steps of a block of rows before the next block: memory is written once.
    for image, result in zip(images, results, strict=True):
        for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
            for part, target in zip(image[channel].split(rows), result[channel].split(rows), strict=True):
                block = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
                block.copy_(part)
                if part.dtype == torch.uint8:
                    block.div_(255)
                block.sub_(mean).div_(std)
                if block is not target:
                    target.copy_(block)
    return out


def empty_pixels(shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor whose values are not set; numpy asks for huge pages, which the system provides faster."""
    if device.type != "cpu" or dtype != torch.float32:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(tuple(shape), np.float32))
