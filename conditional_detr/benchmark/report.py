"""The report: a table in Markdown, and a picture of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conditional_detr.benchmark.measure import Reading

HEAD = ("engine", "ms", "times as fast", "least to most", "peak MB", "logits", "boxes")
_OURS, _THEIRS = "tab:blue", "tab:gray"


def rows(readings: Sequence[Reading], peaks: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return a table's rows, in words, under ``HEAD``.

    Args:
        readings: of one size and batch.
        peaks: most memory of a process that runs one engine, in MB, where it is known.
    """
    return [
        (
            reading.engine,
            f"{reading.median * 1e3:.0f}",
            f"{reading.ratio:.2f}",
            f"{min(reading.ratios):.2f} to {max(reading.ratios):.2f}",
            f"{peaks[reading.engine]:.0f}" if reading.engine in peaks else "",
            f"{reading.logits:.0e}",
            f"{reading.boxes:.0e}",
        )
        for reading in readings
    ]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)], *table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw(readings: Sequence[Reading], growth: Sequence[Reading], title: str, target: Path) -> None:
    """Draw seconds of every engine, and how they grow with the size of a picture and the number of them.

    Args:
        readings: of one size and batch.
        growth: of several sizes at one picture, and of several batches at one size.
        title: of the picture.
        target: the png.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if growth else 7, 0.35 * len(readings) + 1.6), layout="constrained")
    axes: Any = figure.subplots(1, 3 if growth else 1, squeeze=False)[0]
    figure.suptitle(title)
    names = [reading.engine for reading in readings]
    colours = [_THEIRS if "transformers" in name else _OURS for name in names]
    bars = axes[0].barh(names, [reading.median for reading in readings], color=colours)
    axes[0].bar_label(bars, [f"{reading.median:.2f} s, {reading.ratio:.2f}x" for reading in readings], padding=3)
    axes[0].margins(x=0.6)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("seconds")
    for name in dict.fromkeys(reading.engine for reading in growth):
        own = [reading for reading in growth if reading.engine == name]
        smallest = min(reading.batch for reading in own)
        singles = sorted((r for r in own if r.batch == smallest), key=lambda r: r.height * r.width)
        common = max({(r.height, r.width) for r in own}, key=lambda s: sum((r.height, r.width) == s for r in own))
        batches = sorted((r for r in own if (r.height, r.width) == common), key=lambda r: r.batch)
        axes[1].plot([r.height for r in singles], [r.median for r in singles], marker=".", label=name)
        axes[2].plot([r.batch for r in batches], [r.median for r in batches], marker=".", label=name)
        axes[2].set_xlabel(f"pictures of {common[0]} x {common[1]}")
    if growth:
        axes[1].set_xlabel("height; width is 4/3 of it")
        axes[1].legend()
    figure.savefig(target, format="png", dpi=100)
