"""Measure images per second from image files to detections, beside transformers' pipeline and a plain loop."""

import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from conditional_detr.benchmark.engines import WEIGHTS, write_weights
from conditional_detr.benchmark.measure import time_in_processes
from conditional_detr.benchmark.timing import Timing, check_rounds, seconds_of, warm_up
from conditional_detr.benchmark.worker import EngineTask, serve
from conditional_detr.deploy.optimize import optimize
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.images import open_image, size_of
from conditional_detr.inference.preprocessing import resized_size
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import Preprocessing

THRESHOLD = 0.5
_IMAGES = "images.json"
Backend: TypeAlias = Literal["pil", "torchvision"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Calls: TypeAlias = tuple[
    Callable[[], int], Callable[[Tensor], object]
]  # all images to a count of detections; the model


@dataclass(frozen=True, kw_only=True)
class PipelineMeasurement(Timing):
    """Measurement of one engine from files to detections; ``seconds`` are those of all images.

    Attributes:
        images: number of images.
        size: (height, width) of the pixels that the model alone is timed on, the most common size after resizing.
        objects: number of detections above 0.5 on all images.
        model_seconds: time of the model alone on one image, after each round.
    """

    images: int
    size: tuple[int, int]
    objects: int
    model_seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Return the median number of images per second."""
        return self.images / self.median

    @property
    def share(self) -> float:
        """Return the median of the images per second as a share of those of the model alone, one at a time."""
        shares = (self.images * model / own for model, own in zip(self.model_seconds, self.seconds, strict=True))
        return statistics.median(shares)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as a JSON-compatible dict."""
        return {**super().to_dict(), "rate": self.rate, "share": self.share}


@dataclass(frozen=True)
class PipelineTask(EngineTask):
    """Task to run an engine of this module on the images that :func:`measure_pipeline` has listed in the folder.

    Attributes:
        size: (height, width) of the pixels that the model alone is timed on.
    """

    size: tuple[int, int]


def _transformers(folder: Path, device: torch.device, images: list[str]) -> Calls:
    from transformers import pipeline

    detect: Any = pipeline("object-detection", model=str(folder / WEIGHTS), device=device)

    def model(pixels: Tensor) -> object:
        mask = torch.ones((1, *pixels.shape[2:]), dtype=torch.long, device=device)
        return detect.model(pixel_values=pixels, pixel_mask=mask)

    return lambda: sum(len(found) for found in detect(images, threshold=THRESHOLD)), model


def _detector(
    folder: Path,
    device: torch.device,
    images: list[str],
    *,
    dtype: torch.dtype | None = None,
    backend: Backend = "pil",
    loop: bool = False,
) -> Calls:
    """Return the calls of this library's detector; without a dtype, it has the plain model."""
    plain = DetectionTransformer.from_pretrained(folder / WEIGHTS, device=device)
    plain.metadata = replace(plain.metadata, preprocessing=replace(plain.metadata.preprocessing, backend=backend))
    model = plain if dtype is None else optimize(plain, dtype=dtype)
    detector = Detector(model)

    def run() -> int:
        paths = map(Path, images)
        every = (
            (detector(path, threshold=THRESHOLD) for path in paths) if loop else detector(paths, threshold=THRESHOLD)
        )
        return sum(len(found) for found in every)

    return run, lambda pixels: model(pixels.to(model.dtype))


REFERENCE = "transformers pipeline"
ENGINES: dict[str, Callable[[Path, torch.device, list[str]], Calls]] = {
    REFERENCE: _transformers,
    "loop": partial(_detector, loop=True),
    "Detector": _detector,
    "optimised": partial(_detector, dtype=torch.float32),
    "optimised fast": partial(_detector, dtype=torch.float32, backend="torchvision"),
    "optimised bf16": partial(_detector, dtype=torch.bfloat16),
    "optimised bf16 fast": partial(_detector, dtype=torch.bfloat16, backend="torchvision"),
}
"""Engines by name. All but the first two are the detector on an iterator; "fast" is the backend "torchvision"."""


def available(device: torch.device) -> list[str]:
    """Return the names of the engines that can run on a device, the reference first if it can."""
    unable = [REFERENCE] if find_spec("transformers") is None else []
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        unable += [name for name in ENGINES if "bf16" in name]
    return [name for name in ENGINES if name not in unable]


def common_size(images: Sequence[str], preprocessing: Preprocessing) -> tuple[int, int]:
    """Open all images and return the most common (height, width) that they are resized to.

    Raises:
        OSError, ValueError: an image cannot be read, or there is none.
    """
    sizes = Counter(resized_size(*size_of(open_image(Path(path), path)), preprocessing) for path in images)
    if not sizes:
        raise ValueError("images: expected at least one, got none")
    return sizes.most_common(1)[0][0]


def measure_pipeline(
    model: DetectionTransformer,
    images: Sequence[str],
    *,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str], None] | None = None,
) -> list[PipelineMeasurement]:
    """Time all engines that can run, each in its own process, on the same image files.

    Args:
        model: the model in float32, whose weights and device all engines use.
        images: paths of image files.
        rounds: number of passes over the images per engine.
        progress: see :func:`~conditional_detr.benchmark.measure.measure`.
        on_failure: see :func:`~conditional_detr.benchmark.measure.measure`.

    Raises:
        OSError: an image cannot be read, or the process of an engine failed.
        ValueError: a file that is no image, no image, or no rounds.
    """
    names, threads = available(model.device), torch.get_num_threads()
    check_rounds(rounds, names)
    size = common_size(images, model.metadata.preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(model, Path(folder))
        Path(folder, _IMAGES).write_text(json.dumps(list(images)))
        tasks = [PipelineTask(name, folder, str(model.device), threads, size) for name in names]
        timed = time_in_processes(tasks, rounds, lambda text: progress(f"{len(images)} images: {text}"), on_failure)
    for results in timed.values():  # the reference also runs in the rounds of the others
        results["model_seconds"] = tuple(results["model_seconds"][:rounds])
    case: dict[str, Any] = {"threads": threads, "images": len(images), "size": size}
    return [PipelineMeasurement(engine=name, **case, **results) for name, results in timed.items()]


def main() -> None:
    """Detect objects on all images once per line of standard input; the only argument is the task as JSON."""
    task = PipelineTask(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    folder, device = Path(task.folder), torch.device(task.device)
    run, model = ENGINES[task.engine](folder, device, json.loads((folder / _IMAGES).read_text()))
    objects, megabytes = warm_up(run, device, calls=1)
    pixels, model_seconds = torch.randn(1, 3, *task.size).to(device), []

    @torch.inference_mode()
    def alone() -> float:
        return seconds_of(lambda: model(pixels), device)

    def both() -> float:
        seconds = seconds_of(run, device)
        model_seconds.append(alone())
        return seconds

    alone()
    serve({"objects": objects, "megabytes": megabytes}, both, device, lambda: {"model_seconds": model_seconds})
