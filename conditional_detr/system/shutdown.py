"""Shutdown on Ctrl-C or another signal: the first signal requests it, the second stops the process at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Signals of Ctrl-C, of job schedulers (Slurm warns with SIGUSR1) and of a terminal that is closed."""


class ShutdownRequest:
    """Context manager that handles SIGINT, SIGTERM, SIGHUP and SIGUSR1.

    The first one sets a flag, the second raises KeyboardInterrupt. A SIGHUP or SIGUSR1 that is ignored stays ignored,
    as under nohup. Outside the main thread it does nothing, because Python handles signals in the main thread only.

    Attributes:
        requested: whether a signal has arrived.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "ShutdownRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self._handled()}
        return self

    @staticmethod
    def _handled() -> list[signal.Signals]:
        """Return the signals to handle: all but an ignored SIGHUP or SIGUSR1."""
        return [number for number in SIGNALS if number in SIGNALS[:2] or signal.getsignal(number) != signal.SIG_IGN]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
