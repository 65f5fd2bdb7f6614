"""Measure engines: time, memory, and differences from the plain model."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conditional_detr.benchmark.engines import ENGINES, write_weights
from conditional_detr.benchmark.timing import Timing, check_rounds
from conditional_detr.benchmark.worker import EXPECTED, EngineTask, Task, Worker
from conditional_detr.modeling.detection_transformer import DetectionTransformer


@dataclass(frozen=True, kw_only=True)
class Measurement(Timing):
    """Measurement of one engine: its :class:`Timing` and its differences from the plain model.

    Attributes:
        height: image height in pixels.
        width: image width in pixels.
        batch: images per call.
        logits: largest absolute difference of the logits.
        boxes: largest absolute difference of the boxes, which lie in [0, 1].
    """

    height: int
    width: int
    batch: int
    logits: float
    boxes: float


def measure(
    model: DetectionTransformer,
    names: Sequence[str],
    *,
    size: tuple[int, int],
    batch: int = 1,
    rounds: int = 7,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Time engines on the same pixels, on the model's device.

    Each engine runs in its own process. Its calls alternate with those of the first engine, the reference.

    Args:
        model: the model in float32, whose weights all engines use.
        names: keys of ``ENGINES``, the reference first.
        size: image height and width.
        batch: images per call.
        rounds: number of timed calls per engine.
        seed: random seed of the pixels.
        progress: called with a description of the current step.
        on_failure: called with a message for each engine that is skipped because its process fails or its files cannot
            be written. None: raise OSError.

    Returns:
        A measurement per engine, in the order of the names.

    Raises:
        OSError: the process of an engine failed, or its files could not be written; with ``on_failure``, only for the
            reference.
        ValueError: an unknown engine, an engine that does not support the device, no engine, or no rounds.
        ModuleNotFoundError: a package that an engine requires is not installed.
    """
    device, threads = model.device, torch.get_num_threads()
    for name in names:
        check(name, device.type)
    check_rounds(rounds, names)
    label = f"{size[0]} x {size[1]}, batch size {batch}, {threads} threads"
    case: dict[str, Any] = {"height": size[0], "width": size[1], "batch": batch, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(name, folder, str(device), threads, size, batch, seed) for name in names]
        tasks = _prepare(model, tasks, lambda text: progress(f"{label}: {text}"), on_failure)
        timed = time_in_processes(tasks, rounds, lambda text: progress(f"{label}: {text}"), on_failure)
    return [Measurement(engine=name, **case, **results) for name, results in timed.items()]


def time_in_processes(
    tasks: Sequence[EngineTask],
    rounds: int,
    progress: Callable[[str], None],
    on_failure: Callable[[str], None] | None,
) -> dict[str, dict[str, Any]]:
    """Time engines, each in its own process and each alternating with the first, the reference.

    Args:
        tasks: the tasks, the reference first.
        rounds: number of timed calls per engine.
        progress: called with the name of the engine that is timed.
        on_failure: see :func:`measure`.

    Returns:
        By engine, the ``seconds`` and ``ratios`` of a :class:`~conditional_detr.benchmark.timing.Timing`, and the
        results of its process.

    Raises:
        OSError: see :func:`measure`.
    """
    timed = {}
    with Worker(tasks[0]) as first:
        progress(tasks[0].engine)
        first.ready()
        seconds = tuple(first.seconds() for _ in range(rounds))
        for task in tasks[1:]:
            progress(task.engine)
            try:
                timed[task.engine] = _compare(task, first, rounds)
            except OSError as error:
                if on_failure is None or first.ended:
                    raise
                on_failure(str(error))
        first.finish()
    return {tasks[0].engine: {"seconds": seconds, "ratios": (1.0,) * rounds, **first.results}, **timed}


@torch.no_grad()
def _prepare(
    model: DetectionTransformer,
    tasks: Sequence[Task],
    progress: Callable[[str], None],
    on_failure: Callable[[str], None] | None,
) -> list[Task]:
    """Write the checkpoint, the expected output and the engines' files; return the tasks that can run."""
    folder, pixels = Path(tasks[0].folder), tasks[0].pixels()
    plain = model.eval()(pixels)
    torch.save((plain.logits[-1].clone(), plain.boxes[-1].clone()), folder / EXPECTED)
    write_weights(model, folder)
    ready = []
    for task in tasks:
        write = ENGINES[task.engine].write
        try:
            if write is not None:
                progress(f"{task.engine}: writing its files")
                write(model, folder, pixels)
            ready.append(task)
        except Exception as error:  # of many kinds, from exporters of several packages
            reason = next(iter(str(error).strip().splitlines()), "")  # exporters add long explanations
            message = f"{task.engine}: its files could not be written: {type(error).__name__}: {reason}"
            if on_failure is None or task is tasks[0]:
                raise OSError(message) from error
            on_failure(message)
    return ready


def _compare(task: EngineTask, first: Worker, rounds: int) -> dict[str, Any]:
    """Time an engine, alternating with the first; return its seconds, ratios and results."""
    with Worker(task) as worker:
        worker.ready()
        pairs = [(first.seconds(), worker.seconds()) for _ in range(rounds)]
        worker.finish()
    ratios = tuple(reference / own for reference, own in pairs)
    return {"seconds": tuple(own for _, own in pairs), "ratios": ratios, **worker.results}


def check(name: str, device: str) -> None:
    """Raise ValueError or ModuleNotFoundError unless the engine exists and can run; see :func:`measure`."""
    if name not in ENGINES:
        raise ValueError(f"engines: expected names among {', '.join(ENGINES)}, got {name!r}")
    engine = ENGINES[name]
    if device not in engine.devices:
        raise ValueError(f"{name}: expected a device of type {' or '.join(engine.devices)}, got {device}")
    if missing := engine.missing_packages:
        raise ModuleNotFoundError(f"{name}: needs packages that are not installed: {', '.join(missing)}")


def available(device: str) -> list[str]:
    """Return the names of the engines that can run on a device type, the reference first if it can."""
    return [name for name, engine in ENGINES.items() if device in engine.devices and not engine.missing_packages]
