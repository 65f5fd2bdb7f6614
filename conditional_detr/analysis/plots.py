"""Plot an analysis: precision and recall, F1, errors, confusion and calibration, as PNG."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from conditional_detr.analysis.analysis import THRESHOLDS, Analysis
from conditional_detr.system.console import printable
from conditional_detr.system.plotting import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RECALLS = np.linspace(0, 1, 101)
_SHOWN_CLASSES = 10  # with a curve of their own: those with the lowest AP
_COUNTED_CLASSES = 20  # a larger confusion matrix has no numbers
_LONGEST_NAME = 24


def draw_plots(analysis: Analysis) -> dict[str, bytes]:
    """Draw all plots.

    Returns:
        PNG files by their name without suffix.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    check_matplotlib()
    plots: dict[str, Callable[[Axes, Analysis], None]] = {
        "precision-recall": _precision_recall,
        "f1": _f1,
        "errors": _errors,
        "confusion": _confusion,
        "calibration": _calibration,
    }
    return {name: _draw(plot, analysis) for name, plot in plots.items()}


def check_matplotlib() -> None:
    """Raise ModuleNotFoundError, with what to install, if matplotlib is not installed."""
    try:
        import_matplotlib()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the report needs {error.name}, which is not installed: pip install 'conditional-detr[train]'"
        ) from error


def _draw(plot: Callable[["Axes", Analysis], None], analysis: Analysis) -> bytes:
    """Return a plot as a PNG file."""
    from matplotlib.figure import Figure

    with _names_as_they_are():
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        plot(figure.subplots(), analysis)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


@contextmanager
def _names_as_they_are() -> Iterator[None]:
    """Draw text with dollar signs as it is; characters that the font lacks become boxes, without a warning."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _short(name: str) -> str:
    """Return a class name for a plot."""
    text = printable(name)
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def _precision_recall(axes: "Axes", analysis: Analysis) -> None:
    """Plot the precision at each recall: of single classes at an IoU of 0.5, and the mean at 0.5 and 0.75."""
    at_50, at_75 = analysis.precision[0, :, :, 0], analysis.precision[5, :, :, 0]
    measured = at_50[0] > -1
    _curves(axes, analysis, _RECALLS, at_50.T)
    if measured.any():
        axes.plot(_RECALLS, at_50[:, measured].mean(axis=1), color="black", linewidth=2, label="mean")
        mean_75 = at_75[:, measured].mean(axis=1)
        axes.plot(_RECALLS, mean_75, color="black", linestyle="--", label="mean, IoU 0.75")
    axes.set(xlabel="recall", ylabel="precision, IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes)


def _f1(axes: "Axes", analysis: Analysis) -> None:
    """Plot the F1 at each threshold, with the best threshold of each class."""
    _curves(axes, analysis, THRESHOLDS, analysis.f1)
    for line, k in zip(list(axes.lines), _chosen(analysis), strict=True):
        best = analysis.best[analysis.names[k]]
        axes.plot(best.threshold, best.f1, "o", color=line.get_color())
    axes.set(xlabel="threshold", ylabel="F1, IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes)


def _chosen(analysis: Analysis) -> list[int]:
    """Return the classes with a curve of their own."""
    ap = analysis.precision[0, :, :, 0].mean(axis=0)
    measured = [int(k) for k in np.argsort(ap, kind="stable") if ap[k] > -1]
    return sorted(measured[:_SHOWN_CLASSES])


def _curves(axes: "Axes", analysis: Analysis, x: np.ndarray, curves: np.ndarray) -> None:
    """Plot the curve of each chosen class."""
    for k in _chosen(analysis):
        axes.plot(x, curves[k], label=f" {_short(analysis.names[k])}")  # matplotlib hides labels that begin with "_"


def _legend(axes: "Axes") -> None:
    """Show names and a grid."""
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")


def _errors(axes: "Axes", analysis: Analysis) -> None:
    """Plot the cost of each kind of error."""
    costs = analysis.errors.costs
    bars = axes.barh(list(costs), [100 * cost for cost in costs.values()])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="AP50 that is lost, in points")


def _confusion(axes: "Axes", analysis: Analysis) -> None:
    """Plot the confusion matrix, coloured by the share of each row."""
    counts = analysis.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [_short(name) for name in analysis.names]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks: Any = range(len(counts))
    if len(names) <= _COUNTED_CLASSES:
        axes.set_xticks(ticks, [*names, "missed"], rotation=90)
        axes.set_yticks(ticks, [*names, "background"])
        for row, column in np.ndindex(counts.shape):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize="small")
    axes.set(xlabel="detected", ylabel="annotated")


def _calibration(axes: "Axes", analysis: Analysis) -> None:
    """Plot the share of correct detections by score."""
    bins = analysis.calibration["bins"]
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", label="calibrated")
    axes.plot([one["score"] for one in bins], [one["precision"] for one in bins], "o-", label="detections")
    axes.set(xlabel="mean score", ylabel="share of correct detections, IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    _legend(axes)
