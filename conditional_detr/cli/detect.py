"""``conditional-detr detect``: detect objects on any number of images."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from conditional_detr.cli.console import AUTO, FAILED, INTERRUPTED, err, one_line_errors, out, print_line
from conditional_detr.cli.marks import has_mark, save_marked
from conditional_detr.cli.options import DEVICE, FAST_PREPROCESSING, WEIGHTS, open_detector
from conditional_detr.inference.listing import ListedImage, Listing, list_images
from conditional_detr.inference.processes import join_processes
from conditional_detr.inference.results import Format, ResultWriter, open_results
from conditional_detr.modeling.metadata import PUBLISHED
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.outputs import file_ids, is_same_file
from conditional_detr.system.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from conditional_detr.inference.detections import Detections
    from conditional_detr.inference.detector import Detector
    from conditional_detr.inference.postprocessing import Postprocessing

_MOST_FAILURES = 20  # that are printed one by one
_DEMO, _DEMO_IMAGE = PurePath("demo"), "demo-image.png"
_DEMO_INDEX = 23  # of the images of the split "demo": one with most of the classes
_DEMO_WEIGHTS = "shapes"
_JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
_MODEL, _WHAT, _WHERE, _LIMITS = "Model", "What to report", "Output", "Speed and limits"


def detect(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders (with all below), globs, http(s) URLs; '-' reads one per line from standard input.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Draw an image of shapes, and detect on it with the weights 'shapes'.")
    ] = False,
    weights: Annotated[str | None, typer.Option(help=WEIGHTS, show_default=PUBLISHED, rich_help_panel=_MODEL)] = None,
    threshold: Annotated[
        float, typer.Option(help="Report detections with a higher score, 0 to 1.", rich_help_panel=_WHAT)
    ] = 0.5,
    top_k: Annotated[
        int,
        typer.Option(help="Report at most this many per image, those with the highest scores.", rich_help_panel=_WHAT),
    ] = 100,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Report this class only; repeatable.", show_default="all", rich_help_panel=_WHAT),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel=_MODEL)] = AUTO,
    batch_size: Annotated[
        int, typer.Option(help="Run at most this many images of one shape together.", min=1, rich_help_panel=_LIMITS)
    ] = 8,
    fast_preprocessing: Annotated[
        bool, typer.Option("--fast-preprocessing", help=FAST_PREPROCESSING, rich_help_panel=_LIMITS)
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for results and annotated images.", rich_help_panel=_WHERE)
    ] = Path("detections"),
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

    Under torchrun each process takes its share of the images, and waits for the others at the end.

    Exit codes: 0 success; 1 some images failed; 2 usage or setup error; 130 interrupted.
    """
    with one_line_errors(), join_processes() as process:
        if resume and overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
        if csv_safe and format is not Format.csv:
            raise ValueError(f"--csv-safe: expected --format csv with it, got {format.value}")
        if demo == bool(images):
            raise ValueError(f"images: expected either images or --demo, got {'both' if demo else 'neither'}")
        images = images or []
        if "-" in images and process.size > 1:
            raise ValueError("images: expected files, folders or globs under torchrun: '-' can be read only once")
        listing = (
            Listing([ListedImage(str(output / _DEMO_IMAGE), _DEMO)], 0) if demo else list_images(images, output=output)
        )
        _check_font(font)  # now, not at the first image
        _limit_pixels(max_pixels)
        if weights is not None and is_same_file(output, Path(weights).expanduser()):
            raise ValueError(f"--output: expected another folder than that of --weights, got {output}")
        source = str(weights or (_demo_weights() if demo else PUBLISHED))
        detector = open_detector(source, device, fast_preprocessing=fast_preprocessing)
        postprocessing = detector.postprocessing(threshold=threshold, top_k=top_k, classes=classes)
        if draw:
            _check_inputs_stay(listing.images, output)
        results = open_results(
            format,
            output,
            process,
            resume=resume,
            overwrite=overwrite,
            csv_safe=csv_safe,
            settings=detector.settings(postprocessing),
        )
        try:
            share = listing.images[process.rank :: process.size]
            todo = [listed for listed in share if not results.is_done(listed)]
            if draw and not overwrite:
                _check_drawings_are_ours(todo, output)
            if listing.skipped:
                print_line(f"skipped files in folders that are no images: {listing.skipped}", style="yellow")
            if len(share) > len(todo):
                print_line(f"skipped images that already have results: {len(share) - len(todo)} of {len(share)}")
            if demo:
                _draw_demo(output / _DEMO_IMAGE, overwrite=overwrite)
            run = _Run(todo, output if draw else None, font, results)
            code = run.run(detector, postprocessing, batch_size, show_progress=process.rank == 0)
            run.report(results.close() or [output])
            failures = process.sum(len(run.failures))
            code = code or (FAILED if failures else 0)
        finally:
            results.release()
    if code:
        raise typer.Exit(code)


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


class _Drawn(NamedTuple):
    """An image whose annotated copy is written, and whose result is not."""

    listed: ListedImage
    outcome: "Detections | Exception"


@dataclass
class _Run:
    """Detect on images, draw and write the results, and count them."""

    inputs: Sequence[ListedImage]
    drawings: Path | None  # folder; None: no annotated images
    font: Path | None
    results: ResultWriter
    done: int = 0
    failures: list[str] = field(default_factory=list)
    objects: Counter[str] = field(default_factory=Counter)  # by class name
    images: Counter[str] = field(default_factory=Counter)  # by class name
    last: "Detections | None" = None

    def run(
        self, detector: "Detector", postprocessing: "Postprocessing", batch_size: int, *, show_progress: bool
    ) -> int:
        """Process all images, drawing in threads beside the model; return the exit code of what stopped it, or 0."""
        from conditional_detr.inference.pipeline import map_in_threads

        images = (listed.image for listed in self.inputs)
        outcomes = detector.outcomes(images, postprocessing, batch_size=batch_size)
        drawn = map_in_threads(self._draw, zip(self.inputs, outcomes, strict=True), workers=2, depth=8)
        bar = progress_bar(err, shown=show_progress and len(self.inputs) > 1)
        try:
            with bar, closing(outcomes), closing(drawn):
                for listed, outcome in bar.track(drawn, total=len(self.inputs), description="detecting"):
                    self._write(listed, outcome)
        except KeyboardInterrupt:
            print_line(f"interrupted after {self.done} of {len(self.inputs)} images; --resume continues")
            return INTERRUPTED
        except OSError as error:  # nothing more can be written: later detections would be lost
            print_line(f"error: {error}", style="red")
            print_line(f"stopped after {self.done} of {len(self.inputs)} images; --resume continues")
            return FAILED
        return 0

    def _draw(self, finished: "tuple[ListedImage, Detections | Exception]") -> _Drawn:
        """Write the annotated image; runs in a thread."""
        from conditional_detr.inference.detector import IMAGE_ERRORS

        listed, outcome = finished
        if self.drawings is None or isinstance(outcome, Exception):
            return _Drawn(listed, outcome)
        try:
            image = outcome.draw(font=self.font)
        except IMAGE_ERRORS as error:  # the file has changed since
            return _Drawn(listed, error)
        path = _drawing(listed, self.drawings)

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically({path: lambda unfinished: save_marked(image, unfinished, listed.image, path.suffix)})

        return _Drawn(listed, _error_if_too_long(write) or outcome)

    def _write(self, listed: ListedImage, outcome: "Detections | Exception") -> None:
        """Write and count the result of an image."""
        if not isinstance(outcome, Exception):
            outcome = _error_if_too_long(partial(self.results.write, listed, outcome)) or outcome
        if isinstance(outcome, Exception):
            self.failures.append(str(outcome) if listed.image in str(outcome) else f"{listed.image}: {outcome}")
        else:
            self.objects.update(outcome.names)
            self.images.update(set(outcome.names))
            self.last = outcome
        self.done += 1

    def report(self, files: Sequence[Path]) -> None:
        """Print the detections or their counts, the files written, and the failures."""
        if len(self.inputs) == 1 and self.last is not None:
            out.print(_objects_table(self.last))
        elif self.objects:
            out.print(self._classes_table())
        finished = self.done - len(self.failures)
        counts = ", ".join(_count(*numbers) for numbers in ((finished, "image"), (self.objects.total(), "object")))
        print_line(counts + (f"; written to {', '.join(map(str, files))}" if finished else ""), to=out)
        if self.failures:
            print_line(f"{len(self.failures)} of {self.done} images failed:", style="red")
            for failure in self.failures[:_MOST_FAILURES]:
                print_line(f"  {failure}")
            if len(self.failures) > _MOST_FAILURES:
                print_line(f"  and {len(self.failures) - _MOST_FAILURES} more")

    def _classes_table(self) -> "Table":
        from rich.table import Table

        table = Table("class", "objects", "images")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, count in self.objects.most_common():
            table.add_row(name, str(count), str(self.images[name]))
        return table


def _objects_table(detections: "Detections") -> "Table":
    """Return a table of the detections of one image."""
    from rich.table import Table

    table = Table("object", "score", "x0", "y0", "x1", "y1", title=_count(len(detections), "object"))
    for column in table.columns[1:]:
        column.justify = "right"
    for box, score, name in detections:
        table.add_row(name, f"{score:.3f}", *(f"{value:.1f}" for value in box))
    return table


def _count(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _drawing(listed: ListedImage, folder: Path) -> Path:
    """Return the path of the annotated image: a JPEG file for a JPEG image, a PNG file for any other."""
    suffix = ".jpg" if Path(listed.image).suffix.lower() in _JPEG else ".png"
    return folder / listed.output.with_name(listed.output.name + suffix)


def _error_if_too_long(write: Callable[[], None]) -> OSError | None:
    """Write a file; return the error of a name that is too long, which concerns one image only."""
    try:
        write()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return error
    return None


def _check_inputs_stay(inputs: Sequence[ListedImage], output: Path) -> None:
    """Raise ValueError if an annotated image would overwrite an input image, also through links."""
    images = file_ids(listed.image for listed in inputs)
    drawings = file_ids(_drawing(listed, output) for listed in inputs)
    for file in images.keys() & drawings.keys():
        raise ValueError(
            f"--output {output}: {images[file]} is one of the input images and would be overwritten by an annotated"
            " image; choose another folder, or --no-draw"
        )


def _check_drawings_are_ours(inputs: Sequence[ListedImage], output: Path) -> None:
    """Raise ValueError if an annotated image would overwrite a file that no earlier run has drawn for this image."""
    for listed in inputs:
        path = _drawing(listed, output)
        if os.path.lexists(path) and not has_mark(path, listed.image):
            raise ValueError(
                f"{path}: expected no file, or the annotated image of an earlier run; --overwrite replaces it,"
                " --output names another folder"
            )
