"""Group the samples of an epoch into batches, for one process or several."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Sized(Protocol):
    """Anything that has a length."""

    def __len__(self) -> int: ...


def batches(
    data: Sized,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    probabilities: np.ndarray | None = None,
    rank: int = 0,
    processes: int = 1,
) -> list[list[int]]:
    """Return the batches of an epoch for one process, as lists of sample indices.

    In each step, all processes together use the samples that one process would use with ``processes`` times the batch
    size. Every sample is used once, unless they have probabilities, and all processes have the same number of batches.
    The batches of one step may be smaller. Only if that step has fewer samples than processes, some samples may be
    used twice.

    A dataset with ``row_groups``, such as ``ParquetData``, is shuffled in another way: each process reads row groups
    of its own, one after the other. If the processes do not divide their number, one sample may be used twice.

    Args:
        data: the dataset. If it has ``shapes``, (height, width) of each sample, and is shuffled, samples of one shape
            form a batch; the remaining samples are grouped by aspect ratio.
        batch_size: the maximum number of samples per process and step.
        seed: another seed gives another order; so does another epoch.
        epoch: see seed.
        shuffle: False: keep the dataset's order.
        probabilities: of each sample, (len(data),): draw as many samples as the dataset has, with replacement, instead
            of each one once.
        rank: the index of the process.
        processes: the number of processes.

    Raises:
        ValueError: batch_size or rank is invalid, there are fewer samples than processes, or probabilities of samples
            in row groups, which would be read anew for each sample.
    """
    if batch_size < 1 or not 0 <= rank < processes:
        raise ValueError(
            f"expected batch_size >= 1 and 0 <= rank < processes, got {batch_size}, {rank} and {processes}"
        )
    if len(data) < processes:
        raise ValueError(f"data: expected at least one sample per process, {processes}, got {len(data)}")
    generator = np.random.default_rng((seed, epoch))
    if shuffle and hasattr(data, "row_groups"):
        if probabilities is not None:
            raise ValueError("balanced: expected image files, got images in row groups, which are read one by one")
        return _local_batches(data, batch_size, generator, rank, processes)
    if hasattr(data, "row_groups"):
        return _steps(np.array_split(np.arange(len(data)), processes)[rank].tolist(), None, batch_size)
    size = batch_size * processes
    order = generator.permutation(len(data)).tolist() if shuffle else list(range(len(data)))
    if probabilities is not None:
        order = generator.choice(len(data), size=len(data), p=probabilities).tolist()
    shapes = getattr(data, "shapes", None) if shuffle else None
    steps = _steps(order, shapes, size)
    if shuffle:
        steps = [steps[i] for i in generator.permutation(len(steps))]
    return [step[rank::processes] for step in _fill_short_step(steps, processes)]


def _local_batches(
    data: Any, batch_size: int, generator: np.random.Generator, rank: int, processes: int
) -> list[list[int]]:
    """Return the batches of an epoch for one process, which need few row groups at a time.

    The row groups are drawn in a random order, which is cut into a part of equal length for each process. A process
    moves each sample of its part by up to ``shuffle_buffer`` samples, and groups as many at a time by shape. The parts
    share at most one row group with the next; one sample of a part that is shorter by one is used twice.
    """
    groups = [data.row_groups[i] for i in generator.permutation(len(data.row_groups))]
    order = np.concatenate([np.arange(group.start, group.stop) for group in groups])
    length = -(-len(order) // processes)
    part = np.array_split(order, processes)[rank]
    part = np.append(part, part[: length - len(part)])
    generator = generator.spawn(processes)[rank]
    part = part[np.argsort(np.arange(length) + generator.uniform(0, data.shuffle_buffer, length))]
    size = max(data.shuffle_buffer // batch_size, 1) * batch_size
    found = []
    for start in range(0, length, size):
        steps = _steps(part[start : start + size].tolist(), data.shapes, batch_size)
        found += [steps[i] for i in generator.permutation(len(steps))]
    return found


def _steps(order: list[int], shapes: Sequence[tuple[int, int]] | None, size: int) -> list[list[int]]:
    """Split an order of samples into steps: full steps of one shape, then the remaining samples by aspect ratio."""
    steps: list[list[int]] = []
    if shapes is not None:
        groups: dict[tuple[int, int], list[int]] = {}
        for i in order:
            groups.setdefault(shapes[i], []).append(i)
        order = []
        for group in groups.values():
            full = len(group) // size * size
            steps += [group[i : i + size] for i in range(0, full, size)]
            order += group[full:]
        order.sort(key=lambda i: shapes[i][0] / shapes[i][1])
    return steps + [order[i : i + size] for i in range(0, len(order), size)]


def _fill_short_step(steps: list[list[int]], processes: int) -> list[list[int]]:
    """Move samples from a full step to a step that has fewer samples than there are processes."""
    for i, step in enumerate(steps):
        if len(step) < processes:
            donor = (i + 1) % len(steps)
            both = step + steps[donor]
            if len(both) >= 2 * processes:
                steps[i], steps[donor] = both[: len(both) // 2], both[len(both) // 2 :]
            else:  # one sample per process: some are used twice, so that all processes have the same number of batches
                steps[i] = both[:processes]
            break
    return steps
