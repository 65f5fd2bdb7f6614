"""Answers in OpenAI's shapes: a chat completion or a response, whole or as server-sent events."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conditional_detr.serving.schemas import new_id


def chat_completion(content: Mapping[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """Return a chat completion whose message is the detections as JSON."""
    message = {"role": "assistant", "content": json.dumps(content), "refusal": None}
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": content["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": _chat_usage(content),
        **_further(content, warnings),
    }


def chat_chunks(content: Mapping[str, Any], warnings: Sequence[str], *, usage: bool) -> Iterator[str]:
    """Yield the events of a streamed chat completion: one chunk, the stop chunk, and the end.

    Args:
        content: the detections.
        warnings: what was ignored.
        usage: whether a chunk with the usage comes before the end.
    """
    head = {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": content["model"],
    }

    def chunk(delta: Mapping[str, Any], reason: str | None, further: Mapping[str, Any]) -> str:
        choices = [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        return _event({**head, "choices": choices, **further})

    delta = {"role": "assistant", "content": json.dumps(content)}
    yield chunk(delta, None, _further(content, warnings))
    yield chunk({}, "stop", {})
    if usage:
        yield _event({**head, "choices": [], "usage": _chat_usage(content)})
    yield "data: [DONE]\n\n"


def response(content: Mapping[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """Return a response whose output text is the detections as JSON."""
    part = {"type": "output_text", "text": json.dumps(content), "annotations": [], "logprobs": []}
    message = {"type": "message", "id": new_id("msg_"), "status": "completed", "role": "assistant", "content": [part]}
    images = len(content["images"])
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": content["model"],
        "output": [message],
        "parallel_tool_calls": False,
        "temperature": None,
        "tool_choice": "none",
        "tools": [],
        "top_p": None,
        "usage": {
            "input_tokens": images,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": images,
        },
        **_further(content, warnings),
    }


def response_events(whole: Mapping[str, Any]) -> Iterator[str]:
    """Yield the events of a streamed response."""
    (message,) = whole["output"]
    (part,) = message["content"]
    place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    empty = {**message, "status": "in_progress", "content": []}
    events: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": begun}),
        ("response.output_item.added", {"output_index": 0, "item": empty}),
        ("response.content_part.added", {**place, "part": {**part, "text": ""}}),
        ("response.output_text.delta", {**place, "delta": part["text"], "logprobs": []}),
        ("response.output_text.done", {**place, "text": part["text"], "logprobs": []}),
        ("response.content_part.done", {**place, "part": part}),
        ("response.output_item.done", {"output_index": 0, "item": message}),
        ("response.completed", {"response": whole}),
    ]
    for number, (kind, fields) in enumerate(events):
        yield f"event: {kind}\n" + _event({"type": kind, "sequence_number": number, **fields})


def _event(content: Mapping[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def _chat_usage(content: Mapping[str, Any]) -> dict[str, int]:
    """Return the usage, which counts images."""
    images = len(content["images"])
    return {"prompt_tokens": images, "completion_tokens": 0, "total_tokens": images}


def _further(content: Mapping[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """Return the fields that OpenAI's shapes do not have: the detections as objects, and what was ignored."""
    further = {"detections": content["detections"], "images": content["images"]}
    return {**further, **({"warnings": list(warnings)} if warnings else {})}
