"""Process a stream of items in bounded memory: in threads, ahead of the consumer, or in batches of equal keys."""

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, depth: int
) -> Generator[Result, None, None]:
    """Apply a function to items in threads, ahead of the consumer.

    Args:
        function: runs in parallel with the consumer only where it releases the GIL, as PIL does.
        items: read in the consumer's thread, at most ``depth`` items ahead.
        workers: number of threads.
        depth: maximum number of items that are in progress, or done and not yet consumed.

    Returns:
        A generator of the results in the order of the items. An exception of the function is raised at its item; an
        exception of the iterator ``items`` is raised after the results of all items before it.
    """
    source = iter(items)
    failure: Exception | None = None

    def read(count: int) -> Iterator[Item]:
        nonlocal failure
        try:
            yield from itertools.islice(source, count if failure is None else 0)
        except Exception as error:
            failure = error

    with ThreadPoolExecutor(workers, thread_name_prefix="conditional_detr") as pool:
        futures: deque[Future[Result]] = deque()
        try:
            while True:
                futures.extend(pool.submit(function, item) for item in read(depth - len(futures)))
                if not futures:
                    break
                yield futures.popleft().result()
        finally:
            for future in futures:
                future.cancel()
    if failure is not None:
        raise failure


_END = object()
_POLL = 0.1  # seconds between looks at whether the consumer of a thread has gone


def read_ahead(items: Iterable[Item], *, depth: int) -> Generator[Item, None, None]:
    """Run an iterator in a thread of its own, ahead of the consumer.

    Args:
        items: read in the thread. A generator is closed there when the consumer closes this one.
        depth: maximum number of items that are read and not yet consumed, besides the one that is being read.

    Returns:
        A generator of the items. An exception of the iterator is raised after the items before it.
    """
    read: queue.Queue[Any] = queue.Queue(depth)
    gone = threading.Event()

    def put(entry: Any) -> None:
        while not gone.is_set():
            with suppress(queue.Full):
                read.put(entry, timeout=_POLL)
                return

    def run() -> None:
        failure: BaseException | None = None
        try:
            for item in items:
                put((item,))
                if gone.is_set():
                    break
        except BaseException as error:  # also of an interpreter that ends
            failure = error
        finally:
            if isinstance(items, Generator):
                items.close()
        put(failure or _END)

    thread = threading.Thread(target=run, name="conditional_detr", daemon=True)
    thread.start()
    try:
        while (entry := read.get()) is not _END:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]
    finally:
        gone.set()
        thread.join()


def map_in_batches(
    items: Iterable[Item],
    key: Callable[[Item], Hashable | None],
    run: Callable[[list[Item]], Iterable[Result]],
    *,
    batch_size: Callable[[Hashable], int],
    window: int,
) -> Iterator[Result]:
    """Apply a function to batches of items that have equal keys, and yield the results in the order of the items.

    An exception of the iterator ``items`` is raised after the results of all items before it.

    Args:
        items: may have their keys in any order.
        key: returns the key of an item; None: the item runs at once, in a batch of one.
        run: takes a batch and returns its results in the same order.
        batch_size: returns the maximum number of items in a batch of a key.
        window: a batch runs before it is full once its first item is this many items back. This bounds the number of
            items and results in memory, even for a rare key.

    Returns:
        An iterator of the results.
    """
    waiting: dict[Hashable, list[tuple[int, Item]]] = {}  # unfinished batches, the oldest first
    done: dict[int, Result] = {}
    next_index = 0  # of the next result to yield

    def run_batch(batch: list[tuple[int, Item]]) -> None:
        done.update(zip((index for index, _ in batch), run([item for _, item in batch]), strict=True))

    source, failure = iter(items), None
    for index in itertools.count():
        try:
            item = next(source)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        item_key = key(item)
        if item_key is None:
            run_batch([(index, item)])
        else:
            batch = waiting.setdefault(item_key, [])
            batch.append((index, item))
            if len(batch) == batch_size(item_key):
                run_batch(waiting.pop(item_key))
        if waiting and index - next(iter(waiting.values()))[0][0] + 1 >= window:
            run_batch(waiting.pop(next(iter(waiting))))
        while next_index in done:
            yield done.pop(next_index)
            next_index += 1
    for batch in waiting.values():
        run_batch(batch)
    for index in sorted(done):
        yield done.pop(index)
    if failure is not None:
        raise failure
