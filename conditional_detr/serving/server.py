"""Run the service on uvicorn: graceful shutdown, signals, logs, one process or several."""

import asyncio
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from conditional_detr.serving.gate import Gate
from conditional_detr.serving.keys import ApiKeys
from conditional_detr.serving.protocol import Config, Protocol
from conditional_detr.serving.service import LOG
from conditional_detr.serving.supervisor import Supervisor

_LAST_REQUESTS_SECONDS = 0.5
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


class _Server(uvicorn.Server):
    """A server that answers the last requests of open connections before it ends.

    Args:
        config: the configuration.
        gate: the application.
        drain_seconds: seconds that requests have to finish.
        started: called when the server accepts connections.
    """

    def __init__(self, config: Config, gate: Gate, drain_seconds: float, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._gate = gate
        self._drain_seconds = drain_seconds
        self._has_started = started
        self._reload_requested = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._has_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept the connections that wait, stop listening, answer what clients have sent, close connections."""
        began = time.monotonic()
        self._gate.start_draining()
        listeners = [listener.dup() for listener in sockets or ()]  # which outlive those that the servers close
        for server in self.servers:
            server.close()
        waiting = [connection for listener in listeners for connection in _accept_waiting(listener)]
        for connection in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        await asyncio.sleep(min(_LAST_REQUESTS_SECONDS, self._drain_seconds))
        left = self._drain_seconds - (time.monotonic() - began)
        self.config.timeout_graceful_shutdown = max(math.ceil(left), 0)
        await super().shutdown(sockets)

    def _protocol(self) -> Protocol:
        return Protocol(self.config, self.server_state, self.lifespan.state)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM, which end the server, and SIGHUP, which reads the keys again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Any] = {signal.SIGINT: self.handle_exit, signal.SIGTERM: self.handle_exit}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._request_reload
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield

    def _request_reload(self, number: int, frame: FrameType | None) -> None:
        self._reload_requested = True

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does every 0.1 seconds, and what a signal has asked for."""
        if self._reload_requested and self._gate.keys is not None:
            self._reload_keys(self._gate.keys)
        self._reload_requested = False
        return await super().on_tick(counter)

    def _reload_keys(self, keys: ApiKeys) -> None:
        try:
            keys.reload()
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
    """Write the service's log, and warnings of the libraries, to standard error as lines of JSON.

    Warnings of Python are dropped: they are about strangers' images, such as broken EXIF data, and Python would
    remember each.
    """
    warnings.simplefilter("ignore")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name, level in ((LOG.name, logging.INFO), ("uvicorn", logging.WARNING), (None, logging.WARNING)):
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


def _accept_waiting(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield the connections that wait to be accepted and close the socket; those that come later are refused."""
    listener.setblocking(False)
    with listener, suppress(OSError):
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            yield connection


def run(
    create: Callable[[], Gate],
    listener: socket.socket,
    options: ServerOptions,
    started: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGTERM or SIGINT and return the exit code: 0, or 1 if the service could not start.

    Called in the main thread, it sets the handlers of SIGTERM, SIGINT and SIGHUP and leaves them: a second signal does
    not change how the process ends.

    Args:
        create: returns the application; with several workers it is called in each of their processes, so it has to
            be picklable.
        listener: the listening socket.
        options: options of the server.
        started: called when the service accepts connections.

    Raises:
        ImportError, OSError, TypeError, ValueError: from ``create``, if there is one process.
    """
    if options.workers > 1:
        work = partial(_work, create, options)
        return Supervisor(work, listener, options.workers, options.drain_seconds, started).run()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while models are loaded; as process 1 of a container
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
    gate = create()
    config = Config(
        gate,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(options.keep_alive_seconds),
        backlog=_BACKLOG,
    )
    config.header_seconds = gate.service.settings.header_seconds
    server = _Server(config, gate, options.drain_seconds, started)
    try:
        server.run(sockets=[listener])
    except SystemExit as error:  # uvicorn has logged why
        return 1 if error.code else 0
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process is ending
    return 0 if server.started else 1


def _work(create: Callable[[], Gate], options: ServerOptions, listener: socket.socket, started: Any) -> None:
    """Serve in a worker process, which ends when its parent does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent forwards it as SIGTERM
    threading.Thread(target=end_with_parent, daemon=True).start()
    log_to_stderr()
    try:
        code = run(create, listener, replace(options, workers=1), started.set)
    except (ImportError, OSError, TypeError, ValueError) as error:
        LOG.error("%s", error)
        code = 1
    sys.exit(code)
