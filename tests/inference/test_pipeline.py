"""Mapping in threads and in batches: order, bounds and errors."""

import threading
import time

import pytest

from conditional_detr.inference.pipeline import map_in_batches, map_in_threads


def test_results_are_in_order_and_reading_ahead_is_bounded():
    read, threads = [], []

    def numbers():
        for i in range(20):
            read.append(i)
            yield i

    def function(i):
        time.sleep(0.002 * (i % 3))
        threads.append(threading.current_thread())
        return i * i

    results = []
    for result in map_in_threads(function, numbers(), workers=3, depth=5):
        results.append(result)
        assert len(read) <= len(results) - 1 + 5
    assert results == [i * i for i in range(20)]
    assert len(set(threads)) == 3
    assert threading.current_thread() not in threads


def test_an_error_is_raised_at_its_item_and_stops_the_threads():
    def function(i):
        return 6 // (3 - i)

    before = threading.enumerate()
    ahead = map_in_threads(function, range(9), workers=2, depth=4)
    assert [next(ahead), next(ahead), next(ahead)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(ahead)
    assert not [t for t in threading.enumerate() if t.name.startswith("conditional_detr") and t not in before]


def test_closing_early_stops_the_threads():
    before = threading.enumerate()
    ahead = map_in_threads(lambda i: i, iter(range(1000)), workers=2, depth=4)
    assert next(ahead) == 0
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("conditional_detr") and t not in before]


@pytest.mark.parametrize(
    "keys", ["", "a", "aaaa", "abababab", "baaaaaaaaaaaaaaaaaa", "abcdefgh", "a-b-a-b", "aabbaabb-c"]
)
@pytest.mark.parametrize(("size", "window"), [(1, 1), (2, 4), (3, 12), (8, 8)])
def test_results_are_in_the_order_of_the_items(keys, size, window):
    runs, held = [], 0

    def items():
        nonlocal held
        for index, key in enumerate(keys):
            held += 1
            yield index, key

    def run(batch):
        runs.append(batch)
        return [index for index, _ in batch]

    results = []
    for result in map_in_batches(
        items(), lambda item: item[1].strip("-") or None, run, batch_size=lambda key: size, window=window
    ):
        results.append(result)
        held -= 1
        assert held <= window
    assert results == list(range(len(keys)))
    assert all(len({key for _, key in batch}) == 1 for batch in runs)
    assert all(len(batch) <= (1 if batch[0][1] == "-" else size) for batch in runs)
    assert sorted(item for batch in runs for item in batch) == list(enumerate(keys))


def test_full_batches_where_the_keys_allow():
    runs = []
    keys = "abababab"

    def run(batch):
        runs.append("".join(batch))
        return batch

    list(map_in_batches(keys, lambda key: key, run, batch_size=lambda key: 4, window=8))
    assert runs == ["aaaa", "bbbb"]


def test_an_error_of_the_iterator_is_raised_after_all_earlier_results():
    def broken():
        yield from range(5)
        raise KeyError("camera")

    ahead = map_in_threads(lambda i: 10 * i, broken(), workers=2, depth=4)
    together = map_in_batches(ahead, lambda item: item % 20, list, batch_size=lambda key: 4, window=16)
    assert [next(together) for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(KeyError, match="camera"):
        next(together)
