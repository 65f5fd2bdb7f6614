"""How it is timed: engines in turn, round by round, so that what the machine does beside it strikes all alike."""

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditional_detr.benchmark.engines import ENGINES, Run
from conditional_detr.model import ConditionalDETR

WARM_UP = 2  # calls before the first round: compiling, laying out weights


@dataclass(frozen=True)
class Reading:
    """What was measured of one engine.

    Attributes:
        engine: its name.
        height: of the pictures, in pixels.
        width: of the pictures, in pixels.
        batch: pictures a call.
        seconds: of each round.
        ratios: in each round, how many times as fast as the reference it was.
        logits: largest difference of logits from the plain model's.
        boxes: largest difference of boxes, which lie in [0, 1].
    """

    engine: str
    height: int
    width: int
    batch: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    logits: float
    boxes: float

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """How many times as fast as the reference, in the median of the rounds."""
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for json."""
        return {**asdict(self), "median": self.median, "ratio": self.ratio}


def measure(
    model: ConditionalDETR,
    names: Sequence[str],
    *,
    size: tuple[int, int],
    batch: int = 1,
    rounds: int = 7,
    seed: int = 0,
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
        progress: told what is being done.

    Raises:
        ValueError: an engine that does not exist, or does not run on the device; no rounds.
        ModuleNotFoundError: a package that one of them needs is not installed.
    """
    device = model.projection.weight.device
    for name in names:
        check(name, device.type)
    if rounds < 1 or not names:
        raise ValueError(f"expected at least one round and one engine, got {rounds} and {len(names)}")
    pixels = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed)).to(device)
    model.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        plain = model(pixels)
        expected = plain.logits[-1], plain.boxes[-1]
        runs: dict[str, Run] = {}
        differences = {}
        for name in names:
            progress(f"{name}: getting ready")
            runs[name] = ENGINES[name].make(model, Path(folder), pixels)
            for _ in range(WARM_UP):
                found = runs[name](pixels)
            differences[name] = [
                (a.float() - b.float()).abs().max().item() for a, b in zip(found, expected, strict=True)
            ]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for i in range(rounds):
            progress(f"round {i + 1} of {rounds}")
            for name, run in runs.items():
                seconds[name].append(_seconds(run, pixels))
    first = seconds[names[0]]
    return [
        Reading(
            name,
            *size,
            batch,
            tuple(times),
            tuple(theirs / own for theirs, own in zip(first, times, strict=True)),
            *differences[name],
        )
        for name, times in seconds.items()
    ]


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


def _seconds(run: Run, pixels: Tensor) -> float:
    """Time one call, to its very end."""
    if pixels.is_cuda:
        torch.cuda.synchronize(pixels.device)
    start = time.perf_counter()
    run(pixels)
    if pixels.is_cuda:
        torch.cuda.synchronize(pixels.device)
    return time.perf_counter() - start


def peak_memory(model: ConditionalDETR, name: str, *, size: tuple[int, int], batch: int = 1) -> float:
    """Run one engine and return the most memory, in MB, that this process ever had, as Linux tells it.

    Args:
        model: in float32, on the CPU.
        name: of the engine.
        size: height and width of the pictures.
        batch: pictures a call.

    Raises:
        OSError: another system than Linux.
        ValueError, ModuleNotFoundError: see :func:`measure`.
    """
    check(name, "cpu")
    pixels = torch.zeros(batch, 3, *size)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        run = ENGINES[name].make(model, Path(folder), pixels)
        for _ in range(WARM_UP + 1):
            run(pixels)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def product_rate(dtype: torch.dtype, device: torch.device, *, side: int = 2048, rounds: int = 5) -> float:
    """Return the GFLOP/s of a plain product of square matrices: what speeds can be held against."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(rounds + 1):
        if a.is_cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if a.is_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(times[1:]) / 1e9
