"""``conditional-detr evaluate``: print COCO's twelve metrics, and write them as JSON."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import AUTO, err, one_line_errors, out, print_line
from conditional_detr.cli.options import (
    BATCH_SIZE,
    BATCH_SIZE_DEFAULT,
    DEVICE,
    FAST_PREPROCESSING,
    FORMAT,
    IMAGES,
    OVERWRITE,
    RESULTS,
    ROTATED,
    SPLIT_NAME,
    THRESHOLDS,
    TRAINING_DATA,
    WEIGHTS,
    DataFormat,
    RotatedBoxes,
    open_detector,
    refuse_with_parquet,
)
from conditional_detr.inference.processes import join_processes
from conditional_detr.modeling.metadata import PUBLISHED
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.outputs import check_output
from conditional_detr.system.progress import progress_bar
from conditional_detr.system.storage import absolute, is_remote

if TYPE_CHECKING:
    from conditional_detr.data.formats.reading import DataSource
    from conditional_detr.data.row_groups import ShardImages
    from conditional_detr.evaluation.coco import CocoResult
    from conditional_detr.inference.detector import Detector

_MEANINGS = {
    "AP": "average precision, IoU 0.50 to 0.95",
    "AP50": "average precision, IoU 0.50",
    "AP75": "average precision, IoU 0.75",
    "APs": "average precision, objects under 32 x 32 pixels",
    "APm": "average precision, objects between",
    "APl": "average precision, objects over 96 x 96 pixels",
    "AR1": "average recall, 1 detection per class and image",
    "AR10": "average recall, 10 detections",
    "AR100": "average recall, 100 detections",
    "ARs": "average recall, objects under 32 x 32 pixels",
    "ARm": "average recall, objects between",
    "ARl": "average recall, objects over 96 x 96 pixels",
}


def evaluate(
    data: Annotated[str, typer.Option(metavar="<path>", help=TRAINING_DATA)],
    images: Annotated[Path | None, typer.Option(help=IMAGES)] = None,
    format: Annotated[
        DataFormat | None, typer.Option(metavar="<format>", help=FORMAT, show_default="recognised")
    ] = None,
    split_name: Annotated[str, typer.Option(help=SPLIT_NAME)] = "val",
    weights: Annotated[str | None, typer.Option(help=WEIGHTS, show_default=PUBLISHED, rich_help_panel="Model")] = None,
    results: Annotated[Path | None, typer.Option(help=RESULTS)] = None,
    thresholds: Annotated[Path | None, typer.Option(help=f"{THRESHOLDS} Detections below do not count.")] = None,
    rotated: Annotated[RotatedBoxes, typer.Option(help=ROTATED)] = RotatedBoxes.BOX,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the metrics to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel="Model")] = AUTO,
    batch_size: Annotated[int | None, typer.Option(min=1, help=BATCH_SIZE, show_default=BATCH_SIZE_DEFAULT)] = None,
    fast_preprocessing: Annotated[bool, typer.Option("--fast-preprocessing", help=FAST_PREPROCESSING)] = False,
) -> None:
    """Measure detections by COCO's twelve metrics.

    The 100 detections with the highest scores of each image count; there is no threshold without --thresholds.

    Under torchrun every process detects on its share of the images.
    """
    with one_line_errors():
        if images is not None and results is not None:
            raise ValueError("expected either --images, to detect on, or --results, to measure, got both")
        if weights is not None and results is not None:
            raise ValueError(f"--weights: expected none with --results, got {weights}")
        if thresholds is not None and results is not None:
            raise ValueError(f"--thresholds: expected none with --results, got {thresholds}")
        if json_file is not None:  # before hours of work, not after
            inputs = [path for path in (absolute(data), images, results, weights, thresholds) if path is not None]
            check_output(json_file, inputs=inputs, overwrite=overwrite)
        dataset: dict[str, Any] = {"split": split_name, "format": None if format is None else format.value}
        dataset["rotated"] = rotated.value
        source, opened_images = _open_source(data, images, format, split_name, rotated)
        with join_processes() as (rank, _):
            if results is not None:
                from conditional_detr.evaluation.coco import evaluate_detections

                result = evaluate_detections(source, results, **dataset)
            else:
                opened: dict[str, Any] = {"fast_preprocessing": fast_preprocessing, "thresholds": thresholds}
                detector = open_detector(weights or PUBLISHED, device, **opened)
                options = {**dataset, "batch_size": batch_size, "apply_thresholds": thresholds is not None}
                result = _detect_and_evaluate(detector, source, opened_images, shown=rank == 0, **options)
        if rank == 0 and json_file is not None:
            text = json.dumps(result.to_dict(), indent=2) + "\n"
            write_atomically({json_file: lambda path: path.write_text(text, encoding="utf-8")})
    if rank == 0:
        _show(result, "no threshold" if thresholds is None else "with thresholds")
        if json_file is not None:
            print_line(f"wrote {json_file}", to=out)


def _open_source(
    data: str, images: Path | None, format: DataFormat | None, split: str, rotated: RotatedBoxes
) -> "tuple[DataSource, Path | ShardImages | None]":
    """Return the arguments of evaluate(): the annotations and images of Parquet files, of other formats what is given.

    Raises:
        OSError, ValueError: there are none; before the model is loaded.
    """
    from conditional_detr.data.formats.parquet import is_parquet, open_shards
    from conditional_detr.data.formats.reading import find_splits
    from conditional_detr.data.row_groups import ShardImages

    chosen: Any = None if format is None else format.value
    if not is_parquet(data) and not is_remote(data):
        find_splits(data, images, format=chosen)
        return data, images
    refuse_with_parquet(images=images, format=chosen, rotated=None if rotated is RotatedBoxes.BOX else rotated.value)
    shards = open_shards(data, split=split)
    return shards.annotations, ShardImages(shards)


def _detect_and_evaluate(
    detector: "Detector", data: "DataSource", images: "Path | ShardImages | None", *, shown: bool, **options: Any
) -> "CocoResult":
    """Detect and measure; show a progress bar in the first process."""
    from conditional_detr.evaluation.coco import evaluate

    with progress_bar(err, shown=shown) as bar:
        task = bar.add_task("detecting", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return evaluate(detector, data, images, progress=show, **options)


def _show(result: "CocoResult", threshold: str) -> None:
    """Print the twelve metrics, and a table of the classes."""
    from rich.table import Table

    from conditional_detr.evaluation.coco import MAX_DETECTIONS

    twelve = Table("", "", "", title=f"COCO metrics of boxes: {MAX_DETECTIONS} detections per image, {threshold}")
    for name, value in result.metrics.items():
        twelve.add_row(name, _number(value), _MEANINGS[name])
    names = ("AP", "AP50", "AP75", "AR100")
    classes = Table("class", "id", "annotations", *names)
    for name, of_class in result.per_class.items():
        numbers = (_number(of_class[metric]) for metric in names)
        classes.add_row(name, str(of_class["category_id"]), str(of_class["annotations"]), *numbers)
    out.print(twelve)
    out.print(classes)


def _number(value: float) -> str:
    """Format a fraction; "-" where there was nothing to measure."""
    return "-" if value < 0 else f"{value:.3f}"
