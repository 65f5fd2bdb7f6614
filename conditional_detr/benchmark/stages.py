"""Time the stages from an image file to detections in one thread."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditional_detr.benchmark.pipeline import BACKENDS, THRESHOLD, Backend, common_size
from conditional_detr.benchmark.timing import seconds_of, torch_threads
from conditional_detr.deploy.optimize import optimize
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.postprocessing import postprocess
from conditional_detr.inference.preprocessing import normalise, open_by_backend, resize, resized_size
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import Preprocessing


@dataclass(frozen=True)
class Stages:
    """Times of the stages of one image in one thread.

    Attributes:
        backend: backend of the preprocessing.
        seconds: median time over the images, by stage; the model is the optimised one.
    """

    backend: str
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as a JSON-compatible dict."""
        return asdict(self)


@torch.inference_mode()
def measure_stages(
    model: DetectionTransformer, images: Sequence[str], *, progress: Callable[[str], None] = lambda _: None
) -> list[Stages]:
    """Time the stages of this library in one thread, image by image, with each backend of the preprocessing.

    Raises:
        OSError, ValueError: see :func:`measure_pipeline`.
    """
    device, metadata = model.device, model.metadata
    common = common_size(images, metadata.preprocessing)
    options = Detector(model).postprocessing(threshold=THRESHOLD)
    seconds: dict[Backend, dict[str, list[float]]] = {backend: defaultdict(list) for backend in BACKENDS}

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        found: list[Any] = []
        seconds[backend][stage].append(seconds_of(lambda: found.append(function(*arguments)), device))
        return found[0]

    with torch_threads(1):
        network = optimize(model)
        network(torch.randn(1, 3, *common).to(device))
        for index, path in enumerate(images):
            progress(f"stages: image {index + 1} of {len(images)}")
            for backend in seconds:
                preprocessing = replace(metadata.preprocessing, backend=backend)
                needed = partial(resized_size, preprocessing=preprocessing)
                opened, size = timed(
                    "decode", partial(open_by_backend, needed=needed), Path(path), path, preprocessing
                )
                values = timed("resize", resize, opened, preprocessing)
                pixels = timed("normalise", _normalise, values, preprocessing, device)
                output = timed("model", network, pixels)
                logits, boxes = (part[-1, 0].float().cpu() for part in output)
                timed("post-process", postprocess, logits, boxes, size, options)
    return [
        Stages(backend, {stage: statistics.median(times) for stage, times in own.items()})
        for backend, own in seconds.items()
    ]


def _normalise(values: Tensor, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    """Return pixels (1, 3, H, W) on the device."""
    return normalise(values, preprocessing)[None].to(device)
