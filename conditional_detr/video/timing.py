"""Measure how long each stage takes per frame."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

STAGES = ("decode", "preprocess", "model", "post-process", "draw", "encode")
_MOST = 100_000  # last durations of a stage that are kept: a camera may run for weeks


class StageTimes:
    """Durations per frame of each stage, from any thread."""

    def __init__(self) -> None:
        self._durations: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_MOST))
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, stage: str, *, also_last: bool = False) -> Iterator[None]:
        """Add the duration of the context, or add it to the last one of the stage."""
        begin = time.perf_counter()
        yield
        self.add(stage, time.perf_counter() - begin, also_last=also_last)

    def add(self, stage: str, seconds: float, *, also_last: bool = False) -> None:
        """Add the duration of a frame."""
        with self._lock:
            durations = self._durations[stage]
            durations.append(seconds + (durations.pop() if also_last and durations else 0.0))

    def percentiles(self, *ranks: float) -> dict[str, tuple[float, ...]]:
        """Return percentiles in milliseconds of each stage that was measured, in the order of the stages."""
        with self._lock:
            measured = {stage: list(self._durations[stage]) for stage in STAGES if self._durations[stage]}
        return {
            stage: tuple(1000 * float(value) for value in np.percentile(durations, ranks))
            for stage, durations in measured.items()
        }
