"""The service as an ASGI application: its endpoints."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.serving import openai_answers, schemas
from conditional_detr.serving.errors import ApiError, ErrorAnswer, http_error, internal_error, invalid_request
from conditional_detr.serving.gate import Gate
from conditional_detr.serving.keys import ApiKeys
from conditional_detr.serving.metrics import CONTENT_TYPE
from conditional_detr.serving.served_model import Options, ServedModel
from conditional_detr.serving.service import DetectionService
from conditional_detr.serving.settings import ServiceSettings

_PAGE = Path(__file__).parent / "page"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:;"
    " connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_DOCS_POLICY = (  # the script of that page is in it
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " frame-ancestors 'none'"
)
_BINARY = ("", "application/octet-stream", "application/x-www-form-urlencoded")  # the last one is curl's default
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_SHOWN = 60  # characters of a wrong value

router = APIRouter(responses={"default": {"model": ErrorAnswer, "description": "An error."}})


def create_app(
    models: Mapping[str, Detector],
    settings: ServiceSettings | None = None,
    *,
    keys: ApiKeys | None = None,
    licences: Mapping[str, str] | None = None,
) -> Gate:
    """Return the service as an ASGI application, for uvicorn or another server.

    Args:
        models: detectors by the name in requests; the first one is the default. They must not be used elsewhere.
        settings: limits and defaults.
        keys: the known API keys; None: none is needed.
        licences: licence of the weights by name.

    Raises:
        ValueError: no model.
    """
    settings = settings or ServiceSettings()
    service = DetectionService(models, settings, licences)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.ensure_future(service.warm_up())
        yield
        warming.cancel()
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPIOffline(title="Conditional DETR", lifespan=lifespan, redoc_url=None, static_url="/docs-assets")
    app.state.service = service
    app.include_router(router)
    app.mount("/page", StaticFiles(directory=_PAGE))
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid_request)
    app.add_exception_handler(ValidationError, invalid_request)
    app.add_exception_handler(Exception, internal_error)
    return Gate(app, service, keys, {"/": _PAGE_POLICY, "/docs": _DOCS_POLICY})


def _service(request: Request) -> DetectionService:
    service: DetectionService = request.app.state.service
    return service


def _json_only(request: Request) -> None:
    """Refuse a body of another type than JSON."""
    kind = _content_type(request)
    if kind != "application/json":
        raise ApiError(415, f"content-type: expected application/json, got {kind[:_SHOWN]!r}", code="unsupported_type")


def _known_query(names: Iterable[str]) -> Any:
    """Return a dependency that refuses query parameters of other names."""
    known = set(names)

    def check(request: Request) -> None:
        if unknown := set(request.query_params) - known:
            raise ApiError(
                400,
                f"expected the query parameters {', '.join(sorted(known))}, got {sorted(unknown)[0][:_SHOWN]!r}",
                code="bad_option",
            )

    return Depends(check)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


Service = Annotated[DetectionService, Depends(_service)]
JSON = [Depends(_json_only)]


@router.post("/v1/chat/completions", dependencies=JSON)
async def chat_completions(body: schemas.ChatRequest, request: Request, service: Service) -> Any:
    """Detect objects on the images of a chat: ``image_url`` parts of the user's messages, in order."""
    collected = schemas.read_chat(body)
    content = await _content(request, service, body.model, collected)
    if not body.stream:
        return openai_answers.chat_completion(content, collected.warnings)
    wanted = (body.model_extra or {}).get("stream_options") or {}
    usage = isinstance(wanted, dict) and wanted.get("include_usage") is True
    events = openai_answers.chat_chunks(content, collected.warnings, usage=usage)
    return StreamingResponse(events, media_type="text/event-stream")


@router.post("/v1/responses", dependencies=JSON)
async def responses(body: schemas.ResponsesRequest, request: Request, service: Service) -> Any:
    """Detect objects on the ``input_image`` parts of a request."""
    collected = schemas.read_responses(body)
    content = await _content(request, service, body.model, collected)
    whole = openai_answers.response(content, collected.warnings)
    if not body.stream:
        return whole
    return StreamingResponse(openai_answers.response_events(whole), media_type="text/event-stream")


@router.post("/v1/infer", dependencies=JSON)
async def infer(body: schemas.InferRequest, request: Request, service: Service) -> dict[str, Any]:
    """Detect objects on images; boxes are relative to the image and sorted by label, as in NVIDIA NIM."""
    if body.model_extra:
        raise ApiError(400, f"expected no {sorted(body.model_extra)[0][:_SHOWN]!r}", code="bad_option")
    images = [part.url for part in body.input]
    found = await _detect(request, service, service.model(body.model), images, body.options())
    return schemas.nim_answer(found, sum(map(len, images)) * 3 / 4 / 2**20)


@router.post(
    "/v1/detect",
    response_model=list[schemas.Detected],
    dependencies=[_known_query(("model", *Options._fields, "format"))],
    openapi_extra={
        "requestBody": {
            "content": {
                "image/*": _BYTES,
                "application/json": {"schema": schemas.inlined_schema(schemas.DetectRequest)},
                "multipart/form-data": {"schema": {"type": "object", "properties": {"file": _BYTES["schema"]}}},
            }
        }
    },
)
async def detect(
    request: Request,
    service: Service,
    model: str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    classes: Annotated[list[str] | None, Query()] = None,
    tile: Annotated[list[int] | None, Query()] = None,
    overlap: float | None = None,
    augment: bool | None = None,
    format: Literal["json", "image"] = "json",
) -> Any:
    """Detect objects on one image: its bytes, a file of a form, or base64 in JSON; ``format=image`` draws them."""
    side = tile[0] if tile is not None and len(tile) == 1 else tile
    asked = Options(threshold, top_k, classes, side, overlap, augment)
    image, options, named = await _one_image(request, asked)
    served = service.model(model or named)
    (found,) = await _detect(request, service, served, [image], options, keep=format == "image")
    if format == "json":
        return schemas.plain_detections(found)
    return Response(await service.in_thread(lambda: _as_png(found.draw())), media_type="image/png")


@router.post(
    "/v1/attention",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
    dependencies=[_known_query(("model", "threshold", "top_k", "index"))],
    openapi_extra={"requestBody": {"content": {"image/*": _BYTES}}},
)
async def attention(
    request: Request,
    service: Service,
    index: int,
    model: str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
) -> Response:
    """Draw the attention maps of one detection of an image; the index is that of ``/v1/detect``."""
    served = service.model(model)
    request.state.log.update(model=served.name, images=1)
    drawn = await service.draw_attention(served, await request.body(), Options(threshold, top_k), index)
    return Response(await service.in_thread(lambda: _as_png(drawn)), media_type="image/png")


@router.get("/v1/models")
async def models(service: Service) -> dict[str, Any]:
    """Return the models of the service."""
    return {"object": "list", "data": [model.describe() for model in service.models.values()]}


@router.get("/v1/models/{name:path}")
async def one_model(name: str, service: Service) -> dict[str, Any]:
    """Return a model of the service."""
    return service.model(name).describe()


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "live"}


@router.get("/health/ready")
async def ready(service: Service) -> dict[str, str]:
    """Say that the models are warm; 503 before, and while the service shuts down."""
    if not service.ready:
        raise ApiError(503, "the service is starting or shutting down", code="not_ready", retry_after=1)
    return {"status": "ready"}


@router.get("/metrics")
async def metrics(service: Service) -> Response:
    """Return metrics in Prometheus' text format."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Return the page to try the service on."""
    return FileResponse(_PAGE / "index.html")


async def _content(
    request: Request, service: DetectionService, name: str | None, collected: schemas.Collected
) -> dict[str, Any]:
    """Detect objects on the images of a request and return them in OpenAI's form."""
    model = service.model(name)
    found = await _detect(request, service, model, collected.images, collected.options)
    return schemas.openai_content(model.name, found)


async def _detect(
    request: Request,
    service: DetectionService,
    model: ServedModel,
    images: list[Any],
    options: Options,
    *,
    keep: bool = False,
) -> list[Detections]:
    """Detect objects on images, and note what the log line of the request has of it."""
    request.state.log.update(model=model.name, images=len(images))
    return await service.detect(model, images, options, keep=keep)


async def _one_image(request: Request, options: Options) -> tuple[str | bytes, Options, str | None]:
    """Read the image of a request to ``/v1/detect``; return it, its options, and the name of the model in the body."""
    kind = _content_type(request)
    if kind.startswith("image/") or kind in _BINARY:
        image = await request.body()
        if not image:
            raise ApiError(400, "expected an image in the body, got nothing", code="no_image")
        return image, options, None
    if kind == "application/json":
        body = schemas.DetectRequest.model_validate_json(await request.body())
        parameters = body.parameters
        if parameters.model_extra:
            got = sorted(parameters.model_extra)[0][:_SHOWN]
            raise ApiError(400, f"parameters: expected no {got!r}", code="bad_option", param="parameters")
        query = {name: value for name, value in options._asdict().items() if value is not None}
        return body.inputs, parameters.options()._replace(**query), body.model
    if kind == "multipart/form-data":
        async with request.form(max_files=2, max_fields=2) as form:
            files = [value for value in form.values() if isinstance(value, UploadFile)]
            if len(files) != 1 or len(form) != 1:
                raise ApiError(400, f"expected one file in the form, got {len(form)} fields", code="no_image")
            return await files[0].read(), options, None
    expected = "image/..., application/octet-stream, application/json or multipart/form-data"
    raise ApiError(415, f"content-type: expected {expected}, got {kind[:_SHOWN]!r}", code="unsupported_type")


def _as_png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
