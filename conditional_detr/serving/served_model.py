"""A model of the service, and the options of requests to it."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from conditional_detr.inference.detector import Detector
from conditional_detr.inference.postprocessing import Postprocessing
from conditional_detr.inference.preprocessing import PixelBuffer
from conditional_detr.inference.tiling import Tiling, make_tiling
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.serving.batching import Batcher
from conditional_detr.serving.errors import ApiError
from conditional_detr.serving.settings import ServiceSettings


class Options(NamedTuple):
    """Options of a request.

    Attributes:
        threshold: None: the service's.
        top_k: None: the service's.
        classes: names or class head rows; None: all.
        tile: side of square tiles, or height and width, in pixels; None: no tiles.
        overlap: of tiles, as a fraction of their side; None: the default.
        augment: whether to detect also on mirrored and smaller images.
    """

    threshold: float | None = None
    top_k: int | None = None
    classes: Sequence[str | int] | None = None
    tile: int | Sequence[int] | None = None
    overlap: float | None = None
    augment: bool | None = None


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

    def postprocessing(self, options: Options, settings: ServiceSettings) -> Postprocessing:
        """Return the validated options of a request, with the service's defaults.

        Raises:
            ApiError: 400 for an option out of range.
        """
        threshold = settings.threshold if options.threshold is None else options.threshold
        top_k = settings.top_k if options.top_k is None else options.top_k
        with bad_options():
            return self.detector.postprocessing(threshold=threshold, top_k=top_k, classes=options.classes)


def tiling_of(options: Options) -> Tiling | None:
    """Return the validated tiles and augmentation of a request.

    Raises:
        ApiError: 400 for an option out of range.
    """
    tile = options.tile if options.tile is None or isinstance(options.tile, int) else tuple(options.tile)
    with bad_options():
        return make_tiling(tile, options.overlap, augment=bool(options.augment))  # type: ignore[arg-type]


@contextmanager
def bad_options() -> Iterator[None]:
    """Raise ApiError for an option that is out of range: the message begins with its name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ApiError(400, str(error), code="bad_option", param=str(error).partition(":")[0]) from error
