"""Ctrl-C and SIGTERM: asked once, finish what is being done; asked twice, stop at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class ShutdownRequest:
    """Listens for signals while it is entered, if that is in the main thread, where they arrive.

    Attributes:
        asked: whether one came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "ShutdownRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = {which: signal.signal(which, self._ask) for which in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
