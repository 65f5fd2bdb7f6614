"""Resolve any kind of image source to one that can be opened several times, without a network.

A path stays a path. A URL is downloaded, base64 decoded and an open file read, all to bytes.
"""

import base64
import http.client
import io
import os
import queue
import re
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | Tensor
"""A file path, an http(s) URL, a data URI or base64; a file's bytes or an open binary file; a PIL image of any mode;
an array (H, W, 3), (H, W, 4) or (H, W); a tensor (3, H, W), (4, H, W) or (1, H, W).

Arrays and tensors are RGB, RGBA or grey: uint8, uint16, or floating point in [0, 1].
"""

ReadableSource: TypeAlias = Path | bytes | Image.Image | np.ndarray | Tensor
"""An image that can be opened any number of times, without a network."""

DOWNLOAD = "conditional_detr_download"
"""Name of the threads of downloads."""

_CHUNK = 1 << 16
_MIN_BASE64_LENGTH = 32  # characters; the smallest image files have 26 bytes
_MAX_NAME_LENGTH = 255


class Limits(NamedTuple):
    """Limits of a download.

    Attributes:
        timeout: seconds for the whole download.
        max_bytes: largest size of the file.
    """

    timeout: float = 10.0
    max_bytes: int = 64 * 2**20


DEFAULT_LIMITS = Limits()
"""The limits used by default: 10 seconds and 64 MiB."""


def is_single_image(images: object) -> bool:
    """Return True for one image and False for a collection of images."""
    # a runtime check takes no os.PathLike[str]
    one = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | Tensor  # type: ignore[type-arg]
    return isinstance(images, one) or hasattr(images, "read")


def source_name(image: object, default: str) -> str:
    """Return the name of an image for messages: its path or URL; ``default`` if it has neither."""
    if isinstance(image, os.PathLike):
        return str(image)
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
        ValueError: an invalid URL or base64 string, or a download above the limit.
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


def file_state(source: ReadableSource) -> tuple[int, int] | None:
    """Return the modification time and the size of a file; None for other sources, and for a missing file."""
    if not isinstance(source, Path):
        return None
    try:
        state = source.stat()
    except OSError:  # opening the file raises the documented error
        return None
    return state.st_mtime_ns, state.st_size


def _resolve_string(text: str, name: str, limits: Limits) -> Path | bytes:
    """Resolve a string that is a URL, a data URI, a path or base64."""
    if not text:
        raise ValueError(f"{name}: expected a path, URL or base64, got an empty string")
    start = text[:16].lower()
    if start.startswith(("http://", "https://")):
        return _fetch_url(text, name, limits)
    if start.startswith("data:"):
        return _decode_data_uri(text, name)
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


def _decode_data_uri(text: str, name: str) -> bytes:
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


def _fetch_url(url: str, name: str, limits: Limits) -> bytes:
    """Fetch a URL within the limits and return the bytes, also if the server is slow or sends a wrong length.

    The download runs in a thread, because urllib's timeout limits each read, not the total time of slow headers and
    redirects. At the deadline its connections are shut down, which ends the thread.
    """
    download = _Download(url, name, limits)
    done: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put(download.run())
        except (OSError, http.client.HTTPException, ValueError) as error:
            done.put(error)

    threading.Thread(target=work, name=DOWNLOAD, daemon=True).start()
    try:
        outcome = done.get(timeout=limits.timeout)
    except queue.Empty:
        outcome = TimeoutError(f"timed out after {limits.timeout} s")
    finally:
        download.stop()
    if isinstance(outcome, _TooLargeError):
        raise outcome
    if isinstance(outcome, Exception):
        raise OSError(f"{name}: the URL cannot be fetched: {outcome}") from outcome
    return outcome


class _TooLargeError(ValueError):
    """A download above the limit."""


class _Download:
    """A download that another thread can stop.

    Args:
        url: the URL, http or https.
        name: name for messages.
        limits: the size limit, and the timeout of each read.
    """

    def __init__(self, url: str, name: str, limits: Limits) -> None:
        self.url, self.name, self.limits = url, name, limits
        self._lock = threading.Lock()
        self._stopped = False
        self._connections: list[_HttpConnection] = []

    def run(self) -> bytes:
        """Download the URL and return the bytes; stop at the size limit."""
        quoted = urllib.parse.quote(self.url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters beyond ASCII
        request = urllib.request.Request(quoted, headers={"User-Agent": "conditional-detr"})
        opener = urllib.request.build_opener(_Opener(self))
        try:
            with opener.open(request, timeout=self.limits.timeout) as response:
                declared = int(response.headers.get("Content-Length") or 0)
                content = bytearray()
                while max(declared, len(content)) <= self.limits.max_bytes and (chunk := response.read(_CHUNK)):
                    content += chunk
        except urllib.error.HTTPError as error:
            error.close()  # the error holds the connection
            raise
        size = max(declared, len(content))
        if size > self.limits.max_bytes:
            raise _TooLargeError(f"{self.name}: expected at most {self.limits.max_bytes} bytes, got {size} or more")
        if len(content) < declared:
            raise OSError(f"expected {declared} bytes, got {len(content)}")
        return bytes(content)

    def stop(self) -> None:
        """Shut down the connections, present and future; reads that are waiting end."""
        with self._lock:
            self._stopped = True
            for connection in self._connections:
                connection.shut_down()

    def add(self, connection: "_HttpConnection") -> None:
        """Add a connection of this download, before it connects."""
        with self._lock:
            self._connections.append(connection)
        self.check()

    def check(self) -> None:
        """Raise TimeoutError if the download is stopped."""
        if self._stopped:
            raise TimeoutError("stopped")


class _HttpConnection(http.client.HTTPConnection):
    """A connection that another thread can shut down."""

    download: _Download
    kept: socket.socket | None = None

    def connect(self) -> None:
        self.download.add(self)
        super().connect()
        self.kept = self.sock.dup()  # TLS replaces the socket itself
        try:
            self.download.check()  # a name server or a proxy may have been slow
        except TimeoutError:
            self.kept.close()
            raise

    def shut_down(self) -> None:
        """End the reads that are waiting; the thread that reads closes the socket itself."""
        for end in (self.kept, self.sock):
            if end is not None:
                with suppress(OSError):  # the server may have closed it
                    end.shutdown(socket.SHUT_RDWR)
        if self.kept is not None:
            self.kept.close()


class _HttpsConnection(http.client.HTTPSConnection, _HttpConnection):
    """The same over TLS; in the order of base classes, the handshake follows the registration."""


class _Opener(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens the connections of a download."""

    def __init__(self, download: _Download) -> None:
        super().__init__()
        self._download = download

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._connection, _HttpConnection), request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._connection, _HttpsConnection), request)

    def _connection(self, kind: type[_HttpConnection], host: str, **options: Any) -> _HttpConnection:
        connection = kind(host, **options)
        connection.download = self._download
        return connection
