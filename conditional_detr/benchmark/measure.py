"""What the engines are measured by: time, memory, and how far they are from the plain model."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conditional_detr.benchmark.engines import ENGINES, write_weights
from conditional_detr.benchmark.timing import Timing, check_rounds
from conditional_detr.benchmark.worker import EXPECTED, Task, Worker
from conditional_detr.modeling.conditional_detr import ConditionalDETR


@dataclass(frozen=True, kw_only=True)
class Measurement(Timing):
    """What was measured of one engine, besides its :class:`Timing`.

    Attributes:
        height: of the images, in pixels.
        width: of the images, in pixels.
        batch: images a call.
        logits: largest difference of logits from the plain model's.
        boxes: largest difference of boxes, which lie in [0, 1].
    """

    height: int
    width: int
    batch: int
    logits: float
    boxes: float


def measure(
    model: ConditionalDETR,
    names: Sequence[str],
    *,
    size: tuple[int, int],
    batch: int = 1,
    rounds: int = 7,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Time engines on the same pixels, each in a process of its own and in turn with the first, on the model's device.

    Args:
        model: in float32; all engines run its weights.
        names: of ``ENGINES``; the first is what the others are compared with.
        size: height and width of the images.
        batch: images a call.
        rounds: how often each is timed.
        seed: of the pixels.
        progress: told what is being done.
        on_failure: told of an engine whose process failed, or whose files could not be written, and which is then left
            out; None: that is an error.

    Raises:
        OSError: the process of an engine failed, or its files could not be written; with ``on_failure``, only if it is
            the first.
        ValueError: an engine that does not exist, or does not run on the device; no rounds.
        ModuleNotFoundError: a package that one of them needs is not installed.
    """
    device, threads = model.device, torch.get_num_threads()
    for name in names:
        check(name, device.type)
    check_rounds(rounds, names)
    what = f"{size[0]} x {size[1]}, {batch} at a time, {threads} threads"
    case: dict[str, Any] = {"height": size[0], "width": size[1], "batch": batch, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        tasks = [Task(name, folder, str(device), threads, size, batch, seed) for name in names]
        tasks = _prepared(model, tasks, lambda text: progress(f"{what}: {text}"), on_failure)
        measurements = []
        with Worker(tasks[0]) as first:
            progress(f"{what}: {names[0]}")
            first.ready()
            seconds = [first.seconds() for _ in range(rounds)]
            for task in tasks[1:]:
                progress(f"{what}: {task.engine}")
                try:
                    measurements.append(_compare(task, first, rounds, case))
                except OSError as error:
                    if on_failure is None or first.ended:
                        raise
                    on_failure(str(error))
            first.finish()
        ratios = (1.0,) * rounds
        return [Measurement(engine=names[0], **case, seconds=tuple(seconds), ratios=ratios, **first.found), *measurements]


@torch.no_grad()
def _prepared(
    model: ConditionalDETR,
    tasks: Sequence[Task],
    progress: Callable[[str], None],
    on_failure: Callable[[str], None] | None,
) -> list[Task]:
    """Write what the processes read: the model, what it gives, and files of engines; return what can be run."""
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
            why = next(iter(str(error).strip().splitlines()), "")  # exporters tell much more than that
            told = f"{task.engine}: its files could not be written: {type(error).__name__}: {why}"
            if on_failure is None or task is tasks[0]:
                raise OSError(told) from error
            on_failure(told)
    return ready


def _compare(task: Task, first: Worker, rounds: int, case: Mapping[str, Any]) -> Measurement:
    """Time an engine in turn with the first."""
    with Worker(task) as worker:
        worker.ready()
        pairs = [(first.seconds(), worker.seconds()) for _ in range(rounds)]
        worker.finish()
    ratios = tuple(theirs / own for theirs, own in pairs)
    return Measurement(engine=task.engine, **case, seconds=tuple(own for _, own in pairs), ratios=ratios, **worker.found)


def check(name: str, device: str) -> None:
    """Raise if there is no such engine, or if it cannot run: see :func:`measure`."""
    if name not in ENGINES:
        raise ValueError(f"engines: expected some of {', '.join(ENGINES)}, got {name!r}")
    engine = ENGINES[name]
    if device not in engine.devices:
        raise ValueError(f"{name}: runs on {' and '.join(engine.devices)}, got {device}")
    if engine.missing_packages:
        raise ModuleNotFoundError(f"{name}: needs packages that are not installed: {', '.join(engine.missing_packages)}")


def available(device: str) -> list[str]:
    """Return the names of the engines that can run here, the reference first if it can."""
    return [name for name, engine in ENGINES.items() if device in engine.devices and not engine.missing_packages]
