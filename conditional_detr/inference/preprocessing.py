"""Preprocess images to pixels: resize and normalise them.

The backend "pil" has the pixels of the authors' code and of transformers' PIL processors, to the last bit. The backend
"torchvision" is faster; its values before normalisation differ by 1 of 255 where rounding differs, and by more where a
large JPEG file is reduced while it is decoded.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

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


def open_resized(image: ImageSource, name: str, preprocessing: Preprocessing) -> tuple[Tensor, tuple[int, int]]:
    """Open and resize an image.

    Args:
        image: the image.
        name: name for messages, such as ``images[3]``.
        preprocessing: the resizing, and the backend.

    Returns:
        The resized values, as of :func:`resize`; and the (height, width) of the original.

    Raises:
        OSError, TypeError, ValueError: as :func:`~conditional_detr.inference.images.open_image`.
    """
    needed = partial(resized_size, preprocessing=preprocessing)
    opened, size = open_by_backend(image, name, preprocessing, needed)
    return _resize_to(opened, needed(*size), preprocessing), size


def open_by_backend(
    image: ImageSource,
    name: str,
    preprocessing: Preprocessing,
    needed: Callable[[int, int], tuple[int, int]] | None = None,
) -> tuple[Image.Image | Tensor, tuple[int, int]]:
    """Open an image exactly, or fast, as the backend says.

    Args:
        image: the image.
        name: name for messages, such as ``images[3]``.
        preprocessing: the backend.
        needed: as in :func:`~conditional_detr.inference.images.open_fast`; the backend "pil" does not use it.

    Returns:
        The image, and its original (height, width).

    Raises:
        OSError, TypeError, ValueError: as :func:`~conditional_detr.inference.images.open_image`.
    """
    if preprocessing.backend == "torchvision":
        return open_fast(image, name, needed)
    opened = open_image(image, name)
    return opened, size_of(opened)


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
        resized = opened.resize(size[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.stack(planes_of(resized)))
    from torchvision.transforms.v2 import functional

    values = torch.from_numpy(np.stack(planes_of(opened))) if isinstance(opened, Image.Image) else opened
    return functional.resize(values, list(size), antialias=True)


def planes_of(image: Image.Image) -> list[np.ndarray]:
    """Return the channels of an RGB image, (H, W) uint8 each, which cannot be written."""
    shape = image.height, image.width
    return [np.frombuffer(image.tobytes("raw", band), np.uint8).reshape(shape) for band in "RGB"]


def normalise_image(image: Image.Image | Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalise an opened image without resizing it and return (3, H, W) float32."""
    if isinstance(image, Tensor):
        return normalise(image, preprocessing)
    pixels = empty_pixels((3, image.height, image.width))
    _normalise_planes(planes_of(image), preprocessing, pixels.numpy())
    return pixels


def normalise(values: Tensor, preprocessing: Preprocessing, out: Tensor | None = None) -> Tensor:
    """Subtract the mean and divide by the standard deviation.

    Args:
        values: (..., 3, H, W), uint8 or floating point in [0, 1].
        preprocessing: mean and std.
        out: (..., 3, H, W), where to write the result, in any floating point type; default: a new float32 tensor.

    Returns:
        (..., 3, H, W) contiguous, on the device of the values.
    """
    if out is None and values.device.type == "cpu":
        out = empty_pixels(values.shape)
    elif out is None:
        out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    if values.device.type == "cpu" and (values.dtype, out.dtype) == (torch.uint8, torch.float32):
        shape = (-1, *values.shape[-3:])
        for image, pixels in zip(values.reshape(shape).numpy(), out.view(shape).numpy(), strict=True):
            _normalise_planes(image, preprocessing, pixels)
        return out
    if values.dtype == torch.uint8:
        values = values.to(torch.float32) / 255
    mean, std = (
        torch.tensor(channels, dtype=torch.float32, device=values.device).view(3, 1, 1)
        for channels in (preprocessing.mean, preprocessing.std)
    )
    return out.copy_((values - mean) / std)


def _normalise_planes(planes: Sequence[np.ndarray], preprocessing: Preprocessing, out: np.ndarray) -> None:
    """Normalise three channels (H, W) uint8 and write them to (3, H, W) float32.

    All steps of a block of rows are done before the next block, so that memory is written once.
    """
    exact = preprocessing.backend == "pil"
    rows = max(_BLOCK // out.shape[2], 1)
    for plane, pixels, mean, std in zip(planes, out, preprocessing.mean, preprocessing.std, strict=True):
        factor, offset = np.float32(1 / (255 * std)), np.float32(-mean / std)
        for start in range(0, len(plane), rows):
            part, block = plane[start : start + rows], pixels[start : start + rows]
            if exact:
                np.divide(part, np.float32(255), out=block, dtype=np.float32)
                np.subtract(block, np.float32(mean), out=block)
                np.divide(block, np.float32(std), out=block)
            else:
                np.multiply(part, factor, out=block, dtype=np.float32)
                np.add(block, offset, out=block)


class PixelBuffer:
    """Memory that one batch of pixels after the other uses: the system takes long to provide it anew."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32, device="cpu")

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU, whose values are not set, and which is valid until the next call."""
        size = math.prod(shape)
        if self._memory.dtype != dtype or self._memory.numel() < size:
            self._memory = empty_pixels((size,), dtype)
        return self._memory[:size].view(shape)


def empty_pixels(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor on the CPU whose values are not set; numpy asks for huge pages, which are provided faster."""
    if dtype != torch.float32:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(np.empty(tuple(shape), np.float32))
