"""Images of requests: bytes, base64, data URIs and URLs. A string is never a path."""

import base64
import io

from PIL import Image

from conditional_detr.inference.downloads import Limits, fetch_url
from conditional_detr.inference.url_guard import RefusedUrlError
from conditional_detr.serving.errors import ApiError

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
_ALPHABET = bytes.maketrans(b"-_", b"+/")
_ESCAPED = (("%2B", "+"), ("%2b", "+"), ("%2F", "/"), ("%2f", "/"), ("%3D", "="), ("%3d", "="))


def is_url(text: str) -> bool:
    """Return whether a string is to be downloaded."""
    return text[:8].lower().startswith(("http://", "https://"))


def download(url: str, name: str, limits: Limits) -> bytes:
    """Download an image within the limits.

    Raises:
        ApiError: 400 if the URL is refused or cannot be fetched, 413 if the file is too large.
    """
    try:
        return fetch_url(url, name, limits)
    except RefusedUrlError as error:
        raise ApiError(400, f"{name}: {_without_url(error, name)}", code="url_refused", param=name) from error
    except OSError as error:
        raise ApiError(400, f"{name}: {_without_url(error, name)}", code="url_unreachable", param=name) from error
    except ValueError as error:
        raise ApiError(413, str(error), code="image_too_large", param=name) from error


def decode(text: str, name: str) -> bytes:
    """Return the bytes of base64, alone or in a data URI; both of its alphabets are read, with padding or without.

    Raises:
        ApiError: 400 if it is neither.
    """
    try:
        return _decode_base64(_base64_of(text) if text[:5].lower() == "data:" else text)
    except ValueError as error:
        message = f"{name}: expected an image as a data URI such as 'data:image/png;base64,...', as base64"
        raise ApiError(
            400, f"{message} or as an http(s) URL, got {text[:24]!r}", code="invalid_image", param=name
        ) from error


def check_header(content: bytes, name: str, max_pixels: int) -> None:
    """Read the header of an image and refuse unusual formats and too many pixels; opening it raises all other errors.

    The formats are those whose header has the size that is decoded. An icon, for one, holds a further image of any
    size.

    Raises:
        ApiError: 400 or 413.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, (width, height) = image.format, image.size
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(name, max_pixels, "more") from error
    except Exception:  # the type of PIL's error depends on the format
        return
    if kind not in _FORMATS:
        raise ApiError(
            400, f"{name}: expected one of {', '.join(_FORMATS)}, got {kind}", code="invalid_image", param=name
        )
    if width * height > max_pixels:
        raise _too_many_pixels(name, max_pixels, f"{width} x {height}")


def _too_many_pixels(name: str, max_pixels: int, got: str) -> ApiError:
    message = f"{name}: expected at most {max_pixels} pixels, got {got}"
    return ApiError(413, message, code="image_too_large", param=name)


def _base64_of(uri: str) -> str:
    """Return the base64 of a data URI, with the characters that some clients escape."""
    head, comma, data = uri.partition(",")
    if not comma or not head.rstrip().lower().endswith(";base64"):
        raise ValueError("expected base64")
    for escaped, plain in _ESCAPED:
        data = data.replace(escaped, plain)
    return data


def _decode_base64(text: str) -> bytes:
    # no list of parts: of 32 MB with spaces it would take a gigabyte
    plain = text.encode("ascii").translate(_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
    return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)


def _without_url(error: Exception, name: str) -> str:
    """Return an error's message without the name at its start."""
    return str(error).removeprefix(f"{name}: ")
