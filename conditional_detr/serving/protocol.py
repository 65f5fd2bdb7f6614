"""HTTP connections with limits that uvicorn does not set: on the time and size of headers, and on pipelining."""

import asyncio
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from conditional_detr.serving.errors import error_body

_MAX_HEAD = 2**16  # bytes of the request line and headers, or of trailers
_HEADER_COST = 32  # bytes that a header counts beside its name and value, as in HTTP/2
_MAX_PIPELINED = 8
_LINGER_SECONDS = 2.0


class Config(uvicorn.Config):
    """uvicorn's configuration with the time that headers may take."""

    header_seconds: float


class Protocol(HttpToolsProtocol):
    """A connection that is closed if the headers of a request are slow or large.

    What is refused here has not reached the application, which reads bodies and limits their time and size.
    """

    config: Config
    _timer: asyncio.TimerHandle | None = None
    _in_head = False
    _refused = False
    _head_size = 0
    _bytes_without_body = 0  # since the headers or a part of the body ended: endless headers, trailers, extensions

    def connection_made(self, transport: Any) -> None:
        """Wait for the first request."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what the client sends, and limit what is no body."""
        if self._refused:
            return
        if not self._is_answering():
            self._start_timer()  # uvicorn has none for line breaks between requests, and none for bodies nobody reads
        self._bytes_without_body += len(data)
        super().data_received(data)
        if self._bytes_without_body > _MAX_HEAD:
            self._refuse(431, f"expected headers of at most {_MAX_HEAD} bytes, got more", "headers_too_large")

    def on_message_begin(self) -> None:
        """Begin to count the headers of a request."""
        self._start_timer()
        self._in_head, self._head_size = True, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count a part of the request line."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header or trailer."""
        self._count(len(name) + len(value) + _HEADER_COST)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application, or refuse it if too many wait."""
        self._stop_timer()
        self._in_head, self._bytes_without_body = False, 0
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise ValueError(f"expected at most {_MAX_PIPELINED} requests before their answers")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand on a part of the body."""
        self._bytes_without_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a request is complete."""
        self._bytes_without_body = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Note that an answer is complete."""
        super().on_response_complete()
        if self._refused:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or what a callback above refused by an exception."""
        if self._head_size > _MAX_HEAD:
            self._refuse(431, f"expected headers of at most {_MAX_HEAD} bytes, got more", "headers_too_large")
        else:
            self._refuse(400, "expected a valid HTTP request", "invalid_http")

    def shutdown(self) -> None:
        """Close the connection unless a request is arriving; its answer closes it."""
        if not self._in_head:
            super().shutdown()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _count(self, size: int) -> None:
        """Count bytes of headers; an exception makes uvicorn call :meth:`send_400_response`."""
        self._head_size += size
        if self._head_size > _MAX_HEAD:
            raise ValueError("the headers are too large")

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.config.header_seconds, self._time_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        """Refuse headers that are slow; close a connection that sends something else."""
        self._timer = None
        if self._is_answering():  # the headers of a pipelined request wait
            self._start_timer()
        elif self._in_head or self.cycle is None:
            self._refuse(408, f"expected the headers within {self.config.header_seconds:g} s", "request_timeout")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer with an error, unless another answer has begun, and close the connection.

        What the client still sends is discarded for a while: a connection that is closed before would keep some
        clients from reading the answer.
        """
        if self._refused or self.transport.is_closing():
            return
        self._refused, self._in_head = True, False
        self._stop_timer()
        if self.pipeline:  # an earlier request is being answered: the connection is closed after it
            self.pipeline.clear()
            return
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if not (self._is_answering() and self.cycle.response_started):
            body = error_body(status, message, code=code)
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
