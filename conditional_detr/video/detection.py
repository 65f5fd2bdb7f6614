"""Detect objects on the frames of a video, with decoding, preprocessing and the model in threads beside each other."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from conditional_detr.inference.batches import DEFAULT_BATCH_SIZE, WORKERS
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.pipeline import map_in_batches, map_in_threads, read_ahead
from conditional_detr.inference.postprocessing import Postprocessing, check_count
from conditional_detr.inference.preparation import PreparedImage
from conditional_detr.inference.preprocessing import PixelBuffer
from conditional_detr.modeling.detection_model import DetectionModel
from conditional_detr.video.frames import Frame, Selection
from conditional_detr.video.live import NewestItem, paced
from conditional_detr.video.reading import Video, VideoSource
from conditional_detr.video.timing import StageTimes

_WINDOW = 4  # batches that a frame waits for others of its size
_DECODED_AHEAD = 4  # frames
_PREPARED_AHEAD = 8  # frames, much smaller ones for most models


class DetectedFrame(NamedTuple):
    """A frame and the detections on it."""

    frame: Frame
    detections: Detections


class _Item(NamedTuple):
    """A frame on its way to the model: prepared, or with the detections of an earlier run."""

    frame: Frame
    prepared: PreparedImage | None
    known: Detections | None


def detect_video(
    source: VideoSource,
    detector: Detector,
    *,
    threshold: float | None = None,
    top_k: int = 100,
    classes: Iterable[str | int] | None = None,
    batch_size: int | None = None,
    every: int = 1,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    live: bool = False,
) -> Iterator[DetectedFrame]:
    """Detect objects on the frames of a video, in order and in bounded memory.

    The detections are those of ``detector`` on the same frames. ``detections.draw(frame.image)`` draws them.

    Args:
        source: a video file, a folder of images, a URL, or a camera: its number or its device.
        detector: runs in a thread until the iterator ends or is closed; use it for nothing else meanwhile.
        threshold: as in a call of the detector.
        top_k: as in a call of the detector.
        classes: as in a call of the detector.
        batch_size: run at most this many frames together; default: as many as the detector runs of their size, and
            one if ``live``.
        every: use frames whose index is a multiple of this.
        fps: use at most so many frames per second.
        start: seconds; skip the frames before.
        end: seconds; stop before the frame at this time.
        live: drop frames that arrive while the model is busy, instead of letting them wait. A file is then played at
            its own speed.

    Returns:
        An iterator of (frame, detections).

    Raises:
        ImportError: PyAV is not installed.
        OSError: the source cannot be opened.
        TypeError: ``detector`` is no Detector, or an option that is no number.
        ValueError: a file that is no video, one without a frame, or an option out of range.
    """
    if not isinstance(detector, Detector):
        raise TypeError(f"detector: expected a Detector, got {type(detector).__name__}")
    postprocessing = detector.postprocessing(threshold=threshold, top_k=top_k, classes=classes)
    selection = Selection(every, fps, start, end)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    video, times = Video(source), StageTimes()
    frames = read_frames(video, selection, times, newest=NewestItem() if live else None)
    detected = detect_frames(frames, detector, postprocessing, times, batch_size=1 if live else batch_size, live=live)
    return _until_closed(video, detected)


def _until_closed(video: Video, detected: Generator[DetectedFrame, None, None]) -> Iterator[DetectedFrame]:
    with video, closing(detected):
        yield from detected


def read_frames(
    video: Video, selection: Selection, times: StageTimes, *, newest: NewestItem[Frame] | None
) -> Generator[Frame, None, None]:
    """Yield the selected frames of a video, decoded in a thread.

    Args:
        video: the video.
        selection: which frames.
        times: takes the time of decoding.
        newest: drop frames that are not consumed in time, and count them there; None: the thread waits.
    """
    frames = video.frames(selection, times)
    if newest is None:
        return read_ahead(frames, depth=_DECODED_AHEAD)
    return newest.read(frames if video.is_live else paced(frames))


def detect_frames(
    frames: Generator[Frame, None, None],
    detector: Detector,
    postprocessing: Postprocessing,
    times: StageTimes,
    *,
    batch_size: int | None = None,
    live: bool = False,
    known: Callable[[Frame], Detections | None] = lambda _: None,
) -> Generator[DetectedFrame, None, None]:
    """Detect objects on frames, with preprocessing and the model in threads.

    Args:
        frames: the frames; read in a thread, and closed in the end.
        detector: runs in a thread.
        postprocessing: what to report.
        times: takes the times of preprocessing, model and post-processing.
        batch_size: as in :func:`detect_video`.
        live: keep as few frames as possible on their way, for a short delay.
        known: returns detections of an earlier run for a frame; the model does not run then. Called in order.
    """
    prepared = _prepared(frames, detector, times, live=live, known=known)
    if not live:  # a frame that waits here would be older than the newest one when the model takes it
        prepared = read_ahead(prepared, depth=_PREPARED_AHEAD)

    def size_of_batch(shape: Any) -> int:
        return batch_size or detector.default_batch_size(*shape)

    def detected() -> Generator[DetectedFrame, None, None]:
        buffer = PixelBuffer()
        with closing(prepared), _forward_ends(detector.model) as ends:
            yield from map_in_batches(
                prepared,
                lambda item: None if item.prepared is None else tuple(item.prepared.values.shape[1:]),
                lambda batch: _detect(batch, detector, postprocessing, times, ends, buffer),
                batch_size=size_of_batch,
                window=_WINDOW * (batch_size or DEFAULT_BATCH_SIZE),
            )

    return read_ahead(detected(), depth=1 if live else _PREPARED_AHEAD)


def _prepared(
    frames: Generator[Frame, None, None],
    detector: Detector,
    times: StageTimes,
    *,
    live: bool,
    known: Callable[[Frame], Detections | None],
) -> Generator[_Item, None, None]:
    """Yield the frames resized for the model; those with known detections as they are."""

    def prepare(item: _Item) -> _Item:
        if item.known is not None:
            return item
        with times.measure("preprocess"):
            prepared = detector.prepare(item.frame.image, f"frame {item.frame.index}", keep=False)
        if isinstance(prepared, Exception):
            raise prepared
        return item._replace(prepared=prepared)

    workers, depth = (1, 1) if live else (WORKERS, _PREPARED_AHEAD)
    items = (_Item(frame, None, known(frame)) for frame in frames)
    with closing(frames), closing(map_in_threads(prepare, items, workers=workers, depth=depth)) as prepared:
        yield from prepared


def _detect(
    batch: list[_Item],
    detector: Detector,
    postprocessing: Postprocessing,
    times: StageTimes,
    ends: list[float],
    buffer: PixelBuffer,
) -> Iterator[DetectedFrame]:
    """Run the model on a batch, unless its detections are known."""
    images = [item.prepared for item in batch if item.prepared is not None]
    outcomes: list[Detections | Exception] = [item.known for item in batch if item.known is not None]
    if images:
        begin = time.perf_counter()
        outcomes = detector.run_batch(images, [postprocessing] * len(images), buffer)
        end = time.perf_counter()
        forward = ends.pop() if ends else end  # none if a runtime has refused the shape
        for _ in images:
            times.add("model", (forward - begin) / len(images))
            times.add("post-process", (end - forward) / len(images))
    for item, outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, Exception):
            raise outcome
        yield DetectedFrame(item.frame, outcome)


@contextmanager
def _forward_ends(model: DetectionModel) -> Iterator[list[float]]:
    """Collect the time at which each call of a model ends."""
    ends: list[float] = []

    def note(*_: object) -> None:
        if model.device.type == "cuda":  # a call returns when the kernels are launched
            torch.cuda.synchronize(model.device)
        ends.append(time.perf_counter())

    hook = cast(nn.Module, model).register_forward_hook(note)
    try:
        yield ends
    finally:
        hook.remove()
