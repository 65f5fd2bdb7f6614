"""Plots of a training run: losses, AP, also of single classes, and learning rate by step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.plotting import import_matplotlib

_OF_STEPS = ("loss", "class", "l1", "giou", "lr")
_PLOTS = (("loss",), ("class", "l1", "giou"), ("val_loss",), ("AP", "AP50"), (), ("lr",))
_POINTS = 200  # a curve with many more is smoothed
_CLASSES = 10  # of more classes, those with the lowest AP are plotted


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
    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, names in zip(axes, _PLOTS, strict=True):
        for name in names:
            _plot(axis, steps if name in _OF_STEPS else epochs, name)
        axis.set_xlabel("step")
        axis.set_title(", ".join(names) + (" of the last layer" if "l1" in names else ""))
        if not names:
            _plot_classes(axis, epochs)
        if len(names) > 1 and axis.lines:
            axis.legend()
    write_atomically({target: lambda path: figure.savefig(path, format="png", dpi=100)})


def _plot_classes(axis: Any, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Plot the AP of each class, or of those whose AP is lowest at the end; classes without annotations have none."""
    last: Mapping[str, float] = epochs[-1].get("per_class", {}) if epochs else {}
    names = sorted((name for name, ap in last.items() if ap >= 0), key=last.__getitem__)[:_CLASSES]
    axis.set_title("AP by class" + (f", the {len(names)} lowest" if len(names) < len(last) else ""))
    for name in names:
        points = [(entry["step"], entry["per_class"][name]) for entry in epochs if name in entry.get("per_class", {})]
        axis.plot(*zip(*points, strict=True), label=name.replace("$", r"\$"), marker="." if len(points) < 30 else None)
    if names:
        axis.legend()


def read_log(log: Path) -> list[dict[str, Any]]:
    """Read the entries of a run's log, without an unfinished last line, which a killed process leaves."""
    *lines, _ = log.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _plot(axis: Any, entries: Sequence[Mapping[str, Any]], name: str) -> None:
    """Plot one curve: its values; if they are many, faint, with their running mean."""
    if not entries:
        return
    entries = [entry for entry in entries if name in entry]  # logs of earlier versions have fewer numbers
    x = np.array([entry["step"] for entry in entries])
    y = np.array([entry[name] for entry in entries], dtype=float)
    window = max(1, len(y) // _POINTS)
    if window == 1:
        axis.plot(x, y, label=name, marker="." if len(y) < 30 else None)
        return
    (line,) = axis.plot(x, y, alpha=0.2)
    mean = np.convolve(y, np.ones(window) / window, mode="valid")
    axis.plot(x[window - 1 :], mean, label=name, color=line.get_color())
