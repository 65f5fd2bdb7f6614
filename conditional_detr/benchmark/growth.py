"""How time grows with the size of an image and the number of them, and how it falls with threads of the CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from conditional_detr.benchmark.measure import Measurement, measure
from conditional_detr.benchmark.timing import threads_set
from conditional_detr.modeling.conditional_detr import ConditionalDETR

HEIGHTS, BATCHES, COMMON = (400, 600, 800, 1000, 1333), (1, 2, 4), 800


def measure_scaling(
    model: ConditionalDETR,
    names: Sequence[str],
    *,
    heights: Sequence[int] = HEIGHTS,
    batches: Sequence[int] = BATCHES,
    common: int = COMMON,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Time engines on images of several sizes, on several of them, and on a CPU with 1, 2, 4, ... threads.

    One thing grows at a time: other than that it is one image, of the common height, and all threads that torch
    uses now. It uses as many afterwards.

    Args:
        model: see :func:`~conditional_detr.benchmark.measure.measure`.
        names: likewise.
        heights: of the images, in pixels; their width is 4/3 of it.
        batches: images a call, of the common height.
        common: the height at which batches and threads grow, in pixels.
        rounds: how often each is timed.
        progress: told what is being done.
        on_failure: see :func:`~conditional_detr.benchmark.measure.measure`.

    Returns:
        Measurements of every case, the engines of a case together.

    Raises:
        OSError, ValueError, ModuleNotFoundError: see :func:`~conditional_detr.benchmark.measure.measure`.
    """
    most = torch.get_num_threads()
    counts = thread_counts(most) if model.device.type == "cpu" else []
    cases = [(height, 1, most) for height in heights]
    cases += [(common, batch, most) for batch in batches]
    cases += [(common, 1, threads) for threads in counts]
    measurements = []
    for height, batch, threads in dict.fromkeys(cases):  # what is a case of all three is timed once
        with threads_set(threads):
            size = height, round(height * 4 / 3)
            how: dict[str, Any] = {"rounds": rounds, "progress": progress, "on_failure": on_failure}
            measurements += measure(model, names, size=size, batch=batch, **how)
    return measurements


def thread_counts(most: int) -> list[int]:
    """Return 1, 2, 4, ... and the most."""
    return [*(2**i for i in range((most - 1).bit_length())), most]
