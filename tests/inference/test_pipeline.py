"""Working ahead and in batches: order, bounds and errors."""

import threading
import time

import pytest

from conditional_detr.inference.pipeline import map_in_batches, map_in_threads


def test_prepared_in_order_and_no_further_ahead_than_said():
    drawn, prepared = [], []

    def numbers():
        for i in range(20):
            drawn.append(i)
            yield i

    def prepare(i):
        time.sleep(0.002 * (i % 3))
        prepared.append(threading.current_thread())
        return i * i

    results = []
    for result in map_in_threads(prepare, numbers(), workers=3, depth=5):
        results.append(result)
        assert len(drawn) <= len(results) - 1 + 5
    assert results == [i * i for i in range(20)]
    assert len(set(prepared)) == 3
    assert threading.current_thread() not in prepared


def test_an_error_comes_at_its_items_turn_and_stops_the_threads():
    def prepare(i):
        return 6 // (3 - i)

    ahead = map_in_threads(prepare, range(9), workers=2, depth=4)
    assert [next(ahead), next(ahead), next(ahead)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(ahead)
    assert not [t for t in threading.enumerate() if t.name.startswith("conditional_detr")]


def test_leaving_early_stops_the_threads():
    ahead = map_in_threads(lambda i: i, iter(range(1000)), workers=2, depth=4)
    assert next(ahead) == 0
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("conditional_detr")]


@pytest.mark.parametrize(
    "keys", ["", "a", "aaaa", "abababab", "baaaaaaaaaaaaaaaaaa", "abcdefgh", "a-b-a-b", "aabbaabb-c"]
)
@pytest.mark.parametrize(("size", "window"), [(1, 1), (2, 4), (3, 12), (8, 8)])
def test_results_keep_the_items_order(keys, size, window):
    runs, held = [], 0

    def items():
        nonlocal held
        for place, key in enumerate(keys):
            held += 1
            yield place, key

    def run(group):
        runs.append(group)
        return [place for place, _ in group]

    results = []
    for result in map_in_batches(
        items(), lambda item: item[1].strip("-") or None, run, batch_size=size, window=window
    ):
        results.append(result)
        held -= 1
        assert held <= window
    assert results == list(range(len(keys)))
    assert all(len({key for _, key in group}) == 1 for group in runs)
    assert all(len(group) <= (1 if group[0][1] == "-" else size) for group in runs)
    assert sorted(item for group in runs for item in group) == list(enumerate(keys))


def test_full_groups_where_the_keys_allow():
    runs = []
    keys = "abababab"

    def run(group):
        runs.append("".join(group))
        return group

    list(map_in_batches(keys, lambda key: key, run, batch_size=4, window=8))
    assert runs == ["aaaa", "bbbb"]


def test_what_the_callers_iterator_raises_comes_after_all_that_was_drawn():
    def broken():
        yield from range(5)
        raise KeyError("camera")

    ahead = map_in_threads(lambda i: 10 * i, broken(), workers=2, depth=4)
    together = map_in_batches(ahead, lambda item: item % 20, list, batch_size=4, window=16)
    assert [next(together) for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(KeyError, match="camera"):
        next(together)
