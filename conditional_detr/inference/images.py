"""Open images of any kind: decode them, apply the EXIF orientation and convert them to RGB."""

import io
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from conditional_detr.inference.downloads import DEFAULT_LIMITS, Limits
from conditional_detr.inference.sources import ImageSource, resolve_source, source_name

# Files that are often passed by mistake: offset of the signature, signature, description for the error message.
_SIGNATURES = (
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (4, b"ftyphei", "a HEIC image, which PIL opens once pillow-heif is installed and registered"),
    (4, b"ftypmif", "a HEIF image, which PIL opens once pillow-heif is installed and registered"),
    (4, b"ftypavi", "an AVIF image that is truncated, or that this PIL was built without"),
    (4, b"ftyp", "a video (MP4 or QuickTime)"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (8, b"AVI ", "a video (AVI)"),
    (0, b"\x00\x00\x01\xba", "a video (MPEG)"),
    (0, b"\x00\x00\x01\xb3", "a video (MPEG)"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer: the image was not checked out"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<!", "a web page"),
    (0, b"<html", "a web page"),
)
_LOADING = threading.Lock()  # PIL does not allow two threads to load the same image
_REFUSED_FORMATS = {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}  # PIL would run Ghostscript on EPS


def open_image(image: ImageSource, name: str, limits: Limits = DEFAULT_LIMITS) -> Image.Image | Tensor:
    """Open an image from any supported source.

    PIL limits the number of pixels to twice ``PIL.Image.MAX_IMAGE_PIXELS``.

    Args:
        image: the image.
        name: name for messages if the image has no path or URL, such as ``images[3]``.
        limits: limits of a download.

    Returns:
        A PIL image in RGB with its EXIF orientation applied; for floating point input, a tensor (3, H, W) in [0, 1].
        The first frame of an animation. Transparency is dropped; 16-bit values are scaled to 8 bits.

    Raises:
        OSError: the file or URL does not exist, or the image is truncated or corrupt.
        TypeError: an unsupported type or dtype.
        ValueError: not an image file, an unsupported shape, values out of range, or too many pixels.
    """
    name = source_name(image, name)
    source = resolve_source(image, name, limits)
    if isinstance(source, Path | bytes):
        return _open_file(source, name)
    if isinstance(source, Image.Image):
        with _LOADING:  # another item, or another thread of the caller, may hold the same image
            return _decode(source, name, own=False)
    if isinstance(source, Tensor):
        if source.dim() != 3 or source.shape[0] not in (1, 3, 4) or 0 in source.shape:
            raise ValueError(
                f"{name}: expected a tensor (3, H, W), (4, H, W) or (1, H, W), got {tuple(source.shape)}"
                + _hint(tuple(source.shape))
            )
        source = source.detach().cpu()
        # numpy has no bfloat16
        return _from_array((source.float() if source.is_floating_point() else source).permute(1, 2, 0).numpy(), name)
    values = source[..., None] if source.ndim == 2 else source
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or 0 in values.shape:
        raise ValueError(
            f"{name}: expected an array (H, W, 3), (H, W, 4) or (H, W), got {source.shape}" + _hint(source.shape)
        )
    return _from_array(values, name)


def open_fast(
    image: ImageSource, name: str, needed: Callable[[int, int], tuple[int, int]] | None = None
) -> tuple[Image.Image | Tensor, tuple[int, int]]:
    """Open an image like :func:`open_image`, JPEG files faster, with values that may differ slightly.

    Args:
        image: the image.
        name: as in :func:`open_image`.
        needed: returns the (height, width) that an image of a height and width is resized to; given it, large JPEG
            files are reduced to a half, a quarter or an eighth while they are decoded, but not below that size.

    Returns:
        The image as in :func:`open_image`, or a tensor (3, H, W) uint8; and its original (height, width).

    Raises:
        OSError, TypeError, ValueError: as :func:`open_image`.
    """
    name = source_name(image, name)
    source = resolve_source(image, name)
    if isinstance(source, bytes) or (isinstance(source, Path) and source.is_file()):
        with suppress(Exception):  # open_image() raises the documented errors
            return _open_jpeg(source, name, needed)
    opened = open_image(source, name)
    return opened, size_of(opened)


def _open_jpeg(
    file: Path | bytes, name: str, needed: Callable[[int, int], tuple[int, int]] | None
) -> tuple[Image.Image | Tensor, tuple[int, int]]:
    """Open a JPEG file by torchvision, or reduced by PIL; raises an error of any type for other files."""
    from torchvision.io import ImageReadMode, decode_jpeg

    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=("JPEG",)) as image:
        if image.mode not in ("RGB", "L"):
            raise ValueError(f"{name}: expected RGB or grey, got {image.mode}")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        size = (image.height, image.width)
        upright = size if orientation < 5 else size[::-1]
        target = needed(*upright) if needed else upright
        if min(upright[0] // target[0], upright[1] // target[1]) >= 2:
            width, height = target[::-1] if orientation < 5 else target
            image.draft("RGB", (width, height))
        elif orientation == 1:
            content = bytearray(file if isinstance(file, bytes) else file.read_bytes())  # torch wants it writable
            return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), mode=ImageReadMode.RGB), upright
        return _decode(image, name, own=True), upright


def snapshot(image: ImageSource, name: str) -> ImageSource:
    """Return an image that stays as it is when the caller overwrites the given one.

    Arrays and tensors are copied, PIL images are decoded, open files and buffers are read. Paths and strings are
    returned unchanged.

    Args:
        image: the image.
        name: name for messages, such as ``images[3]``.

    Raises:
        OSError: a PIL image that cannot be decoded, or an open file that cannot be read.
        TypeError: an unsupported type.
        ValueError: a PIL image with unsupported values.
    """
    if isinstance(image, np.ndarray):
        return image.copy()
    if isinstance(image, Tensor):
        return image.detach().clone()
    if isinstance(image, Image.Image):
        return open_image(image, name)
    return image if isinstance(image, str | os.PathLike) else resolve_source(image, name)


def size_of(opened: Image.Image | Tensor) -> tuple[int, int]:
    """Return the (height, width) of an opened image in pixels."""
    if isinstance(opened, Tensor):
        return opened.shape[1], opened.shape[2]
    return opened.height, opened.width


def size_of_file(path: Path) -> tuple[int, int]:
    """Read the header of an image file and return its (height, width), with the EXIF orientation applied.

    Raises:
        OSError: the file does not exist, or it is truncated or corrupt.
        ValueError: not an image file.
    """
    try:
        with Image.open(path) as image:
            height, width = image.height, image.width
            if image.format == "TIFF":  # some versions of PIL give the upright size of these at once, others do not
                height, width = image.tag_v2[TiffImagePlugin.IMAGELENGTH], image.tag_v2[TiffImagePlugin.IMAGEWIDTH]
            swapped = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (width, height) if swapped else (height, width)
    except Exception:  # open_image() raises the documented errors
        return size_of(open_image(path, str(path)))


def to_pil(opened: Image.Image | Tensor) -> Image.Image:
    """Return an opened image as an 8-bit RGB image."""
    if isinstance(opened, Image.Image):
        return opened
    values = opened if opened.dtype == torch.uint8 else (opened * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).numpy()))


def _open_file(file: Path | bytes, name: str) -> Image.Image | Tensor:
    """Open an image file or its bytes."""
    if isinstance(file, Path):
        if not file.exists():
            raise FileNotFoundError(f"{name}: no such file")
        if file.is_dir():
            raise IsADirectoryError(f"{name}: expected an image file, got a folder")
        if not file.is_file():
            raise ValueError(f"{name}: expected an image file, got a pipe or device")
    try:
        image = Image.open(file if isinstance(file, Path) else io.BytesIO(file))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: expected an image, got {_describe(file)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; PIL.Image.MAX_IMAGE_PIXELS sets the limit") from error
    except Exception as error:  # the type of PIL's error for a broken header depends on the format
        raise _unreadable(name, error) from error
    with image:
        if image.format in _REFUSED_FORMATS:
            raise ValueError(f"{name}: expected an image, got {_describe(file)}")
        return _decode(image, name, own=True)


def _unreadable(name: str, error: Exception) -> OSError:
    """Return the error for an image that PIL cannot read."""
    return OSError(f"{name}: the image cannot be read: {str(error) or type(error).__name__}")


def _describe(file: Path | bytes) -> str:
    """Return a description of a file that is not an image, from its first bytes."""
    if isinstance(file, bytes):
        head = file[:64]
    else:
        with file.open("rb") as opened:
            head = opened.read(64)
    if not head:
        return "an empty file (0 bytes)"
    text = head.lstrip().lower() if head.isascii() else b""
    for offset, signature, description in _SIGNATURES:
        if head[offset:].startswith(signature) or text.startswith(signature):
            return description
    return "a text file" if text and text.decode().isprintable() else "a file in a format that PIL does not support"


def _hint(shape: tuple[int, ...]) -> str:
    """Return advice for an array or tensor of an unsupported shape; an empty string if there is none."""
    if len(shape) == 4:
        return "; for a batch, pass a list of images"
    if len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3):
        return "; channels come last in an array: .transpose(1, 2, 0)"
    if len(shape) == 3 and shape[2] in (1, 3):
        return "; channels come first in a tensor: .permute(2, 0, 1)"
    return ""


def _decode(image: Image.Image, name: str, *, own: bool) -> Image.Image | Tensor:
    """Decode an image, apply its EXIF orientation and convert it to RGB; an own image is not copied without need."""
    if 0 in image.size:
        raise ValueError(f"{name}: expected an image with pixels, got {image.width} x {image.height}")
    try:
        image.load()
        upright = _apply_orientation(image, name, own=own)
        if upright.mode == "RGB":
            return upright
        # two steps: keep the colours of transparent palette entries, and undo premultiplied alpha
        via = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
        if not upright.mode.startswith(("I", "F")):
            return upright.convert(via.get(upright.mode, upright.mode)).convert("RGB")
        values = np.asarray(upright)[..., None]
    except Exception as error:  # the type of PIL's error depends on the format
        raise _unreadable(name, error) from error
    if upright.mode == "F":
        return _from_array(values, name)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name}: expected 16-bit values 0..65535, got {values.min()}..{values.max()}")
    # PIL before version 11 gives this mode to PNG files of 16 bits; in any other image small values may mean 8 bits
    if upright.mode == "I" and image.format != "PNG" and values.max() <= 255:
        raise ValueError(
            f"{name}: expected 8-bit or 16-bit values, got 32-bit integers {values.min()}..{values.max()} (mode I),"
            " which may be either; convert them to uint8 or uint16"
        )
    return _from_array(values.astype(np.uint16), name)


def _apply_orientation(image: Image.Image, name: str, *, own: bool) -> Image.Image:
    """Apply the EXIF orientation and return the image, or a copy if it is not an own one.

    If the EXIF data is broken, warn and do not rotate the image.
    """
    try:
        if own and image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception as error:  # the type of PIL's error depends on where the EXIF data is broken
        warnings.warn(f"{name}: the EXIF data cannot be read ({error}); the image is not rotated", stacklevel=2)
        return image if own else image.copy()


def _from_array(values: np.ndarray, name: str) -> Image.Image | Tensor:
    """Convert values (H, W, 3), (H, W, 4) or (H, W, 1) to a PIL image, or a tensor (3, H, W) if floating point."""
    values, shape = values[..., :3], (*values.shape[:2], 3)
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"{name}: expected floating point values in [0, 1],"
                f" got {values.min()}..{values.max()}; use uint8 for 0..255"
            )
        return torch.from_numpy(np.array(np.broadcast_to(values, shape), dtype=np.float32)).permute(2, 0, 1)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"{name}: expected uint8, uint16 or floating point values, got {values.dtype}")
    if values.dtype == np.uint16:
        # rounded division by 257, which in floating point takes several times the memory
        values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, shape)))
