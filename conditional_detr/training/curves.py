"""Plots of a training run: losses, AP and learning rate by step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.plotting import import_matplotlib

_POINTS = 200  # a curve with many more is smoothed


def plot_curves(log: Path, target: Path) -> None:
    """Plot losses, AP and learning rate of a run.

    Args:
        log: ``log.jsonl`` of the run.
        target: the PNG file to write.

    Raises:
        OSError: a file cannot be read or written.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    entries = read_log(log)
    steps = [entry for entry in entries if "loss" in entry]
    epochs = [entry for entry in entries if "AP" in entry]
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, names in zip(axes, (("loss",), ("class", "l1", "giou"), ("AP", "AP50"), ("lr",)), strict=True):
        for name in names:
            _plot(axis, epochs if name.startswith("AP") else steps, name)
        axis.set_xlabel("step")
        axis.set_title(", ".join(names) + (" of the last layer" if "l1" in names else ""))
        if len(names) > 1 and axis.lines:
            axis.legend()
    write_atomically({target: lambda path: figure.savefig(path, format="png", dpi=100)})


def read_log(log: Path) -> list[dict[str, Any]]:
    """Read the entries of a run's log, without an unfinished last line, which a killed process leaves."""
    *lines, _ = log.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _plot(axis: Any, entries: Sequence[Mapping[str, Any]], name: str) -> None:
    """Plot one curve: its values; if they are many, faint, with their running mean."""
    if not entries:
        return
    x = np.array([entry["step"] for entry in entries])
    y = np.array([entry[name] for entry in entries], dtype=float)
    window = max(1, len(y) // _POINTS)
    if window == 1:
        axis.plot(x, y, label=name, marker="." if len(y) < 30 else None)
        return
    (line,) = axis.plot(x, y, alpha=0.2)
    mean = np.convolve(y, np.ones(window) / window, mode="valid")
    axis.plot(x[window - 1 :], mean, label=name, color=line.get_color())
