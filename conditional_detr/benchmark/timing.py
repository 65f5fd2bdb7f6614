"""How it is timed: one after the other, round by round, so that what the machine does beside it strikes all alike."""

import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

WARM_UP = 2  # calls before the first round: compiling, laying out weights

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long one of several took, and how much memory.

    Attributes:
        engine: its name.
        threads: of the CPU.
        seconds: of each round.
        ratios: in each round, how many times as fast as the first of them it was.
        megabytes: at the peak, if it is known. On a CPU, of a process that does nothing else; on a GPU, of a call,
            beyond what lay there before: the weights.
    """

    engine: str
    threads: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    megabytes: float | None = None

    @property
    def median(self) -> float:
        """Seconds a call."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """How many times as fast as the first, in the median of the rounds."""
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for json."""
        return {**asdict(self), "median": self.median, "ratio": self.ratio}


def check_rounds(rounds: int, names: Sequence[str]) -> None:
    """Raise ValueError if there is nothing to time."""
    if rounds < 1 or not names:
        raise ValueError(f"expected at least one round and one engine, got {rounds} and {len(names)}")


def warm_up(call: Callable[[], T], device: torch.device) -> tuple[T, float | None]:
    """Call until nothing has to be made ready any more.

    Returns:
        What the last call gave; on a GPU the most memory, in MB, that it needed beyond what lay there before.
    """
    for _ in range(WARM_UP - 1):
        call()
    if device.type != "cuda":
        return call(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = call()
    return found, (torch.cuda.max_memory_allocated(device) - before) / 1e6


def in_turn(
    calls: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Time functions, all of them in a round before the next round.

    Args:
        calls: by name; the first is what the others are compared with.
        device: what they run on.
        rounds: how often each is timed.
        progress: told what is being done.

    Returns:
        By name, ``seconds`` and ``ratios`` of a :class:`Timing`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        progress(f"round {i + 1} of {rounds}")
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    first = seconds[next(iter(calls))]
    return {
        name: {"seconds": tuple(own), "ratios": tuple(theirs / its for theirs, its in zip(first, own, strict=True))}
        for name, own in seconds.items()
    }


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time one call, to its very end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Let torch use this many threads of the CPU, and in the end as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def process_peak() -> float:
    """Return the most memory, in MB, that this process ever had, as Linux tells it.

    Raises:
        OSError: another system than Linux.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def product_rate(dtype: torch.dtype, device: torch.device, *, side: int = 2048, rounds: int = 5) -> float:
    """Return the GFLOP/s of a plain product of square matrices: what speeds can be held against."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = [seconds_of(lambda: a @ b, device) for _ in range(rounds + 1)]
    return 2 * side**3 / statistics.median(times[1:]) / 1e9
