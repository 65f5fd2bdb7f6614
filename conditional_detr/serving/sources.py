"""Images of requests: bytes, base64, data URIs and URLs. A string is never a path."""

import base64
import binascii
import io

from PIL import Image

from conditional_detr.inference.downloads import Limits, fetch_url
from conditional_detr.inference.sources import decode_data_uri
from conditional_detr.inference.url_guard import RefusedUrlError
from conditional_detr.serving.errors import ApiError


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
    """Return the bytes of a data URI or base64.

    Raises:
        ApiError: 400 if it is neither.
    """
    try:
        if text[:5].lower() == "data:":
            return decode_data_uri(text, name)
        return base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        message = f"{name}: expected an image as a data URI such as 'data:image/png;base64,...', as base64"
        raise ApiError(
            400, f"{message} or as an http(s) URL, got {text[:24]!r}", code="invalid_image", param=name
        ) from error


def check_pixels(content: bytes, name: str, max_pixels: int) -> None:
    """Read the header of an image and refuse it if it has too many pixels; opening it raises all other errors.

    Raises:
        ApiError: 413.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except Exception:  # the type of PIL's error depends on the format
        return
    if width * height > max_pixels:
        raise ApiError(
            413,
            f"{name}: expected at most {max_pixels} pixels, got {width} x {height}",
            code="image_too_large",
            param=name,
        )


def _without_url(error: Exception, name: str) -> str:
    """Return an error's message without the name at its start."""
    return str(error).removeprefix(f"{name}: ")
