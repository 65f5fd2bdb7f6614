"""Detect objects on the images of requests: open them in threads, run them in batches on the device."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.downloads import Limits
from conditional_detr.inference.postprocessing import Postprocessing
from conditional_detr.inference.preparation import PreparedImage
from conditional_detr.inference.preprocessing import resized_size
from conditional_detr.inference.tiling import ImageViews, Tiling, View, count_views, open_whole
from conditional_detr.serving.batching import Batcher
from conditional_detr.serving.errors import ApiError
from conditional_detr.serving.metrics import Metrics
from conditional_detr.serving.served_model import Options, ServedModel, tiling_of
from conditional_detr.serving.settings import ServiceSettings
from conditional_detr.serving.sources import check_header, decode, download, is_url

LOG = logging.getLogger("conditional_detr.serving")

_DOWNLOADS = 16  # at a time
_WHOLE_IMAGES = 2  # in memory at their full size, with a copy of each for every thread that prepares a view
_MOST_OF_A_VIEW = 300  # detections: merging compares those of each pair of views
_WARM_UP_SIZE = (480, 640)

Result = TypeVar("Result")


class DetectionService:
    """The models and the threads of a service.

    Args:
        models: detectors by name; the first one is the default.
        settings: limits and defaults.
        licences: licence of the weights by name.

    Raises:
        ValueError: no model, or one whose thresholds lack a class.
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
        self._whole_images = asyncio.Semaphore(_WHOLE_IMAGES)
        self._opening = ThreadPoolExecutor(settings.threads, thread_name_prefix="conditional_detr_open")
        self._downloads = asyncio.Semaphore(_DOWNLOADS)
        self._downloading = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="conditional_detr_download")
        batchers: dict[str, Batcher] = {}
        self.models = {}
        for name, detector in models.items():
            device = str(detector.model.device)
            if device not in batchers:
                batchers[device] = Batcher(settings.max_wait, f"conditional_detr_{device}")
            served = ServedModel(name, detector, batchers[device], (licences or {}).get(name))
            detector.postprocessing(threshold=settings.threshold, top_k=settings.top_k)  # before the first request
            self.models[name] = served
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
            postprocessing = model.postprocessing(Options(), self.settings)
            try:
                await self._detect_one(model, image, "image", postprocessing, keep=False)
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
        postprocessing, tiling = model.postprocessing(options, self.settings), tiling_of(options)
        if tiling is not None and postprocessing.top_k > _MOST_OF_A_VIEW:
            message = f"top_k: expected at most {_MOST_OF_A_VIEW} with tile or augment, got {postprocessing.top_k}"
            raise ApiError(400, message, code="bad_option", param="top_k")
        most = max(self.settings.max_tiles // len(images), 1)
        names = [f"images[{i}]" if len(images) > 1 else "image" for i in range(len(images))]
        return await _gather(
            self._detect_any(model, image, name, postprocessing, tiling, most, keep=keep)
            for image, name in zip(images, names, strict=True)
        )

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

    async def _detect_any(
        self,
        model: ServedModel,
        image: str | bytes,
        name: str,
        postprocessing: Postprocessing,
        tiling: Tiling | None,
        most: int,
        *,
        keep: bool,
    ) -> Detections:
        """Download an image if it is a URL, and detect objects on it or its views, of which there may be ``most``.

        Raises:
            ApiError: as :meth:`detect`.
        """
        async with AsyncExitStack() as held:
            if tiling is not None:  # first: an image that waits for others holds nothing that these need
                await held.enter_async_context(self._whole_images)
            if isinstance(image, str) and is_url(image):  # no slot before it is here: a slow server delays no other
                await held.enter_async_context(self._downloads)
                loop = asyncio.get_running_loop()
                image = await loop.run_in_executor(self._downloading, download, image, name, self._limits)
            if tiling is None:
                found = await self._detect_one(model, image, name, postprocessing, keep=keep)
            else:
                found = await self._detect_views(model, image, name, postprocessing, tiling, most, keep=keep)
        self.metrics.images.labels(model.name).inc()
        return found

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
            prepare = partial(model.detector.prepare, name=name, keep=keep)
            return await self._run_one(model, name, postprocessing, partial(self._open, image, name, prepare))

    async def _detect_views(
        self,
        model: ServedModel,
        image: str | bytes,
        name: str,
        postprocessing: Postprocessing,
        tiling: Tiling,
        most: int,
        *,
        keep: bool,
    ) -> Detections:
        """Open an image at its full size, detect objects on its views, with others in batches, and merge them.

        Raises:
            ApiError: as :meth:`detect`; 413 for too many views.
        """
        preprocessing = model.detector.model.metadata.preprocessing
        open_one = partial(open_whole, preprocessing=preprocessing, limits=self._limits, keep=keep)
        async with self._slots:
            opened = await self.in_thread(partial(self._open, image, name, lambda local: open_one((local, name))))
            if (count := count_views(opened.size, tiling, preprocessing)) > most:
                message = f"{name}: expected at most {most} tiles and other views, got {count}"
                raise ApiError(413, message, code="too_many_tiles", param="tile")
            views = ImageViews(opened, postprocessing, tiling, preprocessing)
            x0, y0, x1, y1 = views.views[0].box
            together = model.detector.default_batch_size(*resized_size(y1 - y0, x1 - x0, preprocessing))
            ahead = asyncio.Semaphore(2 * min(self.settings.max_batch, together))

            async def run(view: View) -> Detections:
                async with ahead:  # few of them are in memory, however many there are
                    return await self._run_one(model, name, views.postprocessing, partial(views.prepare, view))

            parts = await _gather(run(view) for view in views.views)
            return await self.in_thread(partial(views.merge, parts))

    async def _run_one(
        self,
        model: ServedModel,
        name: str,
        postprocessing: Postprocessing,
        prepare: Callable[[], PreparedImage],
    ) -> Detections:
        """Prepare an image or a part of it in a thread, and run the model on it together with others.

        Raises:
            ApiError: that of ``prepare``; 422 for an image that the model cannot process.
        """
        with model.batcher.announced():
            prepared = await self.in_thread(prepare)
            values = prepared.values
            limit = min(self.settings.max_batch, model.detector.default_batch_size(*values.shape[1:]))
            key = (model.name, values.shape, values.dtype)
            detections = model.batcher.submit(key, (prepared, postprocessing), partial(self._run, model), limit)
        try:
            return await detections
        except ValueError as error:  # the model cannot process an image of this size, or its output is not finite
            raise ApiError(422, str(error), code="not_processable", param=name) from error

    def _open(
        self,
        image: str | bytes | Image.Image,
        name: str,
        prepare: Callable[[bytes | Image.Image], PreparedImage | Exception],
    ) -> PreparedImage:
        """Decode base64, check the size of an image and prepare it; runs in a thread.

        Raises:
            ApiError: 400 or 413.
        """
        if isinstance(image, str):
            image = decode(image, name)
        if isinstance(image, bytes):
            check_header(image, name, self.settings.max_pixels)
        prepared = prepare(image)
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
        return results


async def _gather(coroutines: Iterable[Coroutine[Any, Any, Detections]]) -> list[Detections]:
    """Run coroutines together and return their results; cancel the others if one fails."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
