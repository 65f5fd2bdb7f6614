"""Resolve any kind of image source to one that can be opened several times, without a network.

A path stays a path. A URL is downloaded, base64 decoded and an open file read, all to bytes.
"""

import base64
import io
import os
import re
import urllib.request
import zlib
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conditional_detr.inference.downloads import DEFAULT_LIMITS, Limits, fetch_url

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | Tensor
"""A file path, an http(s) URL, a data URI or base64; a file's bytes or an open binary file; a PIL image of any mode;
an array (H, W, 3), (H, W, 4) or (H, W); a tensor (3, H, W), (4, H, W) or (1, H, W).

Arrays and tensors are RGB, RGBA or grey: uint8, uint16, or floating point in [0, 1].
"""

ReadableSource: TypeAlias = Path | bytes | Image.Image | np.ndarray | Tensor
"""An image that can be opened any number of times, without a network."""

_MIN_BASE64_LENGTH = 32  # characters; the smallest image files have 26 bytes
_MAX_NAME_LENGTH = 255


def is_single_image(images: object) -> bool:
    """Return True for one image and False for a collection of images."""
    # a runtime check takes no os.PathLike[str]
    one = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor  # type: ignore[type-arg]
    return isinstance(images, one) or hasattr(images, "read")


def source_name(image: object, default: str) -> str:
    """Return the name of an image for messages: its path or URL, or that of an open file; else ``default``."""
    if isinstance(image, os.PathLike):
        return str(image)
    if hasattr(image, "read") and isinstance(name := getattr(image, "name", None), str) and name:
        return name
    if isinstance(image, str) and 0 < len(image) <= _MAX_NAME_LENGTH and not image.startswith("data:"):
        return image
    return default


def resolve_source(image: ImageSource, name: str, limits: Limits = DEFAULT_LIMITS) -> ReadableSource:
    """Resolve an image source to one that can be opened several times.

    Args:
        image: the image.
        name: name for messages if the image has no path or URL, such as ``images[3]``.
        limits: limits of a download.

    Returns:
        The path; the bytes of a URL, data URI, base64 string or open file; other images unchanged.

    Raises:
        OSError: the URL cannot be fetched or takes too long, or the open file cannot be read.
        TypeError: an unsupported type.
        ValueError: an invalid URL or base64 string, a download above the limit, or a URL that the guard refuses.
    """
    name = source_name(image, name)
    if isinstance(image, Image.Image | np.ndarray | Tensor):
        return image
    if isinstance(image, str):
        return _resolve_string(image, name, limits)
    if isinstance(image, os.PathLike):
        return Path(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if hasattr(image, "read"):
        return _read(image, name)
    raise TypeError(
        f"{name}: expected a path, URL, base64, bytes, open file, PIL image, array or tensor,"
        f" got {type(image).__name__}"
    )


def source_state(source: ReadableSource) -> tuple[int, ...] | None:
    """Return what changes when a source is changed, to notice that it is no longer the image of a detection.

    Returns:
        The modification time, size and inode of a file, None for a missing one; the CRC-32 of the values of an array,
        a tensor or a decoded PIL image; None for bytes, which cannot change.
    """
    if isinstance(source, bytes):
        return None
    if isinstance(source, Image.Image):
        return (zlib.crc32(source.tobytes()),)
    if isinstance(source, Tensor):
        source = source.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if isinstance(source, np.ndarray):
        return (zlib.crc32(np.ascontiguousarray(source).data),)
    try:
        state = source.stat()
    except OSError:  # opening the file raises the documented error
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _resolve_string(text: str, name: str, limits: Limits) -> Path | bytes:
    """Resolve a string that is a URL, a data URI, a path or base64."""
    if not text:
        raise ValueError(f"{name}: expected a path, URL or base64, got an empty string")
    start = text[:16].lower()
    if start.startswith(("http://", "https://")):
        return fetch_url(text, name, limits)
    if start.startswith("data:"):
        return decode_data_uri(text, name)
    if _exists(text):
        return Path(text)
    if scheme := re.match(r"[a-z][a-z0-9+.-]+(?=://)", start):
        raise ValueError(f"{name}: expected an http or https URL, got the scheme {scheme[0]!r}")
    if content := _decode_base64(text):
        return content
    if len(text) > _MAX_NAME_LENGTH:
        raise ValueError(
            f"{name}: expected a path, URL or base64 of an image, got a string of {len(text)} characters:"
            f" {text[:24]!r}..."
        )
    return Path(text)


def _exists(text: str) -> bool:
    """Return whether a string is an existing path."""
    try:
        return os.path.lexists(text)
    except (OSError, ValueError):  # base64 may be too long for a path
        return False


def _decode_base64(text: str) -> bytes | None:
    """Return the bytes of a base64 string; None unless they are an image, because a path may look like base64."""
    text = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    if len(text) < _MIN_BASE64_LENGTH:
        return None
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        with Image.open(io.BytesIO(content)):
            return content
    except Image.DecompressionBombError:
        return content
    except Exception:  # not base64, or not an image: the type of PIL's error depends on the format
        return None


def decode_data_uri(text: str, name: str) -> bytes:
    """Return the bytes of a data URI, which is base64 or percent-encoded."""
    try:
        with urllib.request.urlopen("".join(text.split())) as response:
            return bytes(response.read())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: expected a data URI such as 'data:image/png;base64,...', got {text[:24]!r}...: {error}"
        ) from error


def _read(file: IO[bytes], name: str) -> bytes:
    """Read an open file to its end and return the bytes."""
    try:
        content = file.read()
    except UnicodeDecodeError as error:
        raise TypeError(f"{name}: expected a file opened in binary mode, got text mode") from error
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise OSError(f"{name}: the open file cannot be read: {error}") from error
    if not isinstance(content, bytes):
        raise TypeError(
            f"{name}: expected a file opened in binary mode, got one that returns {type(content).__name__}"
        )
    return content
