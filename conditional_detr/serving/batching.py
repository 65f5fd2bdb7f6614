"""Run images of many requests together: one thread per device takes what is ready."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple


class _Waiting(NamedTuple):
    """An item that waits for its batch."""

    item: Any
    future: "asyncio.Future[Any]"


class _Group(NamedTuple):
    """Items that may run together: the oldest first.

    Attributes:
        run: takes the items of a batch and returns a result, or an exception, for each.
        limit: maximum number of items in a batch.
        waiting: the items.
    """

    run: Callable[[list[Any]], Sequence[Any]]
    limit: int
    waiting: deque[_Waiting]


class Batcher:
    """A thread that runs batches of items with equal keys, the key of the oldest item first.

    While a batch runs, the next one fills up. An idle thread waits for further items only while some are announced,
    that is, on their way, and not longer than ``max_wait``: a single client never waits for others.

    Args:
        max_wait: seconds.
        name: of the thread.
    """

    def __init__(self, max_wait: float, name: str) -> None:
        self.max_wait = max_wait
        self._groups: dict[Hashable, _Group] = {}  # in the order of their oldest items
        self._announced = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Announce an item that is on its way, until the end of the context."""
        with self._changed:
            self._announced += 1
        try:
            yield
        finally:
            with self._changed:
                self._announced -= 1
                self._changed.notify()

    def submit(
        self, key: Hashable, item: Any, run: Callable[[list[Any]], Sequence[Any]], limit: int
    ) -> "asyncio.Future[Any]":
        """Run an item in a batch with others of its key.

        Args:
            key: of items that may run together.
            item: the item.
            run: as in :class:`_Group`; that of the first item of a batch is used.
            limit: maximum number of items in a batch.

        Returns:
            A future of the item's result, or of the exception of the item or the batch.

        Raises:
            RuntimeError: the batcher is closed.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the service is shutting down")
            group = self._groups.setdefault(key, _Group(run, limit, deque()))
            group.waiting.append(_Waiting(item, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Run what is waiting and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _take(self) -> tuple[_Group, list[_Waiting]] | None:
        """Wait for the next batch and return it; None after the last one."""
        with self._changed:
            self._changed.wait_for(lambda: self._groups or self._closed)
            if not self._groups:
                return None
            key, group = next(iter(self._groups.items()))
            full = lambda: len(group.waiting) >= group.limit or not self._announced or self._closed  # noqa: E731
            self._changed.wait_for(full, timeout=self.max_wait)
            batch = [group.waiting.popleft() for _ in range(min(group.limit, len(group.waiting)))]
            del self._groups[key]
            if group.waiting:  # others, which may be older than the rest of this group, come first
                self._groups[key] = group
            return group, batch

    def _work(self) -> None:
        while taken := self._take():
            self._run(*taken)
            del taken  # while the thread waits, no image stays in memory

    def _run(self, group: _Group, batch: list[_Waiting]) -> None:
        """Run a batch and give each future its result; the thread survives every error."""
        batch = [waiting for waiting in batch if not waiting.future.cancelled()]  # some requests were given up
        if not batch:
            return
        try:
            results = list(group.run([waiting.item for waiting in batch]))
            if len(results) != len(batch):
                raise RuntimeError(f"expected {len(batch)} results of a batch, got {len(results)}")
        except Exception as error:
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                waiting.future.get_loop().call_soon_threadsafe(_settle, waiting.future, result)


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    """Give a future its result, unless nobody waits for it."""
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
