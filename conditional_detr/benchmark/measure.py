"""What the engines are measured by: time, memory, and how far they are from the plain model."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditional_detr.benchmark.engines import ENGINES
from conditional_detr.benchmark.timing import WARM_UP, Timing, check_rounds, in_turn, process_peak, warm_up
from conditional_detr.model import ConditionalDETR


@dataclass(frozen=True, kw_only=True)
class Reading(Timing):
    """What was measured of one engine, besides its :class:`Timing`.

    Attributes:
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        batch: pictures a call.
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
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Reading]:
    """Time engines on the same pixels, interleaved, on the model's device.

    Args:
        model: in float32; all engines run its weights.
        names: of ``ENGINES``; the first is what the others are compared with.
        size: height and width of the pictures.
        batch: pictures a call.
        rounds: how often each is timed.
        seed: of the pixels.
        folder: for the files that engines read, such as exports; what is in it already has to be of the same model.
            None: one that is removed afterwards.
        progress: told what is being done.

    Raises:
        ValueError: an engine that does not exist, or does not run on the device; no rounds.
        ModuleNotFoundError: a package that one of them needs is not installed.
    """
    device = model.projection.weight.device
    for name in names:
        check(name, device.type)
    check_rounds(rounds, names)
    what = f"{size[0]} x {size[1]}, {batch} at a time, {torch.get_num_threads()} threads"
    pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(device)
    model.eval()
    with tempfile.TemporaryDirectory() as own, torch.no_grad():
        folder = folder or Path(own)
        plain = model(pixels)
        calls: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {}
        others: dict[str, dict[str, Any]] = {}
        for name in names:
            engine = ENGINES[name]
            if engine.write is not None:
                progress(f"{what}: {name}: writing its files")
                engine.write(model, folder, pixels)
            progress(f"{what}: {name}: getting ready")
            calls[name] = partial(engine.make(model, folder, pixels), pixels)
            (logits, boxes), megabytes = warm_up(calls[name], device)
            others[name] = {
                "logits": (logits.float() - plain.logits[-1]).abs().max().item(),
                "boxes": (boxes.float() - plain.boxes[-1]).abs().max().item(),
                "megabytes": megabytes,
            }
        times = in_turn(calls, device, rounds=rounds, progress=lambda text: progress(f"{what}: {text}"))
    same: dict[str, Any] = {"height": size[0], "width": size[1], "batch": batch, "threads": torch.get_num_threads()}
    return [Reading(engine=name, **same, **times[name], **others[name]) for name in times]


def check(name: str, device: str) -> None:
    """Raise if there is no such engine, or if it cannot run: see :func:`measure`."""
    if name not in ENGINES:
        raise ValueError(f"engines: expected some of {', '.join(ENGINES)}, got {name!r}")
    engine = ENGINES[name]
    if device not in engine.devices:
        raise ValueError(f"{name}: runs on {' and '.join(engine.devices)}, got {device}")
    if engine.missing:
        raise ModuleNotFoundError(f"{name}: needs packages that are not installed: {', '.join(engine.missing)}")


def available(device: str) -> list[str]:
    """Return the names of the engines that can run here, the reference first if it can."""
    return [name for name, engine in ENGINES.items() if device in engine.devices and not engine.missing]


def peak_memory(
    model: ConditionalDETR, name: str, *, size: tuple[int, int], batch: int = 1, folder: Path | None = None
) -> float:
    """Run one engine and return the most memory, in MB, that this process ever had, as Linux tells it.

    Args:
        model: in float32, on the CPU; it loses its weights if the engine reads files instead.
        name: of the engine.
        size: height and width of the pictures.
        batch: pictures a call.
        folder: where :func:`measure` has left the engine's files for pictures of this size and number. What is not in
            it, or is not given, is written here, which counts as well.

    Raises:
        OSError: another system than Linux.
        ValueError, ModuleNotFoundError: see :func:`measure`.
    """
    check(name, "cpu")
    engine, pixels = ENGINES[name], torch.zeros(batch, 3, *size)
    with tempfile.TemporaryDirectory() as own, torch.no_grad():
        folder = folder or Path(own)
        if engine.write is not None:
            engine.write(model, folder, pixels)
            model.to("meta")  # the weights of both would count
        run = engine.make(model, folder, pixels)
        for _ in range(WARM_UP + 1):
            run(pixels)
    return process_peak()
