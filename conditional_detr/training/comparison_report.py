"""Report a comparison: a table, its numbers as JSON, and the curves as an image."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.plotting import import_matplotlib
from conditional_detr.training.comparison import Point, Trained, speedups

FILES = ("comparison.json", "comparison.md", "comparison.png")
"""Names of the files that :func:`write` writes."""


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that a folder has no report, or that of the same comparison, which the next one replaces.

    Raises:
        FileExistsError: a file of another comparison, or of another program.
    """
    found = [folder / name for name in FILES if os.path.lexists(folder / name)]
    if not found:
        return
    before: Any = None
    with suppress(OSError, ValueError):
        before = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
    known = before.get("settings") if isinstance(before, dict) else None
    if known != json.loads(json.dumps(settings)) or any(path.is_symlink() for path in found):
        raise FileExistsError(
            f"{found[0]}: expected no file, or that of this comparison, got another; choose another folder"
        )


def write(trained: Mapping[str, Trained], seeds: Sequence[int], folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the numbers, the table and the curves.

    Args:
        trained: the results by name.
        seeds: the seeds.
        folder: the folder, which exists.
        settings: what the comparison was made with, for the JSON file.

    Raises:
        OSError: a file cannot be written.
    """
    numbers, table, curves = FILES
    content = json.dumps(to_dict(trained, seeds, settings), indent=2) + "\n"
    text = to_markdown(trained)
    figure = plot(trained)
    write_atomically(
        {
            folder / numbers: lambda path: path.write_text(content, encoding="utf-8"),
            folder / table: lambda path: path.write_text(text, encoding="utf-8"),
            folder / curves: lambda path: figure.savefig(path, format="png", dpi=100),
        }
    )


def to_dict(trained: Mapping[str, Trained], seeds: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all numbers as a JSON-compatible dict."""
    return {
        "settings": dict(settings),
        "seeds": list(seeds),
        "candidates": {
            name: {
                "parameters": one.parameters,
                "flops": one.flops,
                "seconds_per_epoch": one.seconds,
                "curves": [[point._asdict() for point in curve] for curve in one.curves],
            }
            for name, one in trained.items()
        },
        "speedups": [speedup._asdict() for speedup in speedups(trained)],
    }


def to_markdown(trained: Mapping[str, Trained]) -> str:
    """Return the tables: what each candidate came to, and how soon it reaches the final AP of the others."""
    lines = [
        "| network | AP | AP50 | parameters | GFLOP | seconds per epoch |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in trained.items():
        ap50 = [curve[-1].ap50 for curve in one.curves]
        lines.append(
            f"| {name} | {_spread(one.final)} | {_spread(ap50)} | {one.parameters:,} | {one.flops / 1e9:.1f}"
            f" | {one.seconds:.1f} |"
        )
    lines += ["", "| network | reaches the final AP of | after epochs | ratio |", "| --- | --- | ---: | ---: |"]
    for fast, slow, epochs, ratios in speedups(trained):
        reached = [number for number in epochs if number is not None]
        missed = len(epochs) - len(reached)
        after = _spread(reached, 0) + (f"; never with {missed} of {len(epochs)} seeds" if missed and reached else "")
        known = [ratio for ratio in ratios if ratio is not None]
        lines.append(f"| {fast} | {slow} | {after if reached else 'never'} | {_spread(known, 1)} |")
    return "\n".join(lines) + "\n"


def plot(trained: Mapping[str, Trained]) -> Any:
    """Return a matplotlib figure: AP and AP50 against epochs, the median over the seeds and their range."""
    import_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, field in zip(axes, ("ap", "ap50"), strict=True):
        for name, one in trained.items():
            epochs, values = _by_epoch(one.curves, field)
            (line,) = axis.plot(epochs, [statistics.median(each) for each in values], label=name)
            low, high = [min(each) for each in values], [max(each) for each in values]
            axis.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set_xlabel("epochs")
        axis.set_title({"ap": "AP", "ap50": "AP50"}[field])
        axis.set_ylim(bottom=0)
        axis.legend()
    return figure


def _by_epoch(curves: Sequence[Sequence[Point]], field: str) -> tuple[list[int], list[list[float]]]:
    """Return the epochs at which all seeds were evaluated, and the values of the seeds at each."""
    values = [{point.epochs: getattr(point, field) for point in curve} for curve in curves]
    epochs = sorted(set.intersection(*map(set, values)))
    return epochs, [[of_seed[epoch] for of_seed in values] for epoch in epochs]


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the median, and the range if there are several values."""
    if not values:
        return ""
    median = f"{statistics.median(values):.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"
