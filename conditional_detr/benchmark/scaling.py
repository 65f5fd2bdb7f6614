"""Scaling of the time with image size, batch size and CPU threads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from conditional_detr.benchmark.measure import Measurement, measure
from conditional_detr.benchmark.timing import torch_threads
from conditional_detr.modeling.detection_transformer import DetectionTransformer

HEIGHTS, BATCHES, COMMON = (400, 600, 800, 1000, 1333), (1, 2, 4), 800


def measure_scaling(
    model: DetectionTransformer,
    names: Sequence[str],
    *,
    heights: Sequence[int] = HEIGHTS,
    batches: Sequence[int] = BATCHES,
    common: int = COMMON,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Time engines at several image sizes, batch sizes and, on a CPU, thread counts 1, 2, 4, ...

    One quantity varies at a time. The others are one image, the common height, and the current thread count of
    torch, which is restored afterwards.

    Args:
        model: see :func:`~conditional_detr.benchmark.measure.measure`.
        names: see :func:`~conditional_detr.benchmark.measure.measure`.
        heights: image heights in pixels; the width is 4/3 of the height.
        batches: batch sizes, at the common height.
        common: image height in pixels for varying batch sizes and thread counts.
        rounds: number of timed calls per engine.
        progress: called with a description of the current step.
        on_failure: see :func:`~conditional_detr.benchmark.measure.measure`.

    Returns:
        Measurements of all cases, case by case.

    Raises:
        OSError, ValueError, ModuleNotFoundError: see :func:`~conditional_detr.benchmark.measure.measure`.
    """
    most = torch.get_num_threads()
    counts = thread_counts(most) if model.device.type == "cpu" else []
    cases = [(height, 1, most) for height in heights]
    cases += [(common, batch, most) for batch in batches]
    cases += [(common, 1, threads) for threads in counts]
    measurements = []
    for height, batch, threads in dict.fromkeys(cases):  # the common case occurs in all three and is timed once
        with torch_threads(threads):
            size = height, round(height * 4 / 3)
            options: dict[str, Any] = {"rounds": rounds, "progress": progress, "on_failure": on_failure}
            measurements += measure(model, names, size=size, batch=batch, **options)
    return measurements


def thread_counts(most: int) -> list[int]:
    """Return the powers of two below a number, and the number."""
    return [*(2**i for i in range((most - 1).bit_length())), most]
