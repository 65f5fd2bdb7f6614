"""Detect objects on images: open, preprocess, run the model, post-process."""

import hashlib
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from PIL import Image
from torch import Tensor

from conditional_detr.inference.batches import default_batch_size, detect_in_batches, evaluate, run_batch
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.downloads import DEFAULT_LIMITS, Limits
from conditional_detr.inference.drawing import draw_attention
from conditional_detr.inference.exported import ExportedModel
from conditional_detr.inference.images import to_pil
from conditional_detr.inference.postprocessing import (
    Postprocessing,
    check_count,
    make_postprocessing,
)
from conditional_detr.inference.preparation import PreparedImage, prepare
from conditional_detr.inference.preprocessing import PixelBuffer, to_pixels
from conditional_detr.inference.sources import ImageSource, is_single_image
from conditional_detr.inference.thresholds import check_thresholds
from conditional_detr.inference.tiling import Tiling, detect_on_views, detect_tiled, make_tiling, open_whole
from conditional_detr.modeling.detection_model import DetectionModel
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import PUBLISHED

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_THRESHOLD = 0.5


class _Options(TypedDict, total=False):
    """The options of a call, for the type checker."""

    threshold: float | None
    top_k: int
    classes: Iterable[str | int] | None
    batch_size: int | None
    keep_images: bool | None
    tile: int | tuple[int, int] | None
    overlap: float | None
    augment: bool


class Detector:
    """Detect objects on images of any kind and size.

    Args:
        model: the network, its optimised copy, or an exported model. Its metadata has the preprocessing and the class
            names. The model stays on its device. A model in train mode is set to eval mode while it runs, so it must
            not run in several threads at once.
        limits: timeout, largest file size and guard for images that are given as URLs. URLs of strangers need a
            guard.
        thresholds: by class name, thresholds of calls without a threshold, such as
            ``conditional_detr.inference.thresholds.read_thresholds`` reads; None: 0.5 for all classes.

    Raises:
        ValueError: a threshold that is not in [0, 1], or of a class that the model does not have.
        TypeError: ``model`` is no :class:`~conditional_detr.modeling.detection_model.DetectionModel`.
    """

    def __init__(
        self,
        model: DetectionModel,
        *,
        limits: Limits = DEFAULT_LIMITS,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        if not isinstance(model, DetectionModel):
            raise TypeError(
                f"model: expected a ConditionalDETR or DETR, an optimised copy or an ExportedModel,"
                f" got {type(model).__name__}"
            )
        self.model = model
        self.limits = limits
        names = model.metadata.class_names
        self.thresholds = None if thresholds is None else check_thresholds(thresholds, class_names=names)

    @classmethod
    def from_pretrained(cls, name: str | Path = PUBLISHED, **options: Any) -> "Detector":
        """Load a checkpoint: see :func:`conditional_detr.checkpoints.loading.from_pretrained`."""
        return cls(DetectionTransformer.from_pretrained(name, **options))

    @classmethod
    def from_file(cls, path: str | Path, **options: Any) -> "Detector":
        """Open an exported model, with the thresholds that it contains.

        See :class:`conditional_detr.inference.exported.ExportedModel`.
        """
        model = ExportedModel(path, **options)
        return cls(model, thresholds=model.description.thresholds)

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
        threshold: float | None = None,
        top_k: int = 100,
        classes: Iterable[str | int] | None = None,
        batch_size: int | None = None,
        keep_images: bool | None = None,
        tile: int | tuple[int, int] | None = None,
        overlap: float | None = None,
        augment: bool = False,
        on_error: str = "raise",
    ) -> Any:
        """Detect objects on one image or on many.

        Images of the same size after resizing run together in a batch. Images are never padded, so a list gives the
        same detections as its images one by one. Opening and resizing run in threads, ahead of the model.

        Args:
            images: a path, http(s) URL, data URI, base64 text, bytes, open binary file, PIL image, array or tensor
                (see :data:`conditional_detr.inference.sources.ImageSource`); or a list or iterator of these.
            threshold: report detections with a higher score, in [0, 1]. Default: the detector's thresholds, or 0.5.
            top_k: report at most this many detections per image, those with the highest scores.
            classes: names or class head rows of the classes to report; None: all.
            batch_size: run at most this many images together. Default: 8; on a CPU, as many of these as have 400,000
                pixels after resizing, because larger batches take longer there.
            keep_images: whether Detections keep the image, to draw it later. Default: yes for one image and a list,
                whose images the caller holds anyway; for an iterator only paths are kept, not frames.
            tile: for large images with small objects: detect on overlapping tiles of this side, or (height, width), in
                pixels of the image, and merge the detections. None: on the whole image, resized.
            overlap: least overlap of neighbouring tiles, as a fraction of their side, above 0 and up to 0.5; default:
                0.25. An object that is smaller than the overlap is whole on one of the tiles.
            augment: detect also on the mirrored image, and on both at 0.8 of the size where the model takes images of
                any size, and merge the detections: up to four times the work.
            on_error: "raise" the error of an image that cannot be opened, or "skip" the image with a warning.

        Returns:
            Detections for one image. A list of Detections for a list, also of one image. An iterator for any other
            iterable; it reads a few batches ahead and holds no more images than those. A skipped image gives None.

        Raises:
            OSError: a file or URL that cannot be read.
            TypeError: an image or an argument of the wrong type.
            ValueError: a file that is no image, a class that the model does not have, or a number out of range; or
                the model returns values that are not finite.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
        one = is_single_image(images)
        if not one and (not isinstance(images, Iterable) or isinstance(images, Mapping | Set)):
            raise TypeError(f"images: expected an image, or a list or iterator of them, got {type(images).__name__}")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        postprocessing = self.postprocessing(threshold=threshold, top_k=top_k, classes=classes)
        tiling = make_tiling(tile, overlap, augment=augment)
        if one:
            outcome = self._detect_one(images, postprocessing, tiling, batch_size)  # type: ignore[arg-type]
            return self._settle(outcome, on_error)
        options: dict[str, Any] = {"batch_size": batch_size, "keep_images": keep_images, "tiling": tiling}
        outcomes = self.outcomes(images, postprocessing, **options)  # type: ignore[arg-type]
        if not isinstance(images, Sequence):
            return (self._settle(outcome, on_error) for outcome in outcomes)
        with closing(outcomes):  # an error that the caller keeps would keep the threads
            return [self._settle(outcome, on_error) for outcome in outcomes]

    def default_batch_size(self, height: int, width: int) -> int:
        """Return how many images of a size after resizing run together by default."""
        return default_batch_size(self.model.device, height, width)

    def postprocessing(
        self, *, threshold: float | None = None, top_k: int = 100, classes: Iterable[str | int] | None = None
    ) -> Postprocessing:
        """Return the post-processing for a call with these arguments; raises what the call raises."""
        of_classes = DEFAULT_THRESHOLD if self.thresholds is None else self.thresholds
        return make_postprocessing(
            self.model.metadata.class_names,
            threshold=of_classes if threshold is None else threshold,
            top_k=top_k,
            classes=classes,
            scores=self.model.scores,
        )

    def settings(self, postprocessing: Postprocessing, tiling: Tiling | None = None) -> dict[str, Any]:
        """Return all that decides the detections on an image, for results to record.

        Args:
            postprocessing: what is reported, from :meth:`postprocessing`.
            tiling: as in :meth:`outcomes`.

        Returns:
            {"model": 16 hexadecimal digits of a SHA-256 of the weights and the metadata, "threshold": a number, or
            numbers by class name, "top_k", "classes": class names, None if all classes are reported}; and "tile",
            "overlap" and "augment" if these are used.
        """
        metadata = self.model.metadata
        rows = postprocessing.rows.tolist()
        named = [row for row, name in enumerate(metadata.class_names) if name is not None]
        threshold: Any = postprocessing.threshold
        if isinstance(threshold, Tensor):
            threshold = {metadata.class_names[row]: threshold[row].item() for row in rows}
        model = f"{self.model.weights_digest()} {metadata}"
        return {
            "model": hashlib.sha256(model.encode("utf-8", "surrogatepass")).hexdigest()[:16],
            "threshold": threshold,
            "top_k": postprocessing.top_k,
            "classes": None if rows == named else [metadata.class_names[row] for row in rows],
            **({} if tiling is None else tiling.settings()),
        }

    def outcomes(
        self,
        images: Iterable[ImageSource],
        postprocessing: Postprocessing,
        *,
        batch_size: int | None = None,
        keep_images: bool | None = None,
        tiling: Tiling | None = None,
    ) -> Generator[Detections | Exception, None, None]:
        """Detect objects on many images, in order and in bounded memory; yield errors instead of raising them.

        Args:
            images: read a few batches ahead. The pixels of an iterator's image are taken when it is read, so that the
                iterator may overwrite the image for the next one.
            postprocessing: what to report, from :meth:`postprocessing`.
            batch_size: as in a call.
            keep_images: as in a call.
            tiling: from :func:`~conditional_detr.inference.tiling.make_tiling`; None: detect on whole images.

        Returns:
            A generator with the Detections of each image, or the error that opening it raised.
        """
        keep = isinstance(images, Sequence) if keep_images is None else keep_images
        options: dict[str, Any] = {"batch_size": batch_size, "limits": self.limits, "keep": keep}
        if tiling is not None:
            return detect_tiled(self.model, images, postprocessing, tiling, **options)
        return detect_in_batches(self.model, images, postprocessing, **options)

    def draw_attention(
        self, detections: Detections, index: int = 0, *, layers: Sequence[int] = (-1,), name: str = ""
    ) -> Image.Image:
        """Draw the cross-attention maps of one detection's query: the paper's figure 1.

        Args:
            detections: detections of this detector; the image is opened again.
            index: index of the detection.
            layers: decoder layers, -L..L-1.
            name: the model's name, written before the class name.

        Returns:
            An image with one column per head (of each layer in turn), and one row each for the content part of the
            attention, the spatial part, and both combined. Each map is scaled to its own maximum.

        Raises:
            IndexError: no detection has this index.
            OSError: the image can no longer be read.
            ValueError: no layer, or one that the decoder does not have; a model without attention maps; detections
                that are merged from tiles or augmented images, which have no query.
        """
        box, score, class_name = detections[index]
        if detections.queries[index] < 0:
            raise ValueError(
                "detections: expected those of one run of the model, got merged ones: detect without tile and augment"
            )
        opened = detections.open_source()
        pixels = to_pixels(opened, self.model.metadata.preprocessing)[None]
        maps = evaluate(self.model, lambda x: self.model.attention_maps(x, layers=layers), pixels)
        query = int(detections.queries[index])
        return draw_attention(
            to_pil(opened),
            *(part[0, :, query].float().cpu() for part in maps),
            box=box,
            title=f"{name and name + ': '}{class_name} {score:.2f}, decoder layer {', '.join(map(str, layers))}",
        )

    @staticmethod
    def _settle(outcome: Detections | Exception, on_error: str) -> Detections | None:
        """Return detections; raise an error, or warn of it and return None."""
        if not isinstance(outcome, Exception):
            return outcome
        if on_error == "raise":
            raise outcome
        warnings.warn(f"skipped: {outcome}", stacklevel=3)
        return None

    def _detect_one(
        self, image: ImageSource, postprocessing: Postprocessing, tiling: Tiling | None, batch_size: int | None
    ) -> Detections | Exception:
        """Detect objects on a single image; without tiles, in this thread."""
        if tiling is not None:
            opened = open_whole((image, "image"), self.model.metadata.preprocessing, self.limits, keep=True)
            if isinstance(opened, Exception):
                return opened
            return detect_on_views(self.model, opened, postprocessing, tiling, batch_size)
        prepared = self.prepare(image, "image", keep=True)
        return prepared if isinstance(prepared, Exception) else self.run_batch([prepared], [postprocessing])[0]

    def prepare(self, image: ImageSource, name: str, *, keep: bool) -> PreparedImage | Exception:
        """Open and resize an image for :meth:`run_batch`, also in another thread; return the error that this raises.

        Args:
            image: the image.
            name: name for messages if the image has no path or URL, such as ``images[3]``.
            keep: whether Detections keep the image, to draw it later.
        """
        return prepare((image, name), self.model.metadata.preprocessing, self.limits, keep=keep)

    def run_batch(
        self,
        group: Sequence[PreparedImage],
        postprocessings: Sequence[Postprocessing],
        buffer: PixelBuffer | None = None,
    ) -> list[Detections | Exception]:
        """Run the model on prepared images whose values have one shape and dtype.

        Args:
            group: the images, from :meth:`prepare`.
            postprocessings: what to report of each, from :meth:`postprocessing`.
            buffer: memory that batches after one another use.

        Returns:
            The detections on each image, or its error.
        """
        return run_batch(self.model, group, postprocessings, buffer)
