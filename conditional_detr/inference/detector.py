"""Images in, detections out."""

import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from PIL import Image
from torch import Tensor

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.drawing import draw_attention
from conditional_detr.inference.exported import ExportedModel
from conditional_detr.inference.images import normalise, open_image, resize, size_of, to_pil
from conditional_detr.inference.pipeline import map_in_batches, map_in_threads
from conditional_detr.inference.postprocessing import (
    Postprocessing,
    check_count,
    check_head,
    make_postprocessing,
    postprocess,
)
from conditional_detr.inference.sources import (
    DEFAULT_LIMITS,
    ImageSource,
    Limits,
    ReadableSource,
    is_single_image,
    resolve_source,
    source_name,
)
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.modeling.detection_model import DetectionModel
from conditional_detr.modeling.layers import evaluation_mode

if TYPE_CHECKING:
    from typing_extensions import Unpack

PUBLISHED = "microsoft/conditional-detr-resnet-50"
IMAGE_ERRORS = (OSError, TypeError, ValueError)
"""What opening an image raises, for whatever is wrong with it."""

_WINDOW = 4  # batches that an image of a rare shape waits for others of its shape


class _Options(TypedDict, total=False):
    """The options of a call, for the type checker."""

    threshold: float
    top_k: int
    classes: Iterable[str | int] | None
    batch_size: int


class _Prepared(NamedTuple):
    """An image ready for the model."""

    name: str
    source: ReadableSource
    size: tuple[int, int]
    values: Tensor  # (3, H, W), resized and not yet normalised


class Detector:
    """A model with everything around it: from images of any kind and size to named boxes.

    Args:
        model: the model, or an exported file; its metadata says how images are prepared and what the classes are
            called. Where it is and in which mode stays as it is; one in train mode is set to eval mode while it runs,
            so it must not run in several threads at once.
        limits: how long fetching an image's address may take, and how large the file may be.

    Raises:
        TypeError: neither a ConditionalDETR nor an ExportedModel.
    """

    def __init__(self, model: DetectionModel, *, limits: Limits = DEFAULT_LIMITS) -> None:
        if not isinstance(model, DetectionModel):
            raise TypeError(f"model: expected a ConditionalDETR or an ExportedModel, got {type(model).__name__}")
        self.model = model
        self.limits = limits

    @classmethod
    def from_pretrained(cls, name: str | Path = PUBLISHED, **options: Any) -> "Detector":
        """Load a checkpoint: see :func:`conditional_detr.checkpoints.loading.from_pretrained`."""
        return cls(ConditionalDETR.from_pretrained(name, **options))

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> "Detector":
        """Open an exported file: see :class:`conditional_detr.inference.exported.ExportedModel`."""
        return cls(ExportedModel(path, **options))

    @overload  # a string is also a sequence of strings: the first match, one image, is meant
    def __call__(  # type: ignore[overload-overlap]
        self, images: ImageSource, *, on_error: Literal["raise"] = ..., **options: "Unpack[_Options]"
    ) -> Detections: ...

    @overload
    def __call__(
        self, images: Sequence[ImageSource], *, on_error: Literal["raise"] = ..., **options: "Unpack[_Options]"
    ) -> list[Detections]: ...

    @overload
    def __call__(
        self, images: Sequence[ImageSource], *, on_error: Literal["skip"], **options: "Unpack[_Options]"
    ) -> list[Detections | None]: ...

    @overload
    def __call__(
        self, images: Iterator[ImageSource], *, on_error: Literal["raise"] = ..., **options: "Unpack[_Options]"
    ) -> Iterator[Detections]: ...

    @overload
    def __call__(
        self, images: Iterator[ImageSource], *, on_error: Literal["skip"], **options: "Unpack[_Options]"
    ) -> Iterator[Detections | None]: ...

    def __call__(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        threshold: float = 0.5,
        top_k: int = 100,
        classes: Iterable[str | int] | None = None,
        batch_size: int = 8,
        on_error: str = "raise",
    ) -> Any:
        """Detect objects on one image or on many.

        Images that come out at the same size run together, others apart: none is ever padded, so a list gives what
        its images give one by one. Opening and resizing run in threads, ahead of the model.

        Args:
            images: a path, http(s) address, data URI, base64, bytes, open binary file, PIL image, array or tensor:
                see :data:`conditional_detr.inference.sources.ImageSource`; or a list, or any iterator, of such.
            threshold: objects must score above this, in [0, 1].
            top_k: the most objects an image, the best.
            classes: names or rows of the classes to report; None: all.
            batch_size: the most images that run together.
            on_error: what an image that cannot be opened does: "raise" its error, or "skip" it, with a warning and
                None in its place.

        Returns:
            One Detections for one image; a list of them for a list, also of one; for any other iterable an
            iterator, which draws images a few batches ahead and holds no more than those.

        Raises:
            OSError: a file or address that cannot be read.
            TypeError: an image or an argument of the wrong type.
            ValueError: a file that is no image, a class that the model does not have, a number out of its range; or
                the model gave values that are not finite.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
        one = is_single_image(images)
        if not one and (not isinstance(images, Iterable) or isinstance(images, Mapping | Set)):
            raise TypeError(f"images: expected an image, or a list or iterator of them, got {type(images).__name__}")
        check_count("batch_size", batch_size)
        postprocessing = self.postprocessing(threshold=threshold, top_k=top_k, classes=classes)
        if one:
            return self._settle(self._detect_one(images, postprocessing), on_error)  # type: ignore[arg-type]
        outcomes = self.outcomes(images, postprocessing, batch_size=batch_size)  # type: ignore[arg-type]
        if not isinstance(images, Sequence):
            return (self._settle(outcome, on_error) for outcome in outcomes)
        with closing(outcomes):  # an error that the caller keeps would keep the threads
            return [self._settle(outcome, on_error) for outcome in outcomes]

    def postprocessing(
        self, *, threshold: float = 0.5, top_k: int = 100, classes: Iterable[str | int] | None = None
    ) -> Postprocessing:
        """Check what is to be reported against the model's classes; arguments and errors as of a call."""
        return make_postprocessing(self.model.metadata.class_names, threshold=threshold, top_k=top_k, classes=classes)

    def outcomes(
        self, images: Iterable[ImageSource], postprocessing: Postprocessing, *, batch_size: int = 8
    ) -> Generator[Detections | Exception, None, None]:
        """Detect objects on many images, in order and in bounded memory; errors of images are given, not raised.

        Args:
            images: drawn from a few batches ahead.
            postprocessing: what to report.
            batch_size: the most images that run together.

        Returns:
            For each image its Detections, or the error that opening it raised.
        """
        workers = min(4, os.cpu_count() or 1)
        numbered = ((image, f"images[{place}]") for place, image in enumerate(images))
        prepared = map_in_threads(self._prepare, numbered, workers=workers, depth=batch_size + workers)

        def key(item: _Prepared | Exception) -> tuple[Any, ...] | None:
            return (item.values.shape, item.values.dtype) if isinstance(item, _Prepared) else None

        def run(items: list[_Prepared | Exception]) -> list[Detections | Exception]:
            if isinstance(items[0], Exception):
                return [items[0]]
            return [*self._run([item for item in items if isinstance(item, _Prepared)], postprocessing)]

        with closing(prepared):
            yield from map_in_batches(prepared, key, run, size=batch_size, window=_WINDOW * batch_size)

    def draw_attention(self, found: Detections, which: int = 0, *, layers: Sequence[int] = (-1,)) -> Image.Image:
        """Draw where the query of one detection looks: the paper's figure 1.

        Args:
            found: what this detector found on an image; the image is opened anew.
            which: the place of the detection in it.
            layers: decoder layers, -L..L-1.

        Returns:
            An image with one column a head (of each layer in turn) and a row each for the content part of the
            attention, the spatial part, and both combined; every map is scaled to its own maximum.

        Raises:
            IndexError: there is no such detection.
            OSError: the image's file is gone.
            ValueError: no layer, or one that the decoder does not have; an exported file, which has no maps.
        """
        box, score, name = found[which]
        opened = open_image(found.source, "image")
        preprocessing = self.model.metadata.preprocessing
        pixels = normalise(resize(opened, preprocessing), preprocessing)[None]
        maps = self._evaluate(lambda x: self.model.attention_maps(x, layers=layers), pixels)
        query = int(found.queries[which])
        return draw_attention(
            to_pil(opened),
            *(part[0, :, query].float().cpu() for part in maps),
            box=box,
            title=f"{name} {score:.2f}, decoder layer {', '.join(map(str, layers))}",
        )

    @staticmethod
    def _settle(outcome: Detections | Exception, on_error: str) -> Detections | None:
        """Return a result; raise an error, or warn of it."""
        if not isinstance(outcome, Exception):
            return outcome
        if on_error == "raise":
            raise outcome
        warnings.warn(f"skipped: {outcome}", stacklevel=3)
        return None

    def _detect_one(self, image: ImageSource, postprocessing: Postprocessing) -> Detections | Exception:
        """Detect objects on a single image, without threads."""
        prepared = self._prepare((image, "image"))
        return prepared if isinstance(prepared, Exception) else next(self._run([prepared], postprocessing))

    def _prepare(self, named: tuple[ImageSource, str]) -> _Prepared | Exception:
        """Open and resize an image, or return the error of it."""
        image, place = named
        name = source_name(image, place)
        try:
            source = resolve_source(image, name, self.limits)
            opened = open_image(source, name)
            return _Prepared(name, source, size_of(opened), resize(opened, self.model.metadata.preprocessing))
        except IMAGE_ERRORS as error:
            return error

    def _run(self, group: list[_Prepared], postprocessing: Postprocessing) -> Iterator[Detections]:
        """Run images of one shape through the model."""
        metadata = self.model.metadata
        values = torch.stack([image.values for image in group]).to(self.model.device)  # (B, 3, H, W)
        output = self._evaluate(self.model, normalise(values, metadata.preprocessing))
        logits, boxes = (x[-1].float().cpu() for x in output)  # (B, N, C), (B, N, 4)
        check_head(logits.shape[-1], metadata.class_names)
        for image, its_logits, its_boxes in zip(group, logits, boxes, strict=True):
            if not (its_logits.isfinite().all() and its_boxes.isfinite().all()):
                raise ValueError(f"{image.name}: the model gave logits or boxes that are not finite")
            chosen, scores, labels, queries = postprocess(its_logits, its_boxes, image.size, postprocessing)
            rows = labels.tolist()
            yield Detections(
                boxes=chosen,
                scores=scores,
                labels=labels,
                names=tuple(str(metadata.class_names[row]) for row in rows),
                category_ids=tuple(metadata.category_ids[row] for row in rows),
                queries=queries,
                size=image.size,
                source=image.source,
            )

    @torch.inference_mode()
    def _evaluate(self, function: Any, pixels: Tensor) -> Any:
        """Apply the model or a part of it in eval mode, where it is, and leave its mode as it was."""
        with evaluation_mode(self.model):
            return function(pixels.to(self.model.device, self.model.dtype))
