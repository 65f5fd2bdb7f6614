"""Detect on images for ``conditional-detr detect``: draw and write the results, count and print them."""

import errno
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from conditional_detr.cli.console import FAILED, INTERRUPTED, err, out, print_line
from conditional_detr.cli.marks import save_marked
from conditional_detr.inference.listing import ListedImage
from conditional_detr.inference.result_writers import ResultWriter
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.progress import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from conditional_detr.inference.detections import Detections
    from conditional_detr.inference.detector import Detector
    from conditional_detr.inference.postprocessing import Postprocessing

_MOST_FAILURES = 20  # that are printed one by one
_JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}


class _Drawn(NamedTuple):
    """An image whose annotated copy is written, and whose result is not."""

    listed: ListedImage
    outcome: "Detections | Exception"


@dataclass
class DetectionRun:
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
        self,
        detector: "Detector",
        postprocessing: "Postprocessing",
        options: Mapping[str, Any],
        *,
        show_progress: bool,
    ) -> int:
        """Process all images, drawing in threads beside the model; return the exit code of what stopped it, or 0.

        ``options`` are those of ``Detector.outcomes``.
        """
        from conditional_detr.inference.pipeline import map_in_threads

        images = (listed.image for listed in self.inputs)
        outcomes = detector.outcomes(images, postprocessing, **options)
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
        from conditional_detr.inference.preparation import IMAGE_ERRORS

        listed, outcome = finished
        if self.drawings is None or isinstance(outcome, Exception):
            return _Drawn(listed, outcome)
        try:
            image = outcome.draw(font=self.font)
        except IMAGE_ERRORS as error:  # the file has changed since
            return _Drawn(listed, error)
        path = drawing_of(listed, self.drawings)

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


def drawing_of(listed: ListedImage, folder: Path) -> Path:
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
