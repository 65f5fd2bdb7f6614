"""Detect on a video for ``conditional-detr video``: draw, write, show and count."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table

from conditional_detr.cli.console import FAILED, INTERRUPTED, err, out, print_line
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.system.atomic_files import publish, remove_unfinished, unfinished_folder
from conditional_detr.system.outputs import check_output
from conditional_detr.system.progress import progress_bar
from conditional_detr.system.shutdown import ShutdownRequest
from conditional_detr.video.detection import DetectedFrame, detect_frames, read_frames
from conditional_detr.video.frames import Frame, Selection
from conditional_detr.video.lines import LINES, TRACKS, FrameLines, write_mot
from conditional_detr.video.live import NewestItem
from conditional_detr.video.reading import Video
from conditional_detr.video.timing import StageTimes
from conditional_detr.video.tracking import Tracked, Tracker
from conditional_detr.video.window import Window
from conditional_detr.video.writing import VideoWriter

if TYPE_CHECKING:
    from conditional_detr.inference.detections import Detections
    from conditional_detr.inference.detector import Detector
    from conditional_detr.inference.postprocessing import Postprocessing
    from conditional_detr.modeling.metadata import Metadata

VIDEO = "annotated.mp4"


class _Drawn(NamedTuple):
    frame: Frame
    detections: "Detections"
    tracked: Tracked | None
    image: Image.Image | None


@dataclass
class VideoRun:
    """Detect on the frames of a video, draw and write the results, and count them."""

    video: Video
    selection: Selection
    output: Path
    font: Path | None
    encoder: str | None  # None: no annotated video
    tracker: Tracker | None
    resume: bool = field(kw_only=True)
    overwrite: bool = field(kw_only=True)
    mot: bool = field(kw_only=True)
    times: StageTimes = field(default_factory=StageTimes)
    done: int = 0
    objects: Counter[str] = field(default_factory=Counter)  # by class name
    frames: Counter[str] = field(default_factory=Counter)  # by class name
    tracks: dict[str, set[int]] = field(default_factory=dict)  # by class name
    last: Tracked | None = None
    newest: NewestItem[Frame] | None = None
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _lines: FrameLines = field(init=False)
    _writer: VideoWriter | None = field(default=None, init=False)
    _window: Window | None = field(default=None, init=False)
    _temporary: Path | None = field(default=None, init=False)
    _complete: bool = field(default=False, init=False)  # whether the last frame is done
    _made: bool = field(default=False, init=False)  # whether this run has made the folder

    def check_files(self) -> bool:
        """Check existing files against the options, and return whether lines of an earlier run are resumed.

        Raises:
            OSError: the folder cannot be made, or a file exists that may not be replaced.
            ValueError: a file is the input or a link.
        """
        self._made |= not os.path.lexists(self.output)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise NotADirectoryError(f"{self.output}: expected a folder for results, got a file") from error
        resumed = self.resume and (self.output / LINES).is_file()
        inputs = [] if self.video.path is None else [self.video.path]
        for name in (LINES, *([VIDEO] if self.encoder else []), *([TRACKS] if self.mot else [])):
            path = self.output / name
            check_output(path, inputs=inputs, overwrite=True)
            if os.path.lexists(path) and not (self.overwrite or resumed):
                raise FileExistsError(f"{path}: already exists; --resume goes on with it, --overwrite replaces it")
            if path.is_symlink():
                raise ValueError(f"{path}: expected a file to write, got a link")
        return resumed

    def prepare(self, settings: Mapping[str, Any], metadata: "Metadata") -> None:
        """Check the files, and set up what writes them; they are replaced when the first frame is done.

        Raises:
            OSError: a file exists that may not be replaced, or another run is writing to the folder.
            ValueError: a file is the input or a link.
        """
        resumed = self.check_files()
        remove_unfinished(self.output)
        self._lines = self._stack.enter_context(
            FrameLines(self.output, self.video.name, settings, metadata, resume=resumed)
        )
        if self.encoder is not None:
            path = self.output / VIDEO
            if resumed and path.exists():  # the earlier one stays until this one has its frames, too
                self._temporary = self._stack.enter_context(unfinished_folder(self.output))
                path = self._temporary / VIDEO
            start, end = self.selection.start, self.selection.end
            self._writer = VideoWriter(path, self.video, start=start, end=end, encoder=self.encoder)

    def open_window(self) -> None:
        """Open a window that shows the frames."""
        self._window = Window(self.video.name)

    def close(self) -> None:
        """Complete the files and let other runs write to the folder."""
        try:
            if self._writer is not None:
                self._writer.close(complete=self._complete)
            if self._temporary is not None and self.done >= max(self._lines.recorded, 1):
                publish(self._temporary, {VIDEO: VIDEO})
            if self._window is not None:
                self._window.close()
        finally:
            self._stack.close()
            if self._made and not self.done:
                with suppress(OSError):  # it is not empty
                    self.output.rmdir()

    def run(
        self, detector: "Detector", postprocessing: "Postprocessing", batch_size: int | None, *, live: bool
    ) -> int:
        """Process all frames; return the exit code of what stopped it, or 0."""
        self.newest = NewestItem() if live else None
        frames = read_frames(self.video, self.selection, self.times, newest=self.newest)
        detected = detect_frames(
            frames,
            detector,
            postprocessing,
            self.times,
            batch_size=1 if live else batch_size,
            live=live,
            known=self._lines.known,
        )
        drawn = map_in_threads(self._draw, self._tracked(detected), workers=2, depth=1 if live else 4)
        total = self.selection.count(self.video.frame_count, self.video.rate)
        try:
            with (
                ShutdownRequest() as shutdown,
                progress_bar(err, shown=True) as bar,
                closing(detected),
                closing(drawn),
            ):
                task, begin = bar.add_task("detecting", total=total), time.monotonic()
                for item in drawn:
                    self._write(item)
                    rate = self.done / (time.monotonic() - begin)
                    bar.update(task, advance=1, description=f"detecting, {rate:.1f} frames/s")
                    if shutdown.requested or (self._window is not None and self._window.closed):
                        break
                else:
                    if not self.done:
                        raise ValueError(f"{self.video.name}: expected frames {self._interval()}, got none")
                    self._complete = True
                    return 0
        except KeyboardInterrupt:
            pass
        except (OSError, ValueError) as error:
            if not self.done:
                raise
            print_line(f"error: {error}", style="red")
            print_line(f"stopped after {self.done} frames; --resume continues")
            return FAILED
        print_line(f"interrupted after {self.done} frames; --resume continues")
        return INTERRUPTED

    def _interval(self) -> str:
        start, end = self.selection.start, self.selection.end
        return f"from {start:g} s on" if end is None else f"from {start:g} to {end:g} s"

    def _tracked(self, detected: Iterator[DetectedFrame]) -> Iterator[tuple[DetectedFrame, Tracked | None]]:
        for item in detected:
            yield item, None if self.tracker is None else self.tracker.update(item.detections, item.frame.time)

    def _draw(self, item: tuple[DetectedFrame, Tracked | None]) -> _Drawn:
        """Draw a frame; runs in a thread."""
        (frame, detections), tracked = item
        image = None
        if self.encoder is not None or self._window is not None:
            with self.times.measure("draw"):
                image = Image.fromarray(frame.image)
                if tracked is not None and self.tracker is not None:
                    image = self.tracker.draw(image, detections, tracked, font=self.font)
                else:
                    image = detections.draw(image, font=self.font)
        return _Drawn(frame, detections, tracked, image)

    def _write(self, item: _Drawn) -> None:
        """Write and count a frame."""
        if self._writer is not None and item.image is not None:
            with self.times.measure("encode"):
                self._writer.write(item.frame, np.asarray(item.image))
        if self.done >= self._lines.recorded:
            self._lines.write(item.frame, item.detections, item.tracked)
        if self._window is not None and item.image is not None:
            self._window.show(item.image)
        names = item.detections.names
        self.done += 1
        self.objects.update(names)
        self.frames.update(set(names))
        self.last = item.tracked
        if item.tracked is not None:
            for name, track in zip(names, item.tracked.ids, strict=True):
                if track is not None:
                    self.tracks.setdefault(name, set()).add(track)

    def report(self, *, profile: bool) -> None:
        """Print the counts and the files that were written."""
        tracked = self.tracker is not None
        table = Table("class", "objects", "frames", *(["tracks"] if tracked else []))
        for column in table.columns[1:]:
            column.justify = "right"
        for name, count in self.objects.most_common():
            tracks = [str(len(self.tracks.get(name, ())))] if tracked else []
            table.add_row(name, str(count), str(self.frames[name]), *tracks)
        if self.objects:
            out.print(table)
        if self.last is not None:
            for number, line in enumerate(self.last.lines, 1):
                print_line(f"line {number}: {line.left} to its left, {line.right} to its right", to=out)
        counts = f"{self.done} frames, {self.objects.total()} objects"
        if self.newest is not None:
            counts += f", {self.newest.dropped} frames dropped"
        print_line(f"{counts}; written to {', '.join(map(str, self._files())) or 'no file'}", to=out)
        if profile:
            times = Table("milliseconds per frame", "p50", "p99")
            for stage, values in self.times.percentiles(50, 99).items():
                times.add_row(stage, *(f"{value:.1f}" for value in values))
            out.print(times)

    def _files(self) -> list[Path]:
        """Return the files that were written, with the tracks as the last one, which need all lines."""
        if not self.done:
            return []
        files = [self.output / LINES]
        if self.encoder is not None:
            files.append(self.output / VIDEO)
        if self.mot:
            files.append(write_mot(self.output))
        return files
