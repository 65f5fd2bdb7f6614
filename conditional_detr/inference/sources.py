"""Where images come from: whatever a program hands over becomes something that can be opened, and opened again.

A path stays a path; an address is fetched, base64 decoded and an open file read, all to bytes.
"""

import base64
import http.client
import io
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | Tensor
"""A file's path, an http(s) address, a data URI or base64; a file's bytes or an open binary file; a PIL image of any
mode; an array (H, W, 3), (H, W, 4) or (H, W); a tensor (3, H, W), (4, H, W) or (1, H, W).

Arrays and tensors are RGB, RGBA or grey: uint8, uint16, or floating point in [0, 1].
"""

ReadableSource: TypeAlias = Path | bytes | Image.Image | np.ndarray | Tensor
"""An image that can be opened any number of times, without a network."""

_CHUNK = 1 << 16
_SHORTEST_BASE64 = 32  # characters; the smallest images there are have 26 bytes
_LONGEST_FILE_NAME = 255


class Limits(NamedTuple):
    """How much of an address is fetched.

    Attributes:
        timeout: seconds until the last byte must be there.
        max_bytes: the largest file.
    """

    timeout: float = 10.0
    max_bytes: int = 64 * 2**20


DEFAULT_LIMITS = Limits()
"""What holds unless said otherwise."""


def is_single_image(images: object) -> bool:
    """Tell an image from a collection of images."""
    # a runtime check takes no os.PathLike[str]
    one = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor  # type: ignore[type-arg]
    return isinstance(images, one) or hasattr(images, "read")


def source_name(image: object, place: str) -> str:
    """Return what messages call an image: its path or address, else its place among the images."""
    if isinstance(image, os.PathLike):
        return str(image)
    if isinstance(image, str) and 0 < len(image) <= _LONGEST_FILE_NAME and not image.startswith("data:"):
        return image
    return place


def resolve_source(image: ImageSource, name: str, limits: Limits = DEFAULT_LIMITS) -> ReadableSource:
    """Bring an image here, whatever it comes as.

    Args:
        image: the image.
        name: what messages call it if it has no path or address of its own, such as ``images[3]``.
        limits: for addresses.

    Raises:
        OSError: an address that cannot be fetched, or takes too long; an open file that cannot be read.
        TypeError: not a kind of image.
        ValueError: an address or base64 that is none, or a file above the limit.
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
        f"{name}: expected a path, address, base64, bytes, open file, PIL image, array or tensor,"
        f" got {type(image).__name__}"
    )


def _resolve_string(text: str, name: str, limits: Limits) -> Path | bytes:
    """Tell apart what a string may be: an address, a data URI, a path, base64."""
    if not text:
        raise ValueError(f"{name}: expected a path, address or base64, got an empty string")
    start = text[:16].lower()
    if start.startswith(("http://", "https://")):
        return _fetch_url(text, name, limits)
    if start.startswith("data:"):
        return _decode_data_uri(text, name)
    if _exists(text):
        return Path(text)
    if scheme := re.match(r"[a-z][a-z0-9+.-]+(?=://)", start):
        raise ValueError(f"{name}: expected an http or https address, got one of scheme {scheme[0]!r}")
    if content := _decode_base64(text):
        return content
    if len(text) > _LONGEST_FILE_NAME:
        raise ValueError(
            f"{name}: expected a path, address or base64 of an image, got {len(text)} characters that are none of"
            f" them: {text[:24]!r}..."
        )
    return Path(text)


def _exists(text: str) -> bool:
    """Tell whether a string is the path of anything; base64 may be too long for one."""
    try:
        return os.path.lexists(text)
    except (OSError, ValueError):
        return False


def _decode_base64(text: str) -> bytes | None:
    """Return what base64 stands for; None if it is none, or of no image (a short path may look like base64)."""
    text = "".join(text.split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    if len(text) < _SHORTEST_BASE64:
        return None
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        with Image.open(io.BytesIO(content)):
            return content
    except Image.DecompressionBombError:
        return content
    except Exception:  # no base64, or no image; what PIL raises of the latter differs from format to format
        return None


def _decode_data_uri(text: str, name: str) -> bytes:
    """Return what stands in a data URI, in base64 or percent-encoded."""
    try:
        with urllib.request.urlopen("".join(text.split())) as response:
            return bytes(response.read())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: expected a data URI such as 'data:image/png;base64,...', got {text[:24]!r}...: {error}"
        ) from error


def _read(file: IO[bytes], name: str) -> bytes:
    """Read an open file to its end."""
    try:
        content = file.read()
    except UnicodeDecodeError as error:
        raise TypeError(f"{name}: expected a file opened in binary mode, got one in text mode") from error
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise OSError(f"{name}: the open file cannot be read: {error}") from error
    if not isinstance(content, bytes):
        raise TypeError(f"{name}: expected a file opened in binary mode, got one that gives {type(content).__name__}")
    return content


def _fetch_url(url: str, name: str, limits: Limits) -> bytes:
    """Fetch an address within the limits, however slowly its server goes on or wrong it tells a length.

    A thread does it, and is left to itself at the deadline: only so are slow headers and redirects cut short, too.
    """
    deadline = time.monotonic() + limits.timeout
    done: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put(_download(url, name, limits, deadline))
        except (OSError, http.client.HTTPException, ValueError) as error:
            done.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        outcome = done.get(timeout=limits.timeout)
    except queue.Empty:
        outcome = TimeoutError(f"timed out after {limits.timeout} s")
    if isinstance(outcome, _TooLargeError):
        raise outcome
    if isinstance(outcome, Exception):
        raise OSError(f"{name}: the address cannot be fetched: {outcome}") from outcome
    return outcome


class _TooLargeError(ValueError):
    """A file above the limit."""


def _download(url: str, name: str, limits: Limits, deadline: float) -> bytes:
    """Read what an address gives, and stop where it is too much or too late."""
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters beyond ASCII
    request = urllib.request.Request(quoted, headers={"User-Agent": "conditional-detr"})
    try:
        with urllib.request.urlopen(request, timeout=limits.timeout) as response:
            declared = int(response.headers.get("Content-Length") or 0)
            content = bytearray()
            while max(declared, len(content)) <= limits.max_bytes and time.monotonic() < deadline:
                chunk = response.read1(_CHUNK)  # what has come by now, so that the deadline is looked at in time
                if not chunk:
                    break
                content += chunk
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise
    size = max(declared, len(content))
    if size > limits.max_bytes:
        raise _TooLargeError(f"{name}: expected at most {limits.max_bytes} bytes, got {size} or more")
    if len(content) < declared:
        raise OSError(f"broke off after {len(content)} of {declared} bytes")
    return bytes(content)
