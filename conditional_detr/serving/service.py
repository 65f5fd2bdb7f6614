"""Detect objects on the images of requests: open them in threads, run them in batches on the device."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.downloads import Limits
from conditional_detr.inference.postprocessing import Postprocessing
from conditional_detr.inference.preparation import PreparedImage
from conditional_detr.inference.preprocessing import PixelBuffer, resized_size
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.serving.batching import Batcher
from conditional_detr.serving.errors import ApiError
from conditional_detr.serving.metrics import Metrics
from conditional_detr.serving.settings import ServiceSettings
from conditional_detr.serving.sources import check_header, decode, download, is_url

LOG = logging.getLogger("conditional_detr.serving")

_DOWNLOADS = 16  # at a time
_WARM_UP_SIZE = (480, 640)

Result = TypeVar("Result")


class Options(NamedTuple):
    """Options of a request.

    Attributes:
        threshold: None: the service's.
        top_k: None: the service's.
        classes: names or class head rows; None: all.
    """

    threshold: float | None = None
    top_k: int | None = None
    classes: Sequence[str | int] | None = None


@dataclass
class ServedModel:
    """A model of the service.

    Attributes:
        name: in requests.
        detector: the detector.
        batcher: of the model's device.
        licence: of the weights, if it is known.
        created: Unix time.
    """

    name: str
    detector: Detector
    batcher: Batcher
    licence: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    buffer: PixelBuffer = field(default_factory=PixelBuffer)

    def describe(self) -> dict[str, Any]:
        """Return OpenAI's model object, with class names, preprocessing and licence in further fields."""
        metadata = self.detector.model.metadata
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "conditional_detr",
            "class_names": list(metadata.class_names),
            "preprocessing": asdict(metadata.preprocessing),
            "licence": self.licence,
            "attention": isinstance(self.detector.model, DetectionTransformer),
        }


class DetectionService:
    """The models and the threads of a service.

    Args:
        models: detectors by name; the first one is the default.
        settings: limits and defaults.
        licences: licence of the weights by name.

    Raises:
        ValueError: no model.
    """

    def __init__(
        self, models: Mapping[str, Detector], settings: ServiceSettings, licences: Mapping[str, str] | None = None
    ) -> None:
        if not models:
            raise ValueError("models: expected at least one, got none")
        self.settings = settings
        self.metrics = Metrics()
        self.ready = False
        self._limits = Limits(settings.url_seconds, settings.max_body, settings.urls)
        self._slots = asyncio.Semaphore(settings.max_queue)  # images that are opened
        self._opening = ThreadPoolExecutor(settings.threads, thread_name_prefix="conditional_detr_open")
        self._downloads = asyncio.Semaphore(_DOWNLOADS)
        self._downloading = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="conditional_detr_download")
        batchers: dict[str, Batcher] = {}
        self.models = {}
        for name, detector in models.items():
            device = str(detector.model.device)
            if device not in batchers:
                batchers[device] = Batcher(settings.max_wait, f"conditional_detr_{device}")
            self.models[name] = ServedModel(name, detector, batchers[device], (licences or {}).get(name))
        self._batchers = list(batchers.values())

    def model(self, name: str | None) -> ServedModel:
        """Return a model by name, or the first one.

        Raises:
            ApiError: 404 for an unknown name.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                404,
                f"model: expected one of {', '.join(self.models)}, got {name[:200]!r}",
                code="model_not_found",
                param="model",
            )
        return self.models[name]

    async def warm_up(self) -> None:
        """Run each model once, because first calls are slower, and be ready."""
        for model in self.models.values():
            size = resized_size(*_WARM_UP_SIZE, model.detector.model.metadata.preprocessing)
            image = Image.new("RGB", size[::-1])
            try:
                await self._detect_one(model, image, "image", self._postprocessing(model, Options()), keep=False)
            except ApiError:  # an exported model of a fixed size
                continue
            except Exception:
                LOG.exception("the model %s cannot run: the service does not become ready", model.name)
                return
        self.ready = True

    def close(self) -> None:
        """End the threads."""
        self.ready = False
        for pool in (self._opening, self._downloading):
            pool.shutdown(wait=False, cancel_futures=True)
        for batcher in self._batchers:
            batcher.close()

    async def detect(
        self, model: ServedModel, images: Sequence[str | bytes], options: Options, *, keep: bool = False
    ) -> list[Detections]:
        """Detect objects on the images of a request.

        Args:
            model: the model.
            images: bytes of image files, data URIs, base64 or URLs.
            options: what to report.
            keep: keep the images, to draw on them.

        Raises:
            ApiError: 400 for an image or option that is wrong, 413 for too many or too large images, 422 for an image
                that the model cannot process.
        """
        if not images:
            raise ApiError(400, "expected at least one image, got none", code="no_image")
        if len(images) > self.settings.max_images:
            raise ApiError(
                413,
                f"expected at most {self.settings.max_images} images in a request, got {len(images)}",
                code="too_many_images",
            )
        postprocessing = self._postprocessing(model, options)
        names = [f"images[{i}]" if len(images) > 1 else "image" for i in range(len(images))]
        tasks = [
            asyncio.ensure_future(self._detect_any(model, image, name, postprocessing, keep=keep))
            for image, name in zip(images, names, strict=True)
        ]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # those of a request with an image that is wrong
                task.cancel()

    async def draw_attention(self, model: ServedModel, image: bytes, options: Options, index: int) -> Image.Image:
        """Detect objects on an image and draw the attention maps of one of them.

        Raises:
            ApiError: as :meth:`detect`; 400 for a detection or attention maps that do not exist.
        """
        (detections,) = await self.detect(model, [image], options, keep=True)
        if not 0 <= index < len(detections):
            raise ApiError(
                400,
                f"index: expected one of {len(detections)} detections, got {index}",
                code="bad_option",
                param="index",
            )

        def run(_: list[Any]) -> list[Any]:
            return [model.detector.draw_attention(detections, index)]

        try:
            return await model.batcher.submit(object(), None, run, 1)
        except ValueError as error:  # an exported model has no attention maps
            raise ApiError(400, str(error), code="no_attention", param="model") from error

    async def in_thread(self, function: Callable[[], Result]) -> Result:
        """Run a function in the threads that open images."""
        return await asyncio.get_running_loop().run_in_executor(self._opening, function)

    def _postprocessing(self, model: ServedModel, options: Options) -> Postprocessing:
        """Return the validated options of a request."""
        threshold = self.settings.threshold if options.threshold is None else options.threshold
        top_k = self.settings.top_k if options.top_k is None else options.top_k
        try:
            return model.detector.postprocessing(threshold=threshold, top_k=top_k, classes=options.classes)
        except (TypeError, ValueError) as error:
            raise ApiError(400, str(error), code="bad_option", param=str(error).partition(":")[0]) from error

    async def _detect_any(
        self, model: ServedModel, image: str | bytes, name: str, postprocessing: Postprocessing, *, keep: bool
    ) -> Detections:
        """Download an image if it is a URL, and detect objects on it.

        Raises:
            ApiError: as :meth:`detect`.
        """
        if not (isinstance(image, str) and is_url(image)):
            return await self._detect_one(model, image, name, postprocessing, keep=keep)
        async with self._downloads:  # and no slot before the image is here: a slow server delays no other request
            loop = asyncio.get_running_loop()
            content = await loop.run_in_executor(self._downloading, download, image, name, self._limits)
            return await self._detect_one(model, content, name, postprocessing, keep=keep)

    async def _detect_one(
        self,
        model: ServedModel,
        image: str | bytes | Image.Image,
        name: str,
        postprocessing: Postprocessing,
        *,
        keep: bool,
    ) -> Detections:
        """Open an image and detect objects on it.

        Raises:
            ApiError: as :meth:`detect`.
        """
        async with self._slots:
            with model.batcher.announced():
                prepared = await self.in_thread(partial(self._prepare, model, image, name, keep=keep))
                values = prepared.values
                limit = min(self.settings.max_batch, model.detector.default_batch_size(*values.shape[1:]))
                key = (model.name, values.shape, values.dtype)
                detections = model.batcher.submit(key, (prepared, postprocessing), partial(self._run, model), limit)
            try:
                return await detections
            except ValueError as error:  # the model cannot process an image of this size, or its output is not finite
                raise ApiError(422, str(error), code="not_processable", param=name) from error

    def _prepare(
        self, model: ServedModel, image: str | bytes | Image.Image, name: str, *, keep: bool
    ) -> PreparedImage:
        """Open and resize an image; runs in a thread.

        Raises:
            ApiError: 400 or 413.
        """
        if isinstance(image, str):
            image = decode(image, name)
        if isinstance(image, bytes):
            check_header(image, name, self.settings.max_pixels)
        prepared = model.detector.prepare(image, name, keep=keep)
        if isinstance(prepared, Exception):
            raise ApiError(400, str(prepared), code="invalid_image", param=name) from prepared
        return prepared

    def _run(
        self, model: ServedModel, batch: list[tuple[PreparedImage, Postprocessing]]
    ) -> Sequence[Detections | Exception]:
        """Run a batch; runs in the thread of the device."""
        began = time.perf_counter()
        group, postprocessings = zip(*batch, strict=True)
        results = model.detector.run_batch(group, postprocessings, model.buffer)
        self.metrics.model_seconds.labels(model.name).observe(time.perf_counter() - began)
        self.metrics.batch_size.labels(model.name).observe(len(batch))
        self.metrics.images.labels(model.name).inc(len(batch))
        return results
