"""``conditional-detr detect``: detect objects on any number of images."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated

import typer

from conditional_detr.cli.bulk_detection import Engine, check_options, detect_on_ray
from conditional_detr.cli.console import AUTO, FAILED, one_line_errors, print_line
from conditional_detr.cli.detection_run import DetectionRun, drawing_of
from conditional_detr.cli.marks import has_mark
from conditional_detr.cli.options import (
    BATCH_SIZE,
    BATCH_SIZE_DEFAULT,
    DEVICE,
    FAST_PREPROCESSING,
    THRESHOLDS,
    WEIGHTS,
    check_one_threshold,
    open_detector,
)
from conditional_detr.inference.listing import ListedImage, Listing, list_images
from conditional_detr.inference.processes import join_processes
from conditional_detr.inference.results import Format, open_results
from conditional_detr.modeling.metadata import PUBLISHED
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.outputs import file_ids, is_same_file
from conditional_detr.system.paths import expand_home

if TYPE_CHECKING:
    from conditional_detr.inference.tiling import Tiling

_DEMO, _DEMO_IMAGE = PurePath("demo"), "demo-image.png"
_DEMO_INDEX = 23  # of the images of the split "demo": one with most of the classes
_DEMO_WEIGHTS = "shapes"
_MODEL, _WHAT, _WHERE, _LIMITS = "Model", "What to report", "Output", "Speed and limits"
_VIEWS = "Tiles and augmentation"


def detect(
    context: typer.Context,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders (with all below), globs, http(s) URLs; '-' reads one per line from standard input."
            " With --engine ray also object stores, Parquet files and WebDataset shards.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Draw an image of shapes, and detect on it with the weights 'shapes'.")
    ] = False,
    weights: Annotated[str | None, typer.Option(help=WEIGHTS, show_default=PUBLISHED, rich_help_panel=_MODEL)] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Report detections with a higher score, 0 to 1.", show_default="0.5", rich_help_panel=_WHAT),
    ] = None,
    thresholds: Annotated[Path | None, typer.Option(help=THRESHOLDS, rich_help_panel=_WHAT)] = None,
    top_k: Annotated[
        int,
        typer.Option(help="Report at most this many per image, those with the highest scores.", rich_help_panel=_WHAT),
    ] = 100,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Report this class only; repeatable.", show_default="all", rich_help_panel=_WHAT),
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(
            help="Detect on overlapping tiles of this side, such as 800, or height and width, such as 600x800, in"
            " pixels of the image, and merge: for small objects on large images.",
            show_default="whole images",
            rich_help_panel=_VIEWS,
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(
            help="Least overlap of tiles, as a fraction of their side, up to 0.5.",
            show_default="0.25",
            rich_help_panel=_VIEWS,
        ),
    ] = None,
    augment: Annotated[
        bool,
        typer.Option(
            "--augment", help="Detect also on mirrored and smaller images, and merge.", rich_help_panel=_VIEWS
        ),
    ] = False,
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel=_MODEL)] = AUTO,
    batch_size: Annotated[
        int | None,
        typer.Option(help=BATCH_SIZE, min=1, show_default=BATCH_SIZE_DEFAULT, rich_help_panel=_LIMITS),
    ] = None,
    fast_preprocessing: Annotated[
        bool, typer.Option("--fast-preprocessing", help=FAST_PREPROCESSING, rich_help_panel=_LIMITS)
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(help="ray: on a Ray cluster, into Parquet files with a row per image.", rich_help_panel=_LIMITS),
    ] = Engine.torch,
    workers: Annotated[
        int | None,
        typer.Option(
            help="With --engine ray: copies of the model.",
            min=1,
            show_default="one for each GPU, or CPU core",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    output: Annotated[
        str,  # a path would have one slash where a URI has two
        typer.Option(help="Folder for results and annotated images.", metavar="PATH", rich_help_panel=_WHERE),
    ] = "detections",
    format: Annotated[
        Format,
        typer.Option(
            help="json: a file per image. jsonl: one file, a line per image. csv: also a table, a row per detection.",
            rich_help_panel=_WHERE,
        ),
    ] = Format.json,
    csv_safe: Annotated[
        bool,
        typer.Option(
            "--csv-safe",
            help="In csv, put ' before names that a spreadsheet would run as a formula.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    draw: Annotated[bool, typer.Option(help="Write annotated images.", rich_help_panel=_WHERE)] = True,
    font: Annotated[
        Path | None,
        typer.Option(help="TrueType file, for class names that PIL's own font cannot draw.", rich_help_panel=_WHERE),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Skip images that already have results of these settings.", rich_help_panel=_WHERE
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing results.", rich_help_panel=_WHERE)
    ] = False,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Refuse images with more pixels.",
            show_default="178956970, PIL's limit",
            min=1,
            rich_help_panel=_LIMITS,
        ),
    ] = None,
) -> None:
    """Detect objects on images: print them, draw them, write them. Try it with --demo.

    An image that cannot be read is listed at the end and does not stop the others.

    Under torchrun each process takes its share of the images, and waits for the others at the end. With --engine ray,
    processes of a Ray cluster do: that of RAY_ADDRESS, or a new one here.

    Exit codes: 0 success; 1 some images failed; 2 usage or setup error; 130 interrupted.
    """
    with one_line_errors():
        check_options(engine, context)
        if resume and overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
    if engine is Engine.ray:
        with one_line_errors():
            code = detect_on_ray(
                images or [],
                output,
                str(weights or PUBLISHED),
                device,
                threshold=threshold,
                top_k=top_k,
                classes=classes,
                batch_size=batch_size,
                fast_preprocessing=fast_preprocessing,
                workers=workers,
                resume=resume,
                overwrite=overwrite,
            )
        raise typer.Exit(code)
    folder = Path(output)
    with one_line_errors(), join_processes() as process:
        if csv_safe and format is not Format.csv:
            raise ValueError(f"--csv-safe: expected --format csv with it, got {format.value}")
        check_one_threshold(threshold, thresholds)
        if demo == bool(images):
            raise ValueError(f"images: expected either images or --demo, got {'both' if demo else 'neither'}")
        images = images or []
        if "-" in images and process.size > 1:
            raise ValueError("images: expected files, folders or globs under torchrun: '-' can be read only once")
        tiling = _make_tiling(tile, overlap, augment)
        listing = (
            Listing([ListedImage(str(folder / _DEMO_IMAGE), _DEMO)], 0) if demo else list_images(images, output=folder)
        )
        _check_font(font)  # now, not at the first image
        _limit_pixels(max_pixels)
        if weights is not None and is_same_file(folder, expand_home(weights)):
            raise ValueError(f"--output: expected another folder than that of --weights, got {folder}")
        source = str(weights or (_demo_weights() if demo else PUBLISHED))
        detector = open_detector(source, device, fast_preprocessing=fast_preprocessing, thresholds=thresholds)
        postprocessing = detector.postprocessing(threshold=threshold, top_k=top_k, classes=classes)
        if draw:
            _check_inputs_stay(listing.images, folder)
        results = open_results(
            format,
            folder,
            process,
            resume=resume,
            overwrite=overwrite,
            csv_safe=csv_safe,
            settings=detector.settings(postprocessing, tiling),
        )
        try:
            share = listing.images[process.rank :: process.size]
            todo = [listed for listed in share if not results.is_done(listed)]
            if draw and not overwrite:
                _check_drawings_are_ours(todo, folder)
            if listing.skipped:
                print_line(f"skipped files in folders that are no images: {listing.skipped}", style="yellow")
            if len(share) > len(todo):
                print_line(f"skipped images that already have results: {len(share) - len(todo)} of {len(share)}")
            if demo:
                _draw_demo(folder / _DEMO_IMAGE, overwrite=overwrite)
            run = DetectionRun(todo, folder if draw else None, font, results)
            options = {"batch_size": batch_size, "tiling": tiling}
            code = run.run(detector, postprocessing, options, show_progress=process.rank == 0)
            run.report(results.close() or [folder])
            failures = process.sum(len(run.failures))
            code = code or (FAILED if failures else 0)
        finally:
            results.release()
    if code:
        raise typer.Exit(code)


def _make_tiling(tile: str | None, overlap: float | None, augment: bool) -> "Tiling | None":
    from conditional_detr.inference.tiling import make_tiling

    if tile is None:
        return make_tiling(None, overlap, augment=augment)
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", tile)
    if not match:
        raise ValueError(f"--tile: expected a side such as 800, or height and width such as 600x800, got {tile!r}")
    return make_tiling((int(match[1]), int(match[2] or match[1])), overlap, augment=augment)


def _check_font(font: Path | None) -> None:
    from conditional_detr.inference.drawing import load_font

    load_font(font)


def _limit_pixels(max_pixels: int | None) -> None:
    """Set PIL's limit: it refuses images with more than twice as many pixels."""
    if max_pixels:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = max_pixels // 2 if max_pixels % 2 == 0 else max_pixels / 2  # type: ignore[assignment]


def _demo_weights() -> str | Path:
    from conditional_detr.checkpoints.files import shipped_folder

    return shipped_folder(_DEMO_WEIGHTS) or _DEMO_WEIGHTS


def _draw_demo(path: Path, *, overwrite: bool) -> None:
    """Draw an image of shapes that no training has seen; keep another file of that name unless ``overwrite``."""
    from PIL import Image

    from conditional_detr.data.synthetic import draw_image, image_index

    image, *_ = draw_image(0, image_index(_DEMO.name, _DEMO_INDEX))
    if path.exists() and not overwrite:
        with Image.open(path) as existing:
            if existing.convert("RGB").tobytes() == image.tobytes():
                return
        raise FileExistsError(
            f"{path}: expected no file or the demo image, got another image; --overwrite replaces it,"
            " --output names another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: lambda unfinished: image.save(unfinished, "PNG")})


def _check_inputs_stay(inputs: Sequence[ListedImage], output: Path) -> None:
    """Raise ValueError if an annotated image would overwrite an input image, also through links."""
    images = file_ids(listed.image for listed in inputs)
    drawings = file_ids(drawing_of(listed, output) for listed in inputs)
    for file in images.keys() & drawings.keys():
        raise ValueError(
            f"--output {output}: {images[file]} is one of the input images and would be overwritten by an annotated"
            " image; choose another folder, or --no-draw"
        )


def _check_drawings_are_ours(inputs: Sequence[ListedImage], output: Path) -> None:
    """Raise ValueError if an annotated image would overwrite a file that no earlier run has drawn for this image."""
    for listed in inputs:
        path = drawing_of(listed, output)
        if os.path.lexists(path) and not has_mark(path, listed.image):
            raise ValueError(
                f"{path}: expected no file, or the annotated image of an earlier run; --overwrite replaces it,"
                " --output names another folder"
            )
