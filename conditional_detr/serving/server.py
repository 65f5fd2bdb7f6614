"""Run the service on uvicorn: header timeouts, graceful shutdown, several processes."""

import asyncio
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from conditional_detr.serving.errors import error_body
from conditional_detr.serving.gate import LOG, Gate
from conditional_detr.serving.metrics import MULTIPROCESS_FOLDER

_LAST_REQUESTS_SECONDS = 0.5
_MAX_FAILED_STARTS = 3
_BACKLOG = 512


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server.

    Attributes:
        workers: number of processes.
        drain_seconds: seconds that requests have to finish after SIGTERM.
        keep_alive_seconds: seconds after which a connection without requests is closed.
    """

    workers: int = 1
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 15.0


class _Config(uvicorn.Config):
    """uvicorn's configuration with the time that headers may take."""

    header_seconds: float


class _Protocol(HttpToolsProtocol):
    """A connection that is closed if the headers of a request do not arrive in time."""

    config: _Config
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._start()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def _start(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.config.header_seconds, self._refuse)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> None:
        """Answer 408 and close the connection."""
        self._timer = None
        if self.transport.is_closing():
            return
        message = f"expected the headers within {self.config.header_seconds:g} s"
        body = error_body(408, message, code="request_timeout")
        head = (
            "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """A server that answers the last requests of open connections before it ends.

    Args:
        config: the configuration.
        gate: the application.
        started: called when the server accepts connections.
    """

    def __init__(self, config: _Config, gate: Gate, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._gate = gate
        self._has_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._has_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listening socket; answer what open connections still send; close them."""
        self._gate.start_draining()
        for server in self.servers:
            server.close()
        await asyncio.sleep(_LAST_REQUESTS_SECONDS)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM, which end the server, and SIGHUP, which reads the keys again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Any] = {signal.SIGINT: self.handle_exit, signal.SIGTERM: self.handle_exit}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._reload_keys
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _reload_keys(self, number: int, frame: FrameType | None) -> None:
        if self._gate.keys is None:
            return
        try:
            self._gate.keys.reload()
            LOG.info("the API keys were read again")
        except (OSError, ValueError) as error:
            LOG.error("the API keys are as before: %s", error)


class JsonLines(logging.Formatter):
    """Format every record as one line of JSON; those of requests are already."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        message = super().format(record)
        if message.startswith("{"):
            return message
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps({"time": when, "level": record.levelname.lower(), "message": message})


def log_to_stderr() -> None:
    """Write the service's log, and uvicorn's warnings, to standard error as lines of JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in ((LOG.name, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        OSError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name != "nt":  # there it would let two servers have one port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def run(
    create: Callable[[], Gate],
    listener: socket.socket,
    options: ServerOptions,
    started: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code: 0, or 1 if the service could not start.

    Args:
        create: returns the application; with several workers it is called in each of their processes, so it has to
            be picklable.
        listener: the listening socket.
        options: options of the server.
        started: called when this process accepts connections.
    """
    if options.workers > 1:
        return _Supervisor(create, listener, options).run()
    gate = create()
    config = _Config(
        gate,
        http=_Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(options.keep_alive_seconds),
        timeout_graceful_shutdown=int(options.drain_seconds),
        backlog=_BACKLOG,
    )
    config.header_seconds = gate.service.settings.header_seconds
    server = _Server(config, gate, started)
    server.run(sockets=[listener])
    return 0 if server.started else 1


class _Supervisor:
    """Starts worker processes, replaces those that die, and ends with them."""

    def __init__(self, create: Callable[[], Gate], listener: socket.socket, options: ServerOptions) -> None:
        self._create = create
        self._listener = listener
        self._options = options
        self._context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._workers: dict[Any, Any] = {}  # processes, and the events of their start
        self._stopping = False

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT and return the exit code."""
        folder = tempfile.mkdtemp(prefix="conditional_detr_metrics_")
        os.environ[MULTIPROCESS_FOLDER] = folder
        handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._stop)
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._forward
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            for _ in range(self._options.workers):
                self._start()
            return self._supervise()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            shutil.rmtree(folder, ignore_errors=True)

    def _supervise(self) -> int:
        failures = 0
        while self._workers:
            wait([worker.sentinel for worker in self._workers], timeout=0.2)
            for worker, started in list(self._workers.items()):
                if worker.is_alive():
                    continue
                del self._workers[worker]
                mark_process_dead(worker.pid)
                if self._stopping:
                    continue
                failures = 0 if started.is_set() else failures + 1
                LOG.error("worker %s ended with exit code %s", worker.pid, worker.exitcode)
                if failures >= _MAX_FAILED_STARTS:
                    LOG.error("workers fail to start: the service ends")
                    self._stop(signal.SIGTERM, None)
                    continue
                self._start()
        return 1 if failures >= _MAX_FAILED_STARTS else 0

    def _start(self) -> None:
        started = self._context.Event()
        one = ServerOptions(1, self._options.drain_seconds, self._options.keep_alive_seconds)
        worker = self._context.Process(target=_work, args=(self._create, self._listener, one, started))
        worker.start()
        self._workers[worker] = started

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        self._forward(signal.SIGTERM, frame)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        for worker in list(self._workers):
            if worker.is_alive():
                os.kill(worker.pid, number)


def _work(create: Callable[[], Gate], listener: socket.socket, options: ServerOptions, started: Any) -> None:
    """Serve in a worker process, which ends when its parent does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent forwards it as SIGTERM
    threading.Thread(target=end_with_parent, daemon=True).start()
    log_to_stderr()
    sys.exit(run(create, listener, options, started.set))
