"""Two ways of working through images one after the other, in bounded memory: ahead of the model, and in batches."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")


def map_in_threads(
    prepare: Callable[[Item], Prepared], items: Iterable[Item], *, workers: int, depth: int
) -> Generator[Prepared, None, None]:
    """Apply a function to items in threads, so that the next ones are ready when the caller comes back for them.

    Args:
        prepare: the function; its threads run beside the caller only where it lets go of Python's lock, as PIL does.
        items: drawn from in the caller's thread, no further ahead than ``depth``.
        workers: number of threads.
        depth: how many items are at work or done and not yet taken.

    Returns:
        What the function returned, in the items' order; what it raised is raised at that item's turn, and what
        drawing an item raised after all items before it.
    """
    source = iter(items)
    failure: Exception | None = None

    def draw(count: int) -> Iterator[Item]:
        nonlocal failure
        try:
            yield from itertools.islice(source, count if failure is None else 0)
        except Exception as error:
            failure = error

    with ThreadPoolExecutor(workers, thread_name_prefix="conditional_detr") as pool:
        queue: deque[Future[Prepared]] = deque()
        try:
            while True:
                queue.extend(pool.submit(prepare, item) for item in draw(depth - len(queue)))
                if not queue:
                    break
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()
    if failure is not None:
        raise failure


def map_in_batches(
    items: Iterable[Item],
    key: Callable[[Item], Hashable | None],
    run: Callable[[list[Item]], Iterable[Result]],
    *,
    size: int,
    window: int,
) -> Iterator[Result]:
    """Run items of one key together, and give the results in the items' order.

    What drawing an item raises is raised after the results of all items before it.

    Args:
        items: in any order of keys.
        key: what items must share to run together; None: the item runs alone and at once.
        run: takes items of one key, returns their results in the same order.
        size: the most items that run together.
        window: a group runs before it is full when its first item lies this far behind; so at most this many items
            and results are held, however rare a key is.
    """
    waiting: dict[Hashable, list[tuple[int, Item]]] = {}  # by the age of their first item: dicts keep their order
    done: dict[int, Result] = {}
    turn = 0  # place of the next result to give

    def run_group(group: list[tuple[int, Item]]) -> None:
        done.update(zip((place for place, _ in group), run([item for _, item in group]), strict=True))

    source, failure = iter(items), None
    for place in itertools.count():
        try:
            item = next(source)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        group_key = key(item)
        if group_key is None:
            run_group([(place, item)])
        else:
            group = waiting.setdefault(group_key, [])
            group.append((place, item))
            if len(group) == size:
                run_group(waiting.pop(group_key))
        if waiting and place - next(iter(waiting.values()))[0][0] + 1 >= window:
            run_group(waiting.pop(next(iter(waiting))))
        while turn in done:
            yield done.pop(turn)
            turn += 1
    for group in waiting.values():
        run_group(group)
    for place in sorted(done):
        yield done.pop(place)
    if failure is not None:
        raise failure
