"""Errors of the service, in the form that OpenAI's clients turn into their exceptions."""

import json
from collections.abc import Mapping

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "overloaded_error",
}
_CURED_BY_A_REPEAT = (429, 503)
_CODES = {404: "not_found", 405: "method_not_allowed"}
_SHOWN = 60  # characters of a wrong value


class ErrorObject(BaseModel):
    """What went wrong: a text for people, its kind, the wrong part of the request, and a short name for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer with an error."""

    error: ErrorObject


class ApiError(HTTPException):
    """An error with a status, a message for people and a code for programs.

    Clients repeat a request that fails with 408, 409, 429 or 5xx, after as many seconds as ``retry-after`` says; the
    header ``x-should-retry`` keeps them from it where a repeat cures nothing.

    Args:
        status: HTTP status, 400 to 599.
        message: what was expected and what was got.
        code: short name of the error.
        param: the part of the request that is wrong.
        retry_after: seconds after which a repeat may succeed.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        repeats = {"x-should-retry": "true" if status in _CURED_BY_A_REPEAT else "false"}
        if retry_after is not None:
            repeats["retry-after"] = str(retry_after)
        super().__init__(status, message, {**repeats, **(headers or {})})
        self.code = code
        self.param = param

    def body(self) -> bytes:
        """Return the error object as JSON."""
        return error_body(self.status_code, self.detail, code=self.code, param=self.param)


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> bytes:
    """Return OpenAI's error object as JSON."""
    error = ErrorObject(message=message, type=_TYPES.get(status, "server_error"), param=param, code=code)
    return json.dumps(ErrorAnswer(error=error).model_dump()).encode()


async def http_error(request: Request, error: Exception) -> Response:
    """Answer with an error of an endpoint, or of the framework, in OpenAI's form."""
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        body = error.body()
    else:
        message = f"{error.detail}: {request.method} {request.url.path[:_SHOWN]}"
        body = error_body(error.status_code, message, code=_CODES.get(error.status_code, "invalid_request"))
    return Response(body, error.status_code, error.headers, media_type="application/json")


async def invalid_request(request: Request, error: Exception) -> Response:
    """Answer 400 with what was expected where, and the start of what was got."""
    assert isinstance(error, RequestValidationError | ValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        body = error_body(400, f"expected a body in JSON: {first['ctx']['error']}", code="invalid_json")
        return Response(body, 400, media_type="application/json")
    place = [str(part) for part in first["loc"]]
    place = place[1:] if place[:1] in (["body"], ["query"]) else place
    message = f"{'.'.join(place) or 'body'}: {first['msg']}"
    if first["type"] != "missing":
        got = repr(first.get("input"))
        message += f", got {got if len(got) <= _SHOWN else f'{got[:_SHOWN]}...'}"
    body = error_body(400, message, code="invalid_request", param=place[0] if place else None)
    return Response(body, 400, media_type="application/json")


async def internal_error(request: Request, error: Exception) -> Response:
    """Answer 500; what happened is in the log, and a repeat would not help."""
    answered = ApiError(500, "the service failed", code="internal_error")
    return Response(answered.body(), 500, answered.headers, media_type="application/json")
