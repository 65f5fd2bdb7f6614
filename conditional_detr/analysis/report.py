"""Write an analysis: one HTML file with all plots and images in it, JSON, the plots, and the best thresholds."""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conditional_detr.analysis.analysis import Analysis
from conditional_detr.analysis.gallery import Example
from conditional_detr.analysis.plots import draw_plots
from conditional_detr.analysis.suspicious import REASONS
from conditional_detr.analysis.tide import KINDS
from conditional_detr.system.atomic_files import encode_text, write_atomically
from conditional_detr.system.console import printable

REPORT, NUMBERS, THRESHOLDS = "report.html", "analysis.json", "thresholds.json"
_CAPTIONS = {
    "precision-recall": "Precision at each recall",
    "f1": "F1 at each threshold, with the best ones",
    "errors": "Cost of each kind of error",
    "confusion": "Confusion matrix",
    "calibration": "Calibration",
}
FILES = (REPORT, NUMBERS, THRESHOLDS, *(f"{name}.png" for name in _CAPTIONS))
_LISTED = 200  # suspicious labels in the HTML file; the JSON file has all
_MEANINGS = {
    "classification": "IoU of at least 0.5 with an object of another class",
    "localisation": "right class, IoU of 0.1 to 0.5",
    "both": "neither class nor box fits",
    "duplicate": "the object has a detection with a higher score",
    "background": "nothing is labelled there: IoU of at most 0.1",
    "missed": "no detection comes near the object",
}
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 68rem; padding: 0 1rem 3rem; color: #1a1a1a; }
h1 { margin: 1.5rem 0 0; } h2 { margin: 2.5rem 0 0.5rem; border-bottom: 1px solid #ccc; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #e3e3e3; white-space: nowrap; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #444; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
"""


def write_report(analysis: Analysis, folder: str | Path, gallery: Mapping[str, Sequence[Example]]) -> list[Path]:
    """Write all files of an analysis, replacing those of their names.

    Args:
        analysis: the analysis.
        folder: made if missing.
        gallery: examples by title, from :func:`conditional_detr.analysis.gallery.draw_gallery`; may be empty.

    Returns:
        The paths of the files, the HTML file first.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    plots = draw_plots(analysis)
    contents = {
        REPORT: encode_text(to_html(analysis, plots, gallery)),
        NUMBERS: encode_text(json.dumps(analysis.to_dict(), indent=2, ensure_ascii=False) + "\n"),
        THRESHOLDS: encode_text(json.dumps(analysis.thresholds, indent=2, ensure_ascii=False) + "\n"),
        **{f"{name}.png": plot for name, plot in plots.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically({folder / name: lambda path: path.write_bytes(contents[path.name]) for name in contents})
    return [folder / name for name in contents]


def to_html(analysis: Analysis, plots: Mapping[str, bytes], gallery: Mapping[str, Sequence[Example]]) -> str:
    """Return a page that needs no other file.

    Args:
        analysis: the analysis.
        plots: PNG files by name, from :func:`conditional_detr.analysis.plots.draw_plots`.
        gallery: examples by title.
    """
    figures = {name: _figure(plot, "png", _CAPTIONS[name]) for name, plot in plots.items()}
    matches = analysis.matches
    counts = (
        f"{len(analysis.data.images)} images, {len(matches.annotations)} objects, {len(matches.detections)} detections"
    )
    parts = [
        f"<h1>Error analysis</h1><p>{_text(analysis.data.name)}: {counts}.</p>",
        _section("Average precision", _metrics(analysis), figures["precision-recall"]),
        _section("Errors", _errors(analysis), figures["errors"]),
        _section("Thresholds", _thresholds(analysis), figures["f1"]),
        _section("Confusion and calibration", _notes(analysis), figures["confusion"] + figures["calibration"]),
        *(_section(title, "", "".join(map(_example, examples))) for title, examples in gallery.items() if examples),
        _section("Suspicious labels", _suspicious(analysis), ""),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Error analysis: {_text(analysis.data.name)}</title><style>{_STYLE}</style></head><body>",
            *parts,
            "</body></html>\n",
        ]
    )


def _text(value: Any) -> str:
    """Return text of any origin for HTML."""
    return html.escape(printable(str(value)))


def _number(value: float | None) -> str:
    """Format a fraction; "-" where there is nothing to measure."""
    return "-" if value is None or value < 0 else f"{value:.3f}"


def _section(title: str, text: str, figures: str) -> str:
    """Return a section of text, then figures beside each other where there is room."""
    return f'<section><h2>{title}</h2>{text}<div class="pair">{figures}</div></section>'


def _figure(data: bytes, kind: str, caption: str) -> str:
    """Return an image that is part of the page."""
    encoded = base64.b64encode(data).decode("ascii")
    text = _text(caption)
    source = f"data:image/{kind};base64,{encoded}"
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def _example(example: Example) -> str:
    """Return an example as a figure."""
    buffer = io.BytesIO()
    example.image.save(buffer, "JPEG", quality=85)
    return _figure(buffer.getvalue(), "jpeg", example.caption)


def _table(columns: Iterable[str], rows: Iterable[Iterable[Any]], kind: str = "") -> str:
    """Return a table, which scrolls sideways where it is too wide."""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _metrics(analysis: Analysis) -> str:
    """Return the metrics of all classes and of each."""
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    metrics = analysis.metrics.metrics
    rows = [["all", len(analysis.matches.annotations), *(_number(metrics[name]) for name in names)]]
    for class_name, of_class in analysis.per_class().items():
        rows.append([class_name, of_class["annotations"], *(_number(of_class[name]) for name in names)])
    return _table(("class", "objects", *names), rows)


def _errors(analysis: Analysis) -> str:
    """Return the number and cost of the errors of each kind."""
    errors, kept = analysis.errors, analysis.kept_counts()
    rows: list[list[Any]] = [
        [kind, f"{100 * errors.costs[kind]:.2f}", kept[kind], errors.counts[kind], _MEANINGS[kind]] for kind in KINDS
    ]
    rows.append(["all false positives", f"{100 * errors.false_positives:.2f}", len(analysis.false_positives), "", ""])
    rows.append(["all missed objects", f"{100 * errors.false_negatives:.2f}", len(analysis.missed), "", ""])
    text = "<p>The cost is the AP50, in points, that correcting all errors of a kind would gain.</p>"
    return text + _table(("error", "cost", "above threshold", "of all detections", "meaning"), rows, "text")


def _thresholds(analysis: Analysis) -> str:
    """Return the best threshold of each class."""
    rows = [
        [name, f"{one.threshold:.3f}", *map(_number, (one.f1, one.precision, one.recall)), one.correct, one.kept]
        for name, one in analysis.best.items()
    ]
    text = (
        f"<p>The threshold of each class with the highest F1 at an IoU of 0.5; <code>{THRESHOLDS}</code> has them.</p>"
    )
    return text + _table(("class", "threshold", "F1", "precision", "recall", "correct", "kept"), rows)


def _notes(analysis: Analysis) -> str:
    """Return what the two figures show."""
    error = analysis.calibration["error"]
    return (
        "<p>Rows of the confusion matrix are annotated classes, columns detected ones, for detections above the best"
        f" thresholds. The mean difference between score and precision is {error:.3f}.</p>"
    )


def _suspicious(analysis: Analysis) -> str:
    """Return the labels that may be wrong."""
    rows = []
    for one in analysis.suspicious[:_LISTED]:
        box = ", ".join(f"{side:.0f}" for side in one["box"] or one["detected_box"])
        label, score = one["label"] or "-", _number(one["score"])
        rows.append([one["image"], REASONS[one["reason"]], label, one["detected"], score, box])
    listed = f" The first {_LISTED} are here, all in <code>{NUMBERS}</code>."
    more = listed if len(analysis.suspicious) > _LISTED else ""
    text = f"<p>{len(analysis.suspicious)} labels to check.{more}</p>"
    columns = ("image", "reason", "label", "detected or other label", "score", "box x0, y0, w, h")
    return text + (_table(columns, rows, "text") if rows else "")
