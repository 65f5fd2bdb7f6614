"""``conditional-detr analyse``: write a report of what goes wrong in detections, and where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import AUTO, err, one_line_errors, out, print_line
from conditional_detr.cli.options import (
    BATCH_SIZE,
    BATCH_SIZE_DEFAULT,
    DATA,
    DEVICE,
    FAST_PREPROCESSING,
    FORMAT,
    IMAGES,
    OVERWRITE,
    RESULTS,
    ROTATED,
    SPLIT_NAME,
    WEIGHTS,
    DataFormat,
    RotatedBoxes,
    open_detector,
)
from conditional_detr.modeling.metadata import PUBLISHED
from conditional_detr.system.outputs import check_output, check_output_folder
from conditional_detr.system.progress import progress_bar

if TYPE_CHECKING:
    from rich.progress import Progress

    from conditional_detr.analysis.analysis import Analysis


def analyse(
    data: Annotated[Path, typer.Option(help=DATA)],
    images: Annotated[Path | None, typer.Option(help=IMAGES)] = None,
    format: Annotated[
        DataFormat | None, typer.Option(metavar="<format>", help=FORMAT, show_default="recognised")
    ] = None,
    split_name: Annotated[str, typer.Option(help=SPLIT_NAME)] = "val",
    weights: Annotated[str | None, typer.Option(help=WEIGHTS, show_default=PUBLISHED, rich_help_panel="Model")] = None,
    results: Annotated[Path | None, typer.Option(help=RESULTS)] = None,
    rotated: Annotated[RotatedBoxes, typer.Option(help=ROTATED)] = RotatedBoxes.BOX,
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("analysis"),
    examples: Annotated[int, typer.Option(min=0, help="Images of each kind in the gallery.")] = 12,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel="Model")] = AUTO,
    batch_size: Annotated[int | None, typer.Option(min=1, help=BATCH_SIZE, show_default=BATCH_SIZE_DEFAULT)] = None,
    fast_preprocessing: Annotated[bool, typer.Option("--fast-preprocessing", help=FAST_PREPROCESSING)] = False,
) -> None:
    """Write a report of the errors of a detector: their kinds and costs, the worst images, suspicious labels.

    The folder gets report.html, which needs no other file, analysis.json, the plots as PNG, and thresholds.json: the
    best threshold of each class, for --thresholds of detect, evaluate and serve.
    """
    with one_line_errors():
        if weights is not None and results is not None:
            raise ValueError(f"--weights: expected none with --results, got {weights}")
        _check_output(output, [path for path in (data, images, results, weights) if path], overwrite=overwrite)

        from conditional_detr.analysis.analysis import analyse, analyse_detections
        from conditional_detr.analysis.plots import check_matplotlib
        from conditional_detr.data.formats.reading import find_splits

        dataset: dict[str, Any] = {"split": split_name, "format": None if format is None else format.value}
        check_matplotlib()  # before hours of work, not after
        find_splits(data, images, format=dataset["format"])
        dataset["rotated"] = rotated.value
        with progress_bar(err, shown=True) as bar:
            if results is not None:
                analysis = analyse_detections(data, results, images, **dataset)
            else:
                detector = open_detector(weights or PUBLISHED, device, fast_preprocessing=fast_preprocessing)
                task = bar.add_task("detecting", total=None)
                analysis = analyse(
                    detector,
                    data,
                    images,
                    **dataset,
                    batch_size=batch_size,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                )
            report = _write(analysis, output, examples, bar)
    _show(analysis)
    print_line(f"wrote {report}", to=out)


def _check_output(folder: Path, inputs: list[Path | str], *, overwrite: bool) -> None:
    """Raise OSError or ValueError if a file of the report may not be written."""
    from conditional_detr.analysis.report import FILES

    check_output_folder(folder)
    for name in FILES if folder.is_dir() else ():
        check_output(folder / name, inputs=inputs, overwrite=overwrite)


def _write(analysis: "Analysis", output: Path, examples: int, bar: "Progress") -> Path:
    """Draw the gallery and write all files; return the path of the report."""
    from conditional_detr.analysis.gallery import draw_gallery
    from conditional_detr.analysis.report import write_report

    gallery = {}
    if analysis.images is not None:
        task = bar.add_task("drawing", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            gallery = draw_gallery(analysis, analysis.images, count=examples, progress=show)
        except (OSError, ValueError) as error:  # all numbers are there without the images
            print_line(f"warning: no gallery: {error}")
    return write_report(analysis, output, gallery)[0]


def _show(analysis: "Analysis") -> None:
    """Print the kinds of errors, and the best thresholds."""
    from rich.table import Table

    kinds = Table("error", "cost", "above threshold", title="Errors, and what they cost in points of AP50")
    kept = analysis.kept_counts()
    for kind, cost in analysis.errors.costs.items():
        kinds.add_row(kind, f"{100 * cost:.2f}", str(kept[kind]))
    classes = Table("class", "best threshold", "F1", "precision", "recall")
    for name, best in analysis.best.items():
        classes.add_row(name, *(f"{value:.3f}" for value in (best.threshold, best.f1, best.precision, best.recall)))
    out.print(kinds)
    out.print(classes)
    print_line(f"{len(analysis.suspicious)} suspicious labels", to=out)
