"""Timing in rounds: each round calls every function once, so that other load on the machine affects all alike."""

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

WARM_UP = 2  # calls before the first round, for compiling and packing weights

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time and peak memory of an engine.

    Attributes:
        engine: name of the engine.
        threads: number of CPU threads.
        seconds: time of each round.
        ratios: speedup over the reference in each round.
        megabytes: peak memory in MB; None: unknown. On a CPU, that of the engine's process; on a GPU, that of one
            call, without the memory allocated before, such as the weights.
    """

    engine: str
    threads: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    megabytes: float | None = None

    @property
    def median(self) -> float:
        """Return the median time of a call in seconds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Return the median speedup over the reference."""
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as a JSON-compatible dict."""
        return {**asdict(self), "median": self.median, "ratio": self.ratio}


def check_rounds(rounds: int, names: Sequence[str]) -> None:
    """Raise ValueError unless there is at least one round and one engine."""
    if rounds < 1 or not names:
        raise ValueError(f"expected at least one round and one engine, got {rounds} and {len(names)}")


def warm_up(call: Callable[[], T], device: torch.device, *, calls: int = WARM_UP) -> tuple[T, float | None]:
    """Call a function until compiling and packing weights are done.

    Args:
        call: the function.
        device: device that it runs on.
        calls: number of calls.

    Returns:
        The result of the last call, and on a GPU its peak memory in MB without the memory allocated before, else None.
    """
    for _ in range(calls - 1):
        call()
    if device.type != "cuda":
        return call(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    return result, (torch.cuda.max_memory_allocated(device) - before) / 1e6


def time_in_rounds(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Time functions in rounds, each function once per round.

    Args:
        calls: functions by name, the reference first.
        device: device that they run on.
        rounds: number of rounds.
        progress: called with a description of the current step.

    Returns:
        The ``seconds`` and ``ratios`` of a :class:`Timing`, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        progress(f"round {i + 1} of {rounds}")
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    first = seconds[next(iter(calls))]
    return {
        name: {"seconds": tuple(own), "ratios": tuple(a / b for a, b in zip(first, own, strict=True))}
        for name, own in seconds.items()
    }


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call in seconds, including asynchronous GPU work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set torch's number of CPU threads within a context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def process_peak_memory() -> float:
    """Return the peak memory of this process in MB, from Linux's ``/proc``.

    Raises:
        OSError: the system is not Linux.
    """
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) / 1e3


def product_rate(dtype: torch.dtype, device: torch.device, *, side: int = 2048, rounds: int = 5) -> float:
    """Return the speed of a product of square matrices in GFLOP/s, as a yardstick of the machine."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = [seconds_of(lambda: a @ b, device) for _ in range(rounds + 1)]
    return 2 * side**3 / statistics.median(times[1:]) / 1e9
