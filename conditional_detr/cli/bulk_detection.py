"""``conditional-detr detect --engine ray``: any number of images on a Ray cluster, into Parquet files."""

from collections.abc import Sequence
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import typer

from conditional_detr.cli.console import AUTO, FAILED, INTERRUPTED, err, out, print_line
from conditional_detr.cli.options import open_detector
from conditional_detr.system.paths import expand_home
from conditional_detr.system.progress import progress_bar

if TYPE_CHECKING:
    from conditional_detr.inference.detector import Detector


class Engine(str, Enum):
    """What shares the images among processes."""

    torch = "torch"
    ray = "ray"


_OF_TORCH = ("demo", "thresholds", "tile", "overlap", "augment", "format", "csv_safe", "draw", "font", "max_pixels")


def check_options(engine: Engine, context: typer.Context) -> None:
    """Raise ValueError if an option was given that belongs to the other engine."""
    others = ("workers",) if engine is Engine.torch else _OF_TORCH
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in others and source is not None and source.name == "COMMANDLINE":
            other = Engine.ray if engine is Engine.torch else Engine.torch
            raise ValueError(f"{parameter.opts[0]}: expected it with --engine {other.value} only")


def detect_on_ray(
    images: Sequence[str],
    output: str,
    weights: str,
    device: str,
    *,
    threshold: float | None,
    top_k: int,
    classes: Sequence[str] | None,
    batch_size: int | None,
    fast_preprocessing: bool,
    workers: int | None,
    resume: bool,
    overwrite: bool,
) -> int:
    """Detect, print the counts and the first failures, and return the exit code."""
    from conditional_detr.distributed import detect_dataset
    from conditional_detr.inference.listing import expand_standard_input

    if (path := expand_home(weights)).exists():
        weights = str(path.absolute())  # actors have another working folder
    names = [name for name, _ in expand_standard_input(images)]
    bar = progress_bar(err, shown=True)
    task = bar.add_task("detecting", total=None)
    try:
        with bar:
            result = detect_dataset(
                names,
                output,
                partial(_open, weights, fast_preprocessing),
                threshold=threshold,
                top_k=top_k,
                classes=classes,
                batch_size=batch_size,
                workers=workers,
                device=_device(weights, device),
                resume=resume,
                overwrite=overwrite,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        print_line("interrupted; --resume continues")
        return INTERRUPTED
    if result.skipped:
        print_line(f"skipped units that already have results: {result.skipped} of {result.units}")
    done = result.images - result.failed
    print_line(f"{done} images, {result.objects} objects; written to {result.folder}", to=out)
    if result.failed:
        print_line(f"{result.failed} of {result.images} images failed:", style="red")
        for error in result.errors:
            print_line(f"  {error}")
        if result.failed > len(result.errors):
            print_line(f"  and {result.failed - len(result.errors)} more; the column 'error' has all")
    return FAILED if result.failed else 0


def _open(weights: str, fast_preprocessing: bool, device: str) -> "Detector":
    """Load the detector in a process of Ray."""
    return open_detector(weights, device, fast_preprocessing=fast_preprocessing)


def _device(weights: str, device: str) -> str | None:
    """Return the device of the actors; None: GPUs, if the cluster has any."""
    from conditional_detr.inference.exported import is_exported

    if device not in (AUTO, "cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or auto with --engine ray, got {device}")
    if device != AUTO:
        return device
    return "cpu" if is_exported(weights) else None
