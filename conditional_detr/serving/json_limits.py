"""Limits on the structure of JSON, which are checked before it is parsed: small text can become large objects."""

from itertools import accumulate

from conditional_detr.serving.errors import ApiError

_MAX_DEPTH = 64
_MAX_VALUES = 50_000


def check_json(body: bytes) -> None:
    """Check the depth and the number of values of JSON, in time that is linear in its size; its syntax is not checked.

    Raises:
        ApiError: 400 for more than 64 levels or text that is not UTF-8, 413 for more than 50000 values.
    """
    if b"\0" in body:  # UTF-16 and UTF-32, which Python's parser would detect
        raise ApiError(400, "expected JSON in UTF-8, got a null byte", code="invalid_json")
    openings = body.count(b"[") + body.count(b"{")
    if openings <= _MAX_DEPTH and body.count(b",") <= _MAX_VALUES:  # also if all of them were outside of strings
        return
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 4 * _MAX_VALUES:
        raise _too_many()
    outside = b"".join(unescaped.split(b'"')[::2])  # of strings
    brackets = outside.translate(None, bytes(set(range(256)) - set(b"[]{}")))
    if outside.count(b",") + brackets.count(b"[") + brackets.count(b"{") > _MAX_VALUES:
        raise _too_many()
    if max(accumulate(1 if bracket in b"[{" else -1 for bracket in brackets), default=0) > _MAX_DEPTH:
        raise ApiError(400, f"expected JSON of at most {_MAX_DEPTH} levels, got more", code="json_too_deep")


def _too_many() -> ApiError:
    return ApiError(413, f"expected JSON of at most {_MAX_VALUES} values, got more", code="json_too_large")
