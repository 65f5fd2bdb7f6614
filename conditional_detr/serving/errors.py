"""Errors of the service, in the form that OpenAI's clients turn into their exceptions."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

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
    503: "overloaded_error",
}
_CURED_BY_A_REPEAT = (429, 503)


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
    error: dict[str, Any] = {"message": message, "type": _TYPES.get(status, "server_error"), "param": param}
    return json.dumps({"error": {**error, "code": code}}).encode()
