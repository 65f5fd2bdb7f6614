"""Several worker processes on one listening socket: start, replace and end them."""

import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

from conditional_detr.serving.metrics import MULTIPROCESS_FOLDER
from conditional_detr.serving.service import LOG

_MAX_FAILED_STARTS = 3
_LONGEST_PAUSE = 30.0  # seconds between attempts to start a worker
_POLL_SECONDS = 0.1
_KILL_SECONDS = 10.0  # beyond those that requests have to finish


@dataclass
class _Worker:
    """A worker process.

    Attributes:
        process: the process.
        started: an event, set when the process accepts connections.
        reloads: how many requests to read the keys again it has got, or came before it.
        noted: whether its start was logged.
    """

    process: Any
    started: Any
    reloads: int
    noted: bool = False


class Supervisor:
    """Starts worker processes, replaces those that die, and ends with them.

    The first worker starts alone, so that weights that cannot be loaded are reported once. Signals only set flags,
    which the loop reads: a worker that is starting while a signal comes is not forgotten.

    Args:
        work: runs in each worker, with the listening socket and an event to set when it accepts connections.
        listener: the listening socket.
        workers: number of processes.
        drain_seconds: seconds after which a worker that was asked to end should have ended.
        started: called when the first worker accepts connections.
    """

    def __init__(
        self,
        work: Callable[[socket.socket, Any], None],
        listener: socket.socket,
        workers: int,
        drain_seconds: float,
        started: Callable[[], None],
    ) -> None:
        self._work = work
        self._listener = listener
        self._wanted = workers
        self._drain_seconds = drain_seconds
        self._has_started = started
        self._context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._workers: list[_Worker] = []
        self._any_started = False
        self._failures = 0
        self._next_start = 0.0
        self._stop_requested = False
        self._reloads = 0

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT and return the exit code: 0, or 1 if no worker could start."""
        folder = tempfile.mkdtemp(prefix="conditional_detr_metrics_")
        os.environ[MULTIPROCESS_FOLDER] = folder
        signal.signal(signal.SIGINT, self._request_stop)
        signal.signal(signal.SIGTERM, self._request_stop)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, self._request_reload)
        try:
            failed = self._supervise()
            self._end_workers()
        finally:
            del os.environ[MULTIPROCESS_FOLDER]
            shutil.rmtree(folder, ignore_errors=True)
        return 1 if failed else 0

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _request_reload(self, number: int, frame: FrameType | None) -> None:
        self._reloads += 1

    def _supervise(self) -> bool:
        """Keep the workers running until a request to stop; return True if none runs and none can be started."""
        while not self._stop_requested:
            self._start_missing()
            wait([worker.process.sentinel for worker in self._workers], timeout=_POLL_SECONDS)
            self._note_starts()
            self._pass_on_reloads()
            for worker in self._take_ended():
                if not self._stop_requested:
                    self._note_failure(worker)
            limit = _MAX_FAILED_STARTS if self._any_started else 1
            if self._failures >= limit and not any(worker.started.is_set() for worker in self._workers):
                LOG.error("no worker can be started: the service ends")
                return True
        return False

    def _start_missing(self) -> None:
        wanted = self._wanted if self._any_started else 1
        while len(self._workers) < wanted and time.monotonic() >= self._next_start:
            started = self._context.Event()
            process = self._context.Process(target=self._work, args=(self._listener, started))
            process.start()
            self._workers.append(_Worker(process, started, self._reloads))

    def _note_starts(self) -> None:
        for worker in self._workers:
            if worker.started.is_set() and not worker.noted:
                worker.noted = True
                LOG.info("worker %s accepts connections", worker.process.pid)
                if not self._any_started:
                    self._any_started = True
                    self._has_started()

    def _note_failure(self, worker: _Worker) -> None:
        """Log the end of a worker; after failed starts, wait longer and longer before the next one."""
        LOG.error("worker %s ended with exit code %s", worker.process.pid, worker.process.exitcode)
        self._failures = 0 if worker.started.is_set() else self._failures + 1
        if self._failures:
            self._next_start = time.monotonic() + min(2.0**self._failures, _LONGEST_PAUSE)

    def _take_ended(self) -> list[_Worker]:
        """Remove the workers that have ended and return them."""
        ended = [worker for worker in self._workers if not worker.process.is_alive()]
        for worker in ended:
            self._workers.remove(worker)
            mark_process_dead(worker.process.pid)
        return ended

    def _pass_on_reloads(self) -> None:
        """Send SIGHUP to workers that have to read the keys again; before they have started, it would end them."""
        for worker in self._workers:
            if worker.reloads < self._reloads and worker.started.is_set() and worker.process.is_alive():
                worker.reloads = self._reloads
                os.kill(worker.process.pid, signal.SIGHUP)

    def _end_workers(self) -> None:
        """Ask the workers to end, wait for them, and kill those that do not end in time."""
        # the last worker that listens accepts what waits: nobody else may keep the socket and lose connections
        self._listener.close()
        for worker in self._workers:
            if not worker.started.is_set():
                worker.process.kill()
                worker.process.join()
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + self._drain_seconds + _KILL_SECONDS
        for worker in self._workers:
            worker.process.join(max(deadline - time.monotonic(), 0))
            if worker.process.is_alive():
                LOG.error("worker %s is killed: it did not end in time", worker.process.pid)
                worker.process.kill()
                worker.process.join()
