"""The thread that runs batches: nothing is lost, nobody waits for ever, and it survives every error."""

import asyncio
import gc
import threading
import time
import weakref
from contextlib import contextmanager

import pytest

from conditional_detr.serving.batching import Batcher


@contextmanager
def batcher(max_wait: float = 0.0):
    made = Batcher(max_wait, "test")
    try:
        yield made
    finally:
        closing = threading.Thread(target=made.close, daemon=True)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()


def doubled(items):
    return [2 * item for item in items]


class Blocked:
    """A function of batches that waits, in the first one, until it may go on; notes all batches."""

    def __init__(self):
        self.batches = []
        self.may_go_on, self.entered = threading.Event(), threading.Event()

    def __call__(self, items):
        self.batches.append(list(items))
        self.entered.set()
        assert self.may_go_on.wait(20)
        return items

    async def until_entered(self):
        await asyncio.get_running_loop().run_in_executor(None, self.entered.wait, 20)


def test_every_item_of_many_loops_gets_its_own_result():
    with batcher(0.001) as made:

        async def client(number: int) -> None:
            for i in range(50):
                item = 1000 * number + i
                with made.announced():
                    await asyncio.sleep(0)
                    future = made.submit(item % 3, item, doubled, 1 + item % 3)
                assert await asyncio.wait_for(future, 20) == 2 * item

        async def clients(first: int) -> None:
            await asyncio.gather(*(client(first + i) for i in range(8)))

        errors = []

        def run(first: int) -> None:
            try:
                asyncio.run(clients(first))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(first,)) for first in (0, 100, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert made._announced == 0
        assert not made._groups


def test_batches_are_of_one_key_the_oldest_first_and_within_the_limit():
    async def main() -> None:
        run = Blocked()
        futures = [made.submit("first", "first", run, 1)]
        await run.until_entered()
        futures += [made.submit(item[0], item, run, 2) for item in ("a1", "b1", "a2", "a3", "b2", "a4", "a5")]
        run.may_go_on.set()
        await asyncio.wait_for(asyncio.gather(*futures), 20)
        assert run.batches == [["first"], ["a1", "a2"], ["b1", "b2"], ["a3", "a4"], ["a5"]]

    with batcher() as made:
        asyncio.run(main())


def test_a_rare_key_is_not_starved_by_a_frequent_one():
    async def main() -> None:
        counted = 0

        async def frequent() -> None:
            nonlocal counted
            while not rare.done():
                await made.submit("frequent", 1, doubled, 2)
                counted += 1

        crowd = [asyncio.ensure_future(frequent()) for _ in range(8)]
        rare = asyncio.get_running_loop().create_future()
        await asyncio.sleep(0.01)
        before = counted
        assert await asyncio.wait_for(made.submit("rare", 1, doubled, 2), 20) == 2
        rare.set_result(None)
        await asyncio.gather(*crowd)
        assert counted - before <= 32

    with batcher() as made:
        asyncio.run(main())


@pytest.mark.parametrize("given_up", [True, False])
def test_an_idle_thread_waits_for_announced_items_only_and_no_longer_than_it_may(given_up):
    async def main() -> None:
        began = time.monotonic()
        assert await made.submit("a", 1, doubled, 4) == 2
        assert time.monotonic() - began < 5  # nothing is announced: no wait
        announced = made.announced()
        announced.__enter__()
        future = made.submit("a", 1, doubled, 4)
        await asyncio.sleep(0.05)
        assert not future.done()
        if given_up:
            announced.__exit__(None, None, None)
            assert await asyncio.wait_for(future, 5) == 2
        else:
            futures = [made.submit("a", item, doubled, 4) for item in (2, 3, 4)]  # the batch is full
            assert await asyncio.wait_for(asyncio.gather(future, *futures), 5) == [2, 4, 6, 8]
            announced.__exit__(None, None, None)

    with batcher(10.0) as made:
        asyncio.run(main())


def test_an_announced_item_that_does_not_come():
    async def main() -> None:
        with made.announced():
            assert await asyncio.wait_for(made.submit("a", 1, doubled, 4), 20) == 2

    with batcher(0.01) as made:
        asyncio.run(main())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda items: 1 / 0, "division by zero"),
        (lambda items: items[:-1], "expected 2 results of a batch, got 1"),
        (lambda items: [*items, 3], "expected 2 results of a batch, got 3"),
        (lambda items: None, "not iterable"),
        (lambda items: (_ for _ in (1 / 0,)), "division by zero"),
    ],
)
def test_errors_of_a_batch_reach_its_items_and_no_others(run, message):
    async def main() -> None:
        first = Blocked()
        blocked = made.submit("first", 0, first, 1)
        await first.until_entered()
        futures = [made.submit("a", item, run, 2) for item in (1, 2)]
        other = made.submit("b", 1, doubled, 2)
        first.may_go_on.set()
        await blocked
        for outcome in await asyncio.gather(*futures, return_exceptions=True):
            with pytest.raises(Exception, match=message):
                raise outcome
        assert await asyncio.wait_for(other, 20) == 2

    with batcher() as made:
        asyncio.run(main())


def test_an_error_of_one_item_is_that_items_alone():
    async def main() -> None:
        first = Blocked()
        blocked = made.submit("first", 0, first, 1)
        await first.until_entered()
        one, two = (made.submit("a", item, lambda items: [ValueError("bad"), *items[1:]], 2) for item in (1, 2))
        first.may_go_on.set()
        await blocked
        with pytest.raises(ValueError, match="bad"):
            await one
        assert await two == 2

    with batcher() as made:
        asyncio.run(main())


def test_cancelled_items_are_not_run_and_leave_the_others():
    async def main() -> None:
        run = Blocked()
        running = made.submit("a", "running", run, 4)
        await run.until_entered()
        waiting = [made.submit("a", item, run, 4) for item in ("one", "two", "three")]
        alone = made.submit("b", "alone", run, 4)
        for future in (running, waiting[1], alone):
            future.cancel()
        run.may_go_on.set()
        assert await asyncio.wait_for(asyncio.gather(waiting[0], waiting[2]), 20) == ["one", "three"]
        assert await asyncio.wait_for(made.submit("b", "last", run, 4), 20) == "last"
        assert run.batches == [["running"], ["one", "three"], ["last"]]

    with batcher() as made:
        asyncio.run(main())


def test_a_loop_that_is_closed_does_not_end_the_thread():
    run = Blocked()

    async def leave() -> None:
        made.submit("a", 1, run, 1)
        await run.until_entered()

    async def come() -> int:
        return await asyncio.wait_for(made.submit("a", 1, doubled, 1), 20)

    with batcher() as made:
        asyncio.run(leave())
        run.may_go_on.set()
        assert asyncio.run(come()) == 2


def test_closing_runs_what_waits_and_refuses_what_comes():
    async def main() -> None:
        run = Blocked()
        futures = [made.submit("a", item, run, 1) for item in (1, 2, 3)]
        await run.until_entered()
        closing = asyncio.get_running_loop().run_in_executor(None, made.close)
        while not made._closed:
            await asyncio.sleep(0.001)
        with pytest.raises(RuntimeError, match="shutting down"):
            made.submit("a", 4, run, 1)
        run.may_go_on.set()
        assert await asyncio.wait_for(asyncio.gather(*futures), 20) == [1, 2, 3]
        await closing
        assert not made._thread.is_alive()

    with batcher(10.0) as made:
        asyncio.run(main())


def test_nothing_is_kept_of_a_batch_that_has_run():
    class Item:
        pass

    async def main() -> weakref.ref:
        item = Item()
        await made.submit("a", item, lambda items: [len(items)], 1)
        return weakref.ref(item)

    with batcher() as made:
        kept = asyncio.run(main())
        end = time.monotonic() + 20
        while kept() is not None and time.monotonic() < end:
            gc.collect()
            time.sleep(0.01)
        assert kept() is None
