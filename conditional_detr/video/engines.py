"""Choose what runs the model on a video: torch, ONNX Runtime or OpenVINO, measured on its first frames."""

import itertools
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np

from conditional_detr.deploy.export import export
from conditional_detr.deploy.export_files import PACKAGES
from conditional_detr.deploy.optimize import optimize
from conditional_detr.inference.detector import Detector
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.video.frames import Selection
from conditional_detr.video.reading import Video, VideoSource
from conditional_detr.video.timing import StageTimes

_SUFFIXES = {"openvino": ".xml", "onnx": ".onnx"}
_FRAMES, _ROUNDS = 2, 3  # that are measured


def open_engine(detector: Detector, engine: str, folder: Path) -> Detector:
    """Return a detector that runs the model of another one by an engine.

    Args:
        detector: a detector of a plain model.
        engine: "torch", whose optimised copy runs on the model's device; "openvino" or "onnx", for which the model is
            exported, and which run on the CPU.
        folder: where exported models are written; they must stay while the detector is used.

    Raises:
        ImportError: the packages of the engine are not installed.
        ValueError: the model is no plain one, so that it runs by its own engine only.
    """
    model = detector.model
    if not isinstance(model, DetectionTransformer):
        raise ValueError(f"engine: expected a checkpoint with {engine}, got an exported model, which has its own")
    if engine == "torch":
        return Detector(optimize(model))
    path = folder / f"model{_SUFFIXES[engine]}"
    export(model, path)
    return Detector.from_file(path)


def available_engines(detector: Detector) -> list[str]:
    """Return the engines whose packages are installed; on an accelerator torch alone, as the others use the CPU."""
    others = [name for name, suffix in _SUFFIXES.items() if all(map(find_spec, PACKAGES[suffix][0]))]
    return ["torch", *(others if detector.model.device.type == "cpu" else [])]


def first_frames(source: VideoSource, selection: Selection) -> list[np.ndarray]:
    """Return the first frames of a video, RGB (H, W, 3)."""
    with Video(source) as video, closing(video.frames(selection, StageTimes())) as frames:
        return [frame.image for frame in itertools.islice(frames, _FRAMES)]


def measure(detector: Detector, images: Sequence[np.ndarray]) -> float:
    """Return the median time in seconds that the model takes for one of the images."""
    postprocessing = detector.postprocessing()
    prepared = [detector.prepare(image, "image", keep=False) for image in images]
    seconds = []
    for image in prepared * (_ROUNDS + 1):
        if isinstance(image, Exception):
            raise image
        begin = time.perf_counter()
        detector.run_batch([image], [postprocessing])
        seconds.append(time.perf_counter() - begin)
    return median(seconds[len(images) :])  # without the first round, which also sets up memory
