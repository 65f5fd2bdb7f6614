"""Download images within limits of time and size."""

import http.client
import queue
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from functools import partial
from typing import IO, Any, NamedTuple

from conditional_detr.inference.url_guard import RefusedUrlError, UrlGuard

DOWNLOAD = "conditional_detr_download"
"""Name of the threads of downloads."""

_CHUNK = 1 << 16
_MAX_GUARDED_REDIRECTS = 3


class Limits(NamedTuple):
    """Limits of a download.

    Attributes:
        timeout: seconds for the whole download.
        max_bytes: largest size of the file.
        guard: which URLs may be downloaded; None for all, which is for URLs that the program's own user gives.
    """

    timeout: float = 10.0
    max_bytes: int = 64 * 2**20
    guard: UrlGuard | None = None


DEFAULT_LIMITS = Limits()
"""The limits used by default: 10 seconds and 64 MiB."""


def fetch_url(url: str, name: str, limits: Limits) -> bytes:
    """Fetch a URL within the limits and return the bytes, also if the server is slow or sends a wrong length.

    The download runs in a thread, because urllib's timeout limits each read, not the total time of slow headers and
    redirects. At the deadline its connections are shut down, which ends the thread.

    Raises:
        OSError: the URL cannot be fetched or takes too long.
        RefusedUrlError: the guard of the limits refuses the URL or one that it redirects to.
        ValueError: the download is above the limit.
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
    if isinstance(outcome, RefusedUrlError):
        raise RefusedUrlError(f"{name}: the URL is refused: {outcome}") from outcome
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
        limits: the size limit, the timeout of each read, and the guard.
    """

    def __init__(self, url: str, name: str, limits: Limits) -> None:
        self.url, self.name, self.limits = url, name, limits
        self._lock = threading.Lock()
        self._stopped = False
        self._connections: list[_HttpConnection] = []

    def run(self) -> bytes:
        """Download the URL and return the bytes; stop at the size limit."""
        handlers: list[urllib.request.BaseHandler] = [_Opener(self), _Redirects(self.limits.guard)]
        if self.limits.guard:
            self.limits.guard.check_url(self.url)
            handlers.append(urllib.request.ProxyHandler({}))
        quoted = urllib.parse.quote(self.url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters beyond ASCII
        request = urllib.request.Request(quoted, headers={"User-Agent": "conditional-detr"})
        opener = urllib.request.build_opener(*handlers)
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
        if self.download.limits.guard:
            self.sock = self._connect_guarded(self.download.limits.guard)
        else:
            super().connect()
        self.kept = self.sock.dup()  # TLS replaces the socket itself
        try:
            self.download.check()  # a name server or a proxy may have been slow
        except TimeoutError:
            self.kept.close()
            raise

    def _connect_guarded(self, guard: UrlGuard) -> socket.socket:
        """Connect to the first address that answers, without another look-up."""
        failure = OSError("the host has no address")
        for family, address in guard.resolve(self.host, self.port):
            self.download.check()
            connecting = socket.socket(family, socket.SOCK_STREAM)
            try:
                connecting.settimeout(self.timeout)
                connecting.connect(address)
            except OSError as error:
                connecting.close()
                failure = error
            else:
                return connecting
        raise failure

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


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows the redirects of a download that its guard allows."""

    def __init__(self, guard: UrlGuard | None) -> None:
        self._guard = guard
        self._followed = 0

    def redirect_request(
        self,
        request: urllib.request.Request,
        response: IO[bytes],
        code: int,
        message: str,
        headers: http.client.HTTPMessage,
        url: str,
    ) -> urllib.request.Request | None:
        response.close()  # urllib would read its body, of any length
        if self._guard:
            self._followed += 1
            if self._followed > _MAX_GUARDED_REDIRECTS:
                raise RefusedUrlError(f"more than {_MAX_GUARDED_REDIRECTS} redirects")
            self._guard.check_url(url, redirected_from=request.full_url)
        return super().redirect_request(request, response, code, message, headers, url)
