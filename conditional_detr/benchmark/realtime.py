"""Measure frames per second from a film to the annotated film, by engine and size of the model's input."""

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conditional_detr.benchmark import measure
from conditional_detr.benchmark.engines import INT8_FILE, ONNX_FILE, OPENVINO_FILE, WEIGHTS, write_weights
from conditional_detr.benchmark.measure import time_in_processes
from conditional_detr.benchmark.pipeline import PipelineMeasurement
from conditional_detr.benchmark.timing import check_rounds, process_peak_memory, seconds_of, warm_up
from conditional_detr.benchmark.worker import EngineTask, serve
from conditional_detr.data.coco import image_paths
from conditional_detr.data.formats.reading import image_folder_of
from conditional_detr.deploy.export import export
from conditional_detr.deploy.optimize import optimize
from conditional_detr.deploy.quantize import quantize
from conditional_detr.evaluation.coco import check_classes, evaluate, read_data
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.exported import ExportedModel
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.inference.preparation import batch_pixels
from conditional_detr.inference.preprocessing import PixelBuffer
from conditional_detr.modeling.detection_model import DetectionModel
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import Metadata
from conditional_detr.video.detection import DetectedFrame, detect_frames, read_frames
from conditional_detr.video.frames import Frame, Selection
from conditional_detr.video.reading import Video
from conditional_detr.video.timing import StageTimes
from conditional_detr.video.writing import VideoWriter, check_encoder

FRAMES = 64
"""Number of the film's first frames that are timed."""

_CALIBRATION_FRAMES = 32
_FRAMES_ALONE = 16  # that the model alone is timed on, which are in memory
_ENCODER = "libx264"
_FILES = {
    "ONNX Runtime": (ONNX_FILE, None),
    "OpenVINO": (OPENVINO_FILE, None),
    "OpenVINO bf16": (OPENVINO_FILE, torch.bfloat16),
    "OpenVINO int8": (INT8_FILE, None),
}
_OPTIMISED = {"optimised": torch.float32, "optimised bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class VideoMeasurement(PipelineMeasurement):
    """Measurement of one engine from a film to the annotated film; its images are the frames.

    Attributes:
        edge: shorter side in pixels that frames are resized to; None: that of the weights.
        ap: AP at this size on the dataset that was given; None: no dataset.
    """

    edge: int | None
    ap: float | None


@dataclass(frozen=True)
class VideoTask(EngineTask):
    """Task to run an engine of this module on a film.

    Attributes:
        film: path of the film.
        edge: as in :class:`VideoMeasurement`.
        data: annotations to measure AP on; None: it is not measured.
        images: folder of their images; None: where the annotations lead.
    """

    film: str
    edge: int | None
    data: str | None
    images: str | None


def available(device: torch.device) -> list[str]:
    """Return the names of the engines that can run on a device."""
    return [name for name in measure.available(device.type) if name in _OPTIMISED or name in _FILES]


def measure_realtime(
    model: DetectionTransformer,
    film: str | Path,
    edges: Sequence[int | None] = (None,),
    *,
    engines: Sequence[str] | None = None,
    data: str | Path | None = None,
    images: str | Path | None = None,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str], None] | None = None,
) -> list[VideoMeasurement]:
    """Time engines on the first frames of a film, each in its own process.

    int8 is calibrated on frames of the film.

    Args:
        model: the model in float32, whose weights and device all engines use.
        film: a video file, or a folder of images.
        edges: shorter sides that frames are resized to; None: that of the weights.
        engines: names among those of :func:`available`, the reference first; None: all.
        data: annotations to measure AP on, at each size and with each engine.
        images: folder of their images.
        rounds: number of passes over the frames per engine.
        progress: see :func:`~conditional_detr.benchmark.measure.measure`.
        on_failure: see :func:`~conditional_detr.benchmark.measure.measure`.

    Raises:
        OSError: the film cannot be read, or the process of an engine failed.
        ValueError: no video, a size that the weights do not take, an engine that cannot run, or no rounds.
    """
    names, threads = available(model.device) if engines is None else [*engines], torch.get_num_threads()
    check_rounds(rounds, names)
    known = available(model.device)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"engines: expected names among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    frames = check_video(model, film, edges)
    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        write_weights(model, Path(folder))
        names = _write_files(model, names, frames, Path(folder), progress, on_failure)
        for edge in edges:
            case: dict[str, Any] = {"folder": folder, "device": str(model.device), "threads": threads}
            case |= {"film": str(film), "edge": edge, "data": _text(data), "images": _text(images)}
            label = f"{len(frames)} frames, shorter side {edge or 'of the weights'}"
            show = partial(_show, progress, label)
            timed = time_in_processes([VideoTask(name, **case) for name in names], rounds, show, on_failure)
            for name, results in timed.items():
                results["model_seconds"] = tuple(results["model_seconds"][:rounds])  # the reference has more
                results["size"] = tuple(results["size"])
                results |= {"engine": name, "threads": threads, "images": len(frames), "edge": edge}
                measurements.append(VideoMeasurement(**results))
    return measurements


def check_data(model: DetectionTransformer, data: str | Path, images: str | Path | None) -> None:
    """Raise OSError or ValueError unless AP of the model can be measured on a dataset."""
    read, folder = read_data(data, images, split="val", format=None, rotated="box")
    check_classes(Detector(model), read)
    image_paths(read, image_folder_of(read, folder))


def check_video(model: DetectionTransformer, film: str | Path, edges: Sequence[int | None]) -> list[np.ndarray]:
    """Return the frames that are timed, RGB (H, W, 3).

    Raises:
        ImportError, OSError, ValueError: see :func:`measure_realtime`.
    """
    check_encoder(_ENCODER)
    for edge in edges:
        _resized(model, edge)
    return _first_frames(film)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def _show(progress: Callable[[str], None], label: str, engine: str) -> None:
    progress(f"{label}: {engine}")


def _resized(model: DetectionModel, edge: int | None) -> Metadata:
    """Return the metadata of a model for another size of its input.

    Raises:
        ValueError: a size that the weights do not take.
    """
    preprocessing = model.metadata.preprocessing
    return replace(
        model.metadata, preprocessing=preprocessing if edge is None else preprocessing.with_shortest_edge(edge)
    )


def _first_frames(film: str | Path, count: int = FRAMES) -> list[np.ndarray]:
    """Return the first frames of a film, RGB (H, W, 3)."""
    with Video(film) as video, closing(video.frames(Selection(), StageTimes())) as frames:
        return [frame.image for frame in itertools.islice(frames, count)]


def _write_files(
    model: DetectionTransformer,
    names: Sequence[str],
    frames: Sequence[np.ndarray],
    folder: Path,
    progress: Callable[[str], None],
    on_failure: Callable[[str], None] | None,
) -> list[str]:
    """Write the files of the engines that run exported models; return the names of the engines that can run."""
    ready = []
    for name in names:
        progress(f"{name}: writing its files")
        try:
            if name == "OpenVINO int8":
                quantize(model, folder / INT8_FILE, frames[:: max(len(frames) // _CALIBRATION_FRAMES, 1)])
            elif name in _FILES and not (folder / _FILES[name][0]).exists():
                export(model, folder / _FILES[name][0])
            ready.append(name)
        except Exception as error:  # of many kinds, from exporters of several packages
            reason = next(iter(str(error).strip().splitlines()), "")
            message = f"{name}: its files could not be written: {type(error).__name__}: {reason}"
            if on_failure is None or name == names[0]:
                raise OSError(message) from error
            on_failure(message)
    return ready


def _open(task: VideoTask) -> Detector:
    """Return the detector of an engine."""
    folder, device = Path(task.folder), torch.device(task.device)
    model: DetectionModel
    if task.engine in _FILES:
        file, dtype = _FILES[task.engine]
        model = ExportedModel(folder / file, threads=task.threads, dtype=dtype)
    else:
        plain = DetectionTransformer.from_pretrained(folder / WEIGHTS, device=device)
        model = optimize(plain, dtype=_OPTIMISED[task.engine])
    model.metadata = _resized(model, task.edge)
    return Detector(model)


def _annotate(detector: Detector, task: VideoTask) -> int:
    """Detect on the first frames of the film, draw and encode them; return the number of detections."""
    objects, times = 0, StageTimes()
    with Video(task.film) as video:
        frames = _first(read_frames(video, Selection(), times, newest=None))
        detected = detect_frames(frames, detector, detector.postprocessing(), times)
        path, end = Path(task.folder, f"{task.engine}.mp4"), FRAMES / float(video.rate)
        writer = VideoWriter(path, video, start=0.0, end=end, encoder=_ENCODER)
        with closing(detected), closing(writer), closing(map_in_threads(_draw, detected, workers=2, depth=4)) as drawn:
            for frame, image, count in drawn:
                writer.write(frame, image)
                objects += count
    return objects


def _first(frames: Generator[Frame, None, None]) -> Generator[Frame, None, None]:
    with closing(frames):
        yield from itertools.islice(frames, FRAMES)


def _draw(item: DetectedFrame) -> tuple[Frame, np.ndarray, int]:
    frame, detections = item
    return frame, np.asarray(detections.draw(Image.fromarray(frame.image))), len(detections)


def main() -> None:
    """Annotate the film once per line of standard input; the only argument is the task as JSON."""
    task = VideoTask(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    detector, device = _open(task), torch.device(task.device)
    model, model_seconds = detector.model, []
    objects, megabytes = warm_up(lambda: _annotate(detector, task), device, calls=1)
    if device.type == "cpu" and Path("/proc/self/status").exists():
        megabytes = process_peak_memory()  # before what follows, which is not part of the film
    frames = _first_frames(task.film, _FRAMES_ALONE)
    prepared = [detector.prepare(image, "frame", keep=False) for image in frames]
    values = [image.values for image in prepared if not isinstance(image, Exception)]
    size = tuple(values[0].shape[1:])
    together = detector.default_batch_size(*size)
    batches = [
        batch_pixels(values[i : i + together], model.metadata.preprocessing, model.device, model.dtype, PixelBuffer())
        for i in range(0, len(values), together)
    ]

    @torch.inference_mode()
    def alone() -> float:
        """Return the time of the model for a frame."""
        return seconds_of(lambda: [model(pixels) for pixels in batches], device) / len(values)

    def both() -> float:
        seconds = seconds_of(lambda: _annotate(detector, task), device)
        model_seconds.append(alone())
        return seconds

    def last() -> dict[str, Any]:
        """Measure AP at the end: it leaves memory that would make the film faster."""
        ap = None if task.data is None else evaluate(detector, task.data, task.images).metrics["AP"]
        return {"model_seconds": model_seconds, "ap": ap}

    alone()
    serve({"objects": objects, "megabytes": megabytes, "size": size}, both, device, last)
