"""Draw the report: bars for engines and training, lines for scaling."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conditional_detr.benchmark.measure import Measurement
from conditional_detr.benchmark.report import Report
from conditional_detr.benchmark.timing import Timing
from conditional_detr.benchmark.training import CRITERION, STEP

_OURS, _THEIRS = "tab:blue", "tab:gray"
_LABELS = {STEP: "training step", CRITERION: "loss"}


def draw(report: Report, target: Path) -> None:
    """Draw the seconds of every engine and of training, and below them the pipeline and the scaling, if measured.

    Args:
        report: the report.
        target: the PNG file to write.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(one.kind for one in report.training))
    heights = [max(0.35 * len(report.measurements) + 1.6, 1.8 * len(kinds))]
    heights += [0.35 * len(report.pipeline) + 1.2] if report.pipeline else []
    heights += [3.5] if report.scaling else []
    figure = Figure(figsize=(11 if kinds or report.scaling else 7, sum(heights)), layout="constrained")
    figure.suptitle(report.title)
    above, *below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    left, *right = above.subfigures(1, 2 if kinds else 1, squeeze=False, width_ratios=[3, 2] if kinds else None)[0]
    _bars(left.subplots(), report.measurements, "seconds")
    for part in right:
        for axes, kind in zip(part.subplots(len(kinds), squeeze=False)[:, 0], kinds, strict=True):
            own = [one for one in report.training if one.kind == kind]
            _bars(axes, own, f"seconds per {_LABELS[kind]}")
    if report.pipeline:
        label = f"images per second from files to detections, {report.pipeline[0].images} images"
        _bars(below[0].subplots(), report.pipeline, label, unit="", value=lambda one: one.rate)
    if report.scaling:
        _lines(below[-1], report.scaling)
    figure.savefig(target, format="png", dpi=100)


def _bars(
    axes: Any,
    timings: Sequence[Timing],
    label: str,
    *,
    unit: str = " s",
    value: Callable[[Any], float] = lambda one: one.median,
) -> None:
    """Draw a bar for each engine, with another colour for transformers."""
    names = [one.engine for one in timings]
    colours = [_THEIRS if "transformers" in name else _OURS for name in names]
    bars = axes.barh(names, [value(one) for one in timings], color=colours)
    texts = [f"{f'{value(one):#.3g}'.rstrip('.')}{unit}, {one.ratio:.2f}x" for one in timings]
    axes.bar_label(bars, texts, padding=3)
    axes.margins(x=0.6)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def _lines(figure: Any, scaling: Sequence[Measurement]) -> None:
    """Draw a panel for each quantity that varies, with a line for each engine."""
    fewest, most = min(one.batch for one in scaling), max(one.threads for one in scaling)
    height, width = statistics.mode((one.height, one.width) for one in scaling)
    single = [one for one in scaling if one.batch == fewest]
    common = [one for one in scaling if (one.height, one.width) == (height, width)]
    panels = [
        ("height", [one for one in single if one.threads == most], "height in pixels (width: 4/3 height)"),
        ("batch", [one for one in common if one.threads == most], f"batch size at {height} x {width}"),
        ("threads", [one for one in common if one.batch == fewest], f"threads at {height} x {width}, batch size 1"),
    ]
    if all(one.threads == most for one in scaling):  # on a GPU, or on a single thread
        panels.pop()
    axes: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (quantity, measurements, label) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(one.engine for one in measurements):
            own = sorted((one for one in measurements if one.engine == name), key=lambda one: getattr(one, quantity))
            panel.plot([getattr(one, quantity) for one in own], [one.median for one in own], marker=".", label=name)
        if quantity != "height":  # no ticks at fractions of an image or thread
            panel.set_xticks(sorted({getattr(one, quantity) for one in measurements}))
        panel.set_ylim(bottom=0)
        panel.set_xlabel(label)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
