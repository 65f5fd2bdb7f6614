"""What every request passes before the application sees it: key, rate, admission, body; and what is logged of it."""

import asyncio
import json
import logging
import math
import re
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from limits import parse
from limits.aio.storage import Storage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.storage import storage_from_string
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from conditional_detr.serving.errors import ApiError
from conditional_detr.serving.json_limits import check_json
from conditional_detr.serving.keys import ApiKeys
from conditional_detr.serving.service import LOG, DetectionService

_OPEN = ("/health/live", "/health/ready", "/", "/favicon.ico")  # without a key
_OPEN_FOLDERS = ("/page/",)
ROUTES = {
    *("/", "/docs", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/v1/models"),
    *("/v1/attention", "/v1/chat/completions", "/v1/detect", "/v1/infer", "/v1/responses"),
}
"""Paths with names of their own in log and metrics."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLOSE = {"connection": "close"}
_MAX_DIGITS = 18  # of a length
_MAX_MESSAGE = 300  # characters of an error's message in the log
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 * 2**20
_SECURITY = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


@dataclass
class _Progress:
    """What is known of a request for its log line."""

    request_id: str
    key: str | None = None
    status: int = 500
    started: bool = False
    bytes: int = 0
    error: str | None = None
    began: float = field(default_factory=time.perf_counter)


class Gate:
    """ASGI middleware around the application.

    In this order: requests get an id; those without a key are refused with 401; those above the rate of their key with
    429; those that the service has no room for with 503. The body is read within limits of size and time, and given to
    the application as a whole. Each request becomes one line of JSON in the log, without key and images.

    Args:
        app: the application.
        service: has the limits, and counts the requests.
        keys: the known keys; None: none is needed.
        policies: Content-Security-Policy by path.

    Attributes:
        draining: whether the service is shutting down: connections are closed after their answers.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: DetectionService,
        keys: ApiKeys | None,
        policies: Mapping[str, str],
    ) -> None:
        self.app = app
        self.service = service
        self.settings = service.settings
        self.metrics = service.metrics
        self.keys = keys
        self.policies = policies
        self.draining = False
        self._admitted = 0
        self._bytes = 0
        self._rate = parse(self.settings.rate_limit) if self.settings.rate_limit else None
        if self._rate:
            storage: Any = storage_from_string(f"async+{self.settings.rate_storage}")
            assert isinstance(storage, Storage)
            self._limiter = MovingWindowRateLimiter(storage)

    def start_draining(self) -> None:
        """Say that the service is shutting down: it is no longer ready, and answers close their connections."""
        self.draining = True
        self.service.ready = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "websocket":  # there is none
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        progress = _Progress(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        logged: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = logged

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                progress.started, progress.status = True, message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = progress.request_id
                answered.update({name: value for name, value in _SECURITY.items() if name not in answered})
                if policy := self.policies.get(scope["path"]):
                    answered["content-security-policy"] = policy
                if self.draining:
                    answered["connection"] = "close"
            await send(message)

        self.metrics.in_progress.inc()
        try:
            await self._serve(scope, headers, receive, answer, progress)
        except ApiError as error:
            await _refuse(error, receive, answer)
        except asyncio.CancelledError:
            if not self.draining or progress.started:
                raise
            message = "the service is shutting down, and the request was not finished in time"
            await _refuse(ApiError(503, message, code="shutting_down", retry_after=1), receive, answer)
        except Exception as error:  # if the answer has begun, the server closes the connection
            progress.error = _trace(error)
            if not progress.started:
                await _refuse(ApiError(500, "the service failed", code="internal_error"), receive, answer)
        finally:
            self.metrics.in_progress.dec()
            self._record(scope, progress, logged)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, send: Send, progress: _Progress) -> None:
        """Check a request, read its body and call the application.

        Raises:
            ApiError: it is refused.
        """
        path = scope["path"]
        if self.keys and not (path in _OPEN or path.startswith(_OPEN_FOLDERS)):
            progress.key = self.keys.identify(headers.get("authorization", ""))
            if progress.key is None:
                raise ApiError(
                    401,
                    "expected a known API key in the header 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        await self._check_rate(progress.key or _address(scope))
        self._check_room()
        try:
            body = await self._read(headers, receive, progress)
            if headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
                check_json(body)
            self._check_room()
            self._admitted += 1  # not before the body is here: slow clients would fill the queue
            try:
                await self.app(scope, _replayed(body, receive), send)
            finally:
                self._admitted -= 1
        finally:
            self._bytes -= progress.bytes

    def _check_room(self) -> None:
        """Raise ApiError 503 if the queue is full."""
        if self._admitted >= self.settings.max_queue:
            raise self._full(f"the service has {self._admitted} requests, its limit")

    async def _check_rate(self, key: str) -> None:
        """Count a request of a key; raise ApiError 429 above the rate."""
        if self._rate is None or await self._limiter.hit(self._rate, key):
            return
        window = await self._limiter.get_window_stats(self._rate, key)
        raise ApiError(
            429,
            f"expected at most {self._rate} for this key, got more",
            code="rate_limit_exceeded",
            retry_after=max(math.ceil(window.reset_time - time.time()), 1),
        )

    async def _read(self, headers: Headers, receive: Receive, progress: _Progress) -> bytes:
        """Read the body and return it."""
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > _MAX_DIGITS or int(length) > self.settings.max_body):
            raise self._too_large(f"{length[:_MAX_DIGITS]} bytes")
        body = bytearray()

        async def collect() -> None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client closed the connection", code="disconnected")
                part, more = message.get("body", b""), message.get("more_body", False)
                progress.bytes += len(part)
                self._bytes += len(part)
                if progress.bytes > self.settings.max_body:
                    raise self._too_large("more")
                if self._bytes > self.settings.max_bodies:
                    raise self._full("the bodies of all requests are above their limit")
                body.extend(part)

        try:
            await asyncio.wait_for(collect(), self.settings.body_seconds)
        except asyncio.TimeoutError:
            message = f"expected the whole body within {self.settings.body_seconds:g} s"
            raise ApiError(408, message, code="request_timeout", headers=_CLOSE) from None
        return bytes(body)

    def _too_large(self, got: str) -> ApiError:
        message = f"expected a body of at most {self.settings.max_body} bytes, got {got}"
        return ApiError(413, message, code="body_too_large", headers=_CLOSE)

    def _full(self, why: str) -> ApiError:
        return ApiError(503, f"{why}; try again", code="overloaded", retry_after=1)

    def _record(self, scope: Scope, progress: _Progress, logged: Mapping[str, Any]) -> None:
        """Log a request and count it."""
        seconds = time.perf_counter() - progress.began
        route = _route(scope)
        self.metrics.requests.labels(route, progress.status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "request_id": progress.request_id,
            "method": scope["method"],
            "route": route,
            "status": progress.status,
            "seconds": round(seconds, 4),
            **({"key": progress.key} if progress.key else {}),
            **logged,
            **({"error": progress.error} if progress.error else {}),
        }
        LOG.log(logging.ERROR if progress.error else logging.INFO, json.dumps(line))


def _trace(error: BaseException) -> str:
    """Return types and locations of an error and its causes, and of system errors the message.

    Other messages may have parts of the request, which are not to be logged.
    """
    lines = []
    cause: BaseException | None = error
    while cause is not None:
        message = f": {str(cause)[:_MAX_MESSAGE]}" if isinstance(cause, RuntimeError | MemoryError) else ""
        lines += [*traceback.format_tb(cause.__traceback__), f"{type(cause).__name__}{message}\n"]
        cause = cause.__cause__ or cause.__context__
    return "".join(lines)


async def _refuse(error: ApiError, receive: Receive, send: Send) -> None:
    """Answer with an error.

    If the connection is to be closed, what the client still sends is read for a while: a closed connection would keep
    some clients from reading the answer.
    """
    body = error.body()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(error.headers or {})}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": raw})
    closes = headers.get("connection") == "close"
    await send({"type": "http.response.body", "body": body, "more_body": closes})
    if closes:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), _LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive) -> None:
    """Read what a client sends and forget it."""
    left = _LINGER_BYTES
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a function that gives a whole body to the application, and then what the server says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _address(scope: Scope) -> str:
    """Return the client's address, which stands for its key where there are none."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _route(scope: Scope) -> str:
    """Return the route of a request for metrics: strangers choose the path, so unknown ones have one name."""
    path = str(scope["path"])
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    return path if path in ROUTES else "other"
