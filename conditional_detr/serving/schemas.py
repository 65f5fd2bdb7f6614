"""Bodies of requests and answers: OpenAI's chat completions and responses, and the plainer ones."""

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from conditional_detr.inference.detections import Detections
from conditional_detr.serving.errors import ApiError
from conditional_detr.serving.served_model import Options

_MAX_WARNINGS = 20
_WITHOUT_EFFECT = ("stream_options", "response_format", "text", "store", "user", "metadata")  # and no warning

Number = Annotated[float, Field(strict=True)]
Count = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class OptionFields(BaseModel):
    """Options at the top level of a body, in a text part, or under "parameters"."""

    model_config = ConfigDict(extra="allow")

    threshold: Number | None = Field(None, description="Report detections with a higher score, in [0, 1].")
    top_k: Count | None = Field(None, description="Report at most this many detections per image.")
    classes: list[str | Count] | None = Field(None, description="Class names or rows to report; default: all.")
    tile: Count | list[Count] | None = Field(None, description="Side of tiles in pixels, or height and width.")
    overlap: Number | None = Field(None, description="Least overlap of tiles, as a fraction; default: 0.25.")
    augment: Flag | None = Field(None, description="Detect also on mirrored and smaller images.")

    def options(self) -> Options:
        """Return the options."""
        return Options(**{name: getattr(self, name) for name in Options._fields})


class _Request(OptionFields):
    model: str | None = Field(None, description="Name of the model; default: the first one.")
    stream: Flag | None = Field(None, description="Send the answer as server-sent events.")


class ChatMessage(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(_Request):
    """A chat completion: images as ``image_url`` parts of the user's messages."""

    messages: list[ChatMessage]


class ResponsesRequest(_Request):
    """A response: images as ``input_image`` parts."""

    input: str | list[dict[str, Any]]


class DetectRequest(BaseModel):
    """An image in base64, as transformers' pipelines on a server take it."""

    model_config = ConfigDict(extra="forbid")

    inputs: str = Field(description="The image in base64, a data URI or a URL.")
    parameters: OptionFields = Field(default_factory=lambda: OptionFields.model_validate({}))
    model: str | None = None


class InferInput(BaseModel):
    """An image of a request to ``/v1/infer``."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"] = "image_url"
    url: str


class InferRequest(OptionFields):
    """Images as NVIDIA NIM's object detection takes them."""

    input: list[InferInput]
    model: str | None = None


class Box(BaseModel):
    """Corners in pixels of the upright image."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


class Detected(BaseModel):
    """An object, as transformers' pipelines describe it."""

    label: str
    score: float
    box: Box


class Collected:
    """Images, options and warnings of a request, collected from its parts in order.

    Attributes:
        images: bytes, data URIs, base64 or URLs.
        warnings: what was ignored.
        options: the options of the request.
    """

    def __init__(self, body: _Request) -> None:
        self.images: list[str] = []
        self.warnings: list[str] = []
        self.options = body.options()
        unused = [name for name in (body.model_extra or {}) if name not in _WITHOUT_EFFECT]
        if unused:
            self.warn(f"ignored: {', '.join(sorted(unused)[:_MAX_WARNINGS])}")

    def warn(self, text: str) -> None:
        """Add a warning to the answer."""
        if len(self.warnings) < _MAX_WARNINGS:
            self.warnings.append(text[:500])

    def add_text(self, text: str, where: str) -> None:
        """Read options from a text part that is a JSON object; warn of any other text.

        Raises:
            ApiError: 400 for an option of the wrong type, or that stands twice with different values.
        """
        try:
            found = json.loads(text) if text.lstrip().startswith("{") else None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            if text.strip():
                self.warn(f"{where}: ignored: text is read only if it is a JSON object with options")
            return
        body = OptionFields.model_validate(found)
        given = {name: value for name, value in body.options()._asdict().items() if value is not None}
        for name, value in given.items():
            before = getattr(self.options, name)
            if before not in (None, value):
                raise ApiError(400, f"{name}: got {before} and, in {where}, {value}", code="bad_option", param=name)
        self.options = self.options._replace(**given)
        if body.model_extra:
            self.warn(f"{where}: ignored: {', '.join(sorted(body.model_extra)[:_MAX_WARNINGS])}")

    def add_image(self, image: Any, where: str) -> None:
        """Add an image.

        Raises:
            ApiError: 400 if it is no string.
        """
        if not isinstance(image, str) or not image:
            raise ApiError(400, f"{where}: expected a URL, a data URI or base64", code="invalid_image", param=where)
        self.images.append(image)


def read_chat(body: ChatRequest) -> Collected:
    """Collect the images and options of a chat.

    Raises:
        ApiError: 400 for a part of an unknown type.
    """
    collected = Collected(body)
    for i, message in enumerate(body.messages):
        parts = message.content
        if message.role != "user":
            if parts:
                collected.warn(f"messages[{i}]: ignored: only messages of the role 'user' are read")
            continue
        for j, part in enumerate([{"type": "text", "text": parts}] if isinstance(parts, str) else parts or []):
            where = f"messages[{i}].content[{j}]"
            kind = part.get("type")
            if kind == "text":
                collected.add_text(str(part.get("text", "")), where)
            elif kind == "image_url":
                image = part.get("image_url")
                collected.add_image(image.get("url") if isinstance(image, dict) else image, where)
            else:
                raise _unknown_part(kind, "text or image_url", where)
    return collected


def read_responses(body: ResponsesRequest) -> Collected:
    """Collect the images and options of a request to ``/v1/responses``.

    Raises:
        ApiError: 400 for a part of an unknown type, or content that is neither text nor a list of parts.
    """
    collected = Collected(body)
    items: list[dict[str, Any]] = (
        [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    )
    for i, item in enumerate(items):
        # parts may stand alone or in messages
        parts = item.get("content") if "content" in item else [item]
        if item.get("role", "user") != "user":
            collected.warn(f"input[{i}]: ignored: only messages of the role 'user' are read")
            continue
        parts = [{"type": "input_text", "text": parts}] if isinstance(parts, str) else parts
        if not isinstance(parts, list):
            where = f"input[{i}].content"
            got = type(parts).__name__
            raise ApiError(400, f"{where}: expected text or a list of parts, got {got}", code="bad_part", param=where)
        for j, part in enumerate(parts):
            where = f"input[{i}].content[{j}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("input_text", "text"):
                collected.add_text(str(part.get("text", "")), where)
            elif kind == "input_image":
                collected.add_image(part.get("image_url"), where)
            else:
                raise _unknown_part(kind, "input_text or input_image", where)
    return collected


def _unknown_part(kind: Any, expected: str, where: str) -> ApiError:
    return ApiError(400, f"{where}: expected a part of type {expected}, got {kind!r}", code="bad_part", param=where)


def plain_detections(detections: Detections) -> list[dict[str, Any]]:
    """Return detections as transformers' pipelines do: label, score, and box in pixels."""
    return [
        {"label": name, "score": score, "box": dict(zip(Box.model_fields, box, strict=True))}
        for box, score, name in detections
    ]


def openai_content(model: str, every: Sequence[Detections]) -> dict[str, Any]:
    """Return the detections of a request: those of all images in one list, with the sizes of the images."""
    found = [
        {"image": i, "label": plain["label"], "label_id": label, "score": plain["score"], "box": plain["box"]}
        for i, detections in enumerate(every)
        for plain, label in zip(plain_detections(detections), detections.labels.tolist(), strict=True)
    ]
    images = [{"width": detections.size[1], "height": detections.size[0]} for detections in every]
    return {"detections": found, "images": images, "model": model}


def nim_answer(every: Sequence[Detections], megabytes: float) -> dict[str, Any]:
    """Return detections as NVIDIA NIM's object detection does: boxes relative to the image, by label."""
    data = []
    for i, detections in enumerate(every):
        height, width = detections.size
        boxes: dict[str, list[dict[str, float]]] = {}
        for (x0, y0, x1, y1), score, name in detections:
            box = {"x_min": x0 / width, "y_min": y0 / height, "x_max": x1 / width, "y_max": y1 / height}
            boxes.setdefault(name, []).append({**box, "confidence": score})
        data.append({"index": i, "bounding_boxes": boxes})
    return {"data": data, "usage": {"images_size_mb": megabytes}}


def inlined_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a body with those of its parts in it, for a place where references do not work."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})
    for name, field in schema["properties"].items():
        if "$ref" in field:
            schema["properties"][name] = parts[field["$ref"].rpartition("/")[2]]
    return schema


def new_id(prefix: str) -> str:
    """Return a new identifier."""
    return f"{prefix}{uuid.uuid4().hex}"
