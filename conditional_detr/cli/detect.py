"""``conditional-detr detect``: objects on images, from one to a hundred thousand."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, NamedTuple

import typer
from PIL import Image
from rich.table import Table
from rich.text import Text

from conditional_detr.checkpoints.files import shipped_folder
from conditional_detr.cli.console import (
    AUTO,
    FAILED,
    INTERRUPTED,
    err,
    one_line_errors,
    out,
    tell,
)
from conditional_detr.cli.models import DEVICE, WEIGHTS, open_detector
from conditional_detr.data.synthetic import draw_image, index_in
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import IMAGE_ERRORS, PUBLISHED, Detector
from conditional_detr.inference.drawing import load_font
from conditional_detr.inference.listing import Input, Inputs, list_images
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.inference.postprocessing import Postprocessing
from conditional_detr.inference.processes import join_processes
from conditional_detr.inference.results import Format, Records, open_records
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.progress import progress_bar

_LISTED = 20  # failures that are spelled out at the end
_DEMO, _DEMO_IMAGE = PurePath("demo"), "demo-image.png"
_DEMO_PLACE = 23  # of the images of that name: one with most of the classes
_DEMO_WEIGHTS = "shapes"
_JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}


def detect(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, folders (with all below), globs, http(s) addresses; '-': one a line from standard input.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Draw an image of shapes, and detect on it with the weights 'shapes'.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(help=WEIGHTS, show_default=PUBLISHED),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Report objects that score above this, 0 to 1.")] = 0.5,
    top_k: Annotated[int, typer.Option(help="Report at most this many objects an image, the best.")] = 100,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Report this class only; again for more.", show_default="all")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = AUTO,
    batch_size: Annotated[int, typer.Option(help="Run at most this many images of one shape together.", min=1)] = 8,
    output: Annotated[Path, typer.Option(help="Folder for everything that is written.")] = Path("detections"),
    format: Annotated[
        Format,
        typer.Option(help="json: a file an image. jsonl: one file, a line an image. csv: that, and a row an object."),
    ] = Format.json,
    draw: Annotated[bool, typer.Option(help="Write annotated images.")] = True,
    font: Annotated[Path | None, typer.Option(help="TrueType file, for names that PIL's font cannot write.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Pass over images whose results are there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a jsonl or csv that is there.")] = False,
    max_pixels: Annotated[
        int | None,
        typer.Option(help="Refuse images of more pixels.", show_default="178956970, PIL's limit", min=1),
    ] = None,
) -> None:
    """Detect objects on images: print them, draw them, write them. To see it work at once: --demo.

    An image that cannot be read is listed at the end and stops nothing.

    Under torchrun each process takes its share of the images, and waits for the others at the end.

    Exit code: 0 all images done, 1 some failed, 2 nothing could begin, 130 interrupted.
    """
    with one_line_errors(), join_processes() as process:
        if resume and overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
        if demo == bool(images):
            raise ValueError(f"images: expected either some or --demo, got {'both' if demo else 'neither'}")
        images = images or []
        if "-" in images and process.size > 1:
            raise ValueError("images: expected files, folders or globs under torchrun: '-' can be read only once")
        if max_pixels:
            # PIL refuses what has more than twice this
            Image.MAX_IMAGE_PIXELS = max_pixels // 2 if max_pixels % 2 == 0 else max_pixels / 2  # type: ignore[assignment]
        load_font(font)  # at once, not at the first image
        drawn = Input(str(output / _DEMO_IMAGE), _DEMO)
        found = Inputs([drawn], 0) if demo else list_images(images, output=output)
        default = shipped_folder(_DEMO_WEIGHTS) or _DEMO_WEIGHTS if demo else PUBLISHED
        detector = open_detector(str(weights or default), device)
        postprocessing = detector.postprocessing(threshold=threshold, top_k=top_k, classes=classes)
        records = open_records(format, output, process, resume=resume, overwrite=overwrite)
        share = found.images[process.rank :: process.size]
        todo = [which for which in share if not records.has(which)]
        if draw:
            _check_originals_stay(found.images, output)
            if not (resume or overwrite):
                _check_drawings_are_ours(todo, output, records)
        if found.passed_over:
            tell(f"passed over files in folders that are no images: {found.passed_over}", style="yellow")
        if len(share) > len(todo):
            tell(f"{len(share) - len(todo)} of {len(share)} images are done already")
        if demo:
            _draw_demo(output / _DEMO_IMAGE, overwrite=overwrite)
        work = _Work(todo, output if draw else None, font, records)
        code = work.run(detector, postprocessing, batch_size, show_progress=process.rank == 0)
        work.report(records.close() or [output])
        failures = process.sum(len(work.failures))
        code = code or (FAILED if failures else 0)
    if code:
        raise typer.Exit(code)


def _draw_demo(path: Path, *, overwrite: bool) -> None:
    """Draw an image of shapes that no training has seen; another image of that name stays, unless unwanted."""
    image, *_ = draw_image(0, index_in(_DEMO.name, _DEMO_PLACE))
    if path.exists() and not overwrite:
        with Image.open(path) as there:
            if there.convert("RGB").tobytes() == image.tobytes():
                return
        raise FileExistsError(
            f"{path}: it is there already, and another image; --overwrite replaces it, --output names another folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically({path: lambda unfinished: image.save(unfinished, "PNG")})


class _Saved(NamedTuple):
    """An image that is done, but for its record."""

    which: Input
    outcome: Detections | Exception


@dataclass
class _Work:
    """The images to go through, and what has come of it."""

    inputs: Sequence[Input]
    drawings: Path | None  # folder; None: no annotated images
    font: Path | None
    records: Records
    done: int = 0
    failures: list[str] = field(default_factory=list)
    objects: Counter[str] = field(default_factory=Counter)
    images: Counter[str] = field(default_factory=Counter)
    last: Detections | None = None

    def run(self, detector: Detector, postprocessing: Postprocessing, batch_size: int, *, show_progress: bool) -> int:
        """Go through all images, drawing beside the model; return the exit code of what stopped it, or 0."""
        outcomes = detector.outcomes((which.image for which in self.inputs), postprocessing, batch_size=batch_size)
        saved = map_in_threads(self._draw, zip(self.inputs, outcomes, strict=True), workers=2, depth=8)
        bar = progress_bar(err, shown=show_progress and len(self.inputs) > 1)
        try:
            with bar, closing(outcomes), closing(saved):
                for which, outcome in bar.track(saved, total=len(self.inputs), description="detecting"):
                    self._take(which, outcome)
        except KeyboardInterrupt:
            tell(f"interrupted after {self.done} of {len(self.inputs)} images; --resume goes on")
            return INTERRUPTED
        except OSError as error:  # nothing more can be written: to go on would lose what is found
            tell(f"error: {error}", style="red")
            tell(f"stopped after {self.done} of {len(self.inputs)} images; --resume goes on")
            return FAILED
        return 0

    def _draw(self, finished: tuple[Input, Detections | Exception]) -> _Saved:
        """Write the annotated image; a thread does it."""
        which, outcome = finished
        if self.drawings is None or isinstance(outcome, Exception):
            return _Saved(which, outcome)
        try:
            image = outcome.draw(font=self.font)
        except IMAGE_ERRORS as error:  # the image was there a moment ago
            return _Saved(which, error)
        path = _drawing(which, self.drawings)
        options = {"quality": 92} if path.suffix == ".jpg" else {"compress_level": 3}
        kind = "JPEG" if path.suffix == ".jpg" else "PNG"

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically({path: lambda unfinished: image.save(unfinished, kind, **options)})

        return _Saved(which, _unless_too_long(write) or outcome)

    def _take(self, which: Input, outcome: Detections | Exception) -> None:
        """Count and record an image."""
        if isinstance(outcome, Detections):
            outcome = _unless_too_long(partial(self.records.write, which, outcome)) or outcome
        if isinstance(outcome, Exception):
            self.failures.append(str(outcome) if which.image in str(outcome) else f"{which.image}: {outcome}")
        else:
            self.objects.update(outcome.names)
            self.images.update(set(outcome.names))
            self.last = outcome
        self.done += 1

    def report(self, files: Sequence[Path]) -> None:
        """Print what was found, where it is, and what failed."""
        if len(self.inputs) == 1 and self.last is not None:
            out.print(_objects_table(self.last))
        elif self.objects:
            out.print(self._classes_table())
        finished = self.done - len(self.failures)
        counted = ", ".join(_count(*numbers) for numbers in ((finished, "image"), (self.objects.total(), "object")))
        tell(f"{counted}; written to {', '.join(map(str, files))}", to=out)
        if self.failures:
            tell(f"{len(self.failures)} of {self.done} images failed:", style="red")
            for failure in self.failures[:_LISTED]:
                tell(f"  {failure}")
            if len(self.failures) > _LISTED:
                tell(f"  and {len(self.failures) - _LISTED} more")

    def _classes_table(self) -> Table:
        table = Table("class", "objects", "images")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, count in self.objects.most_common():
            table.add_row(Text(name), str(count), str(self.images[name]))
        return table


def _objects_table(found: Detections) -> Table:
    """Return a table of what was found on one image."""
    table = Table("object", "score", "x0", "y0", "x1", "y1", title=_count(len(found), "object"))
    for column in table.columns[1:]:
        column.justify = "right"
    for box, score, name in found:
        table.add_row(Text(name), f"{score:.3f}", *(f"{value:.1f}" for value in box))
    return table


def _count(number: int, noun: str) -> str:
    """Spell out a number of things."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _drawing(which: Input, folder: Path) -> Path:
    """Return where the annotated image goes: of a photograph in jpeg, of anything else in png."""
    suffix = ".jpg" if Path(which.image).suffix.lower() in _JPEG else ".png"
    return folder / which.output.with_name(which.output.name + suffix)


def _unless_too_long(write: Callable[[], None]) -> OSError | None:
    """Write a file; return the error of a name that is too long for it, which is one image's trouble alone."""
    try:
        write()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return error
    return None


def _check_originals_stay(inputs: Sequence[Input], output: Path) -> None:
    """Raise ValueError if an annotated image would take the place of an image that is to be read."""
    drawings = {os.path.abspath(_drawing(which, output)) for which in inputs}  # noqa: PTH100  # Path would take minutes
    for which in inputs:
        if os.path.abspath(which.image) in drawings:  # noqa: PTH100
            raise ValueError(
                f"--output {output}: {which.image} is one of the images and would be overwritten by an annotated"
                " copy; name another folder, or --no-draw"
            )


def _check_drawings_are_ours(inputs: Sequence[Input], output: Path, records: Records) -> None:
    """Raise ValueError if an annotated image would take the place of a file that no earlier run has made."""
    for which in inputs:
        path = _drawing(which, output)
        if not records.knows(which) and os.path.exists(path):  # noqa: PTH110  # False for a name that is too long
            raise ValueError(
                f"{path}: it is there already, and no annotated image of an earlier run; --overwrite replaces it,"
                " --output names another folder"
            )
