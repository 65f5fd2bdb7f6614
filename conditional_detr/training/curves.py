"""An image of how a run went."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conditional_detr.system.atomic_files import write_atomically

_POINTS = 200  # a smoothed curve shows about as many


def plot_curves(log: Path, target: Path) -> None:
    """Draw losses, AP and learning rates of a run's log.

    Args:
        log: the run's ``log.jsonl``.
        target: the png.

    Raises:
        OSError: a file that cannot be read or written.
    """
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
    """Return the entries of a run's log; the line that a killed process had not finished is none."""
    *lines, _ = log.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _plot(axis: Any, entries: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draw one curve: its values, faint, and their running mean if there are many."""
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
