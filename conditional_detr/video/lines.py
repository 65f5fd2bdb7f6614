"""Write the detections of a video as JSON Lines, and read them again to resume a run."""

import itertools
import json
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
from filelock import FileLock, Timeout

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.result_files import drop_broken_line
from conditional_detr.inference.result_writers import LOCK, release
from conditional_detr.modeling.metadata import Metadata
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.video.frames import Frame
from conditional_detr.video.tracking import Tracked

LINES = "detections.jsonl"
TRACKS = "tracks.txt"


class FrameLines:
    """Append a line per frame to ``detections.jsonl``; use it as a context manager.

    A file that is not resumed is replaced by the first line, so that a run which fails before leaves it.

    Args:
        folder: the folder of results, which is locked for other runs.
        video: name of the video.
        settings: what decides the detections and the frames; it is written in each line, and compared when resuming.
        metadata: the model's class names and category ids, for detections that are read again.
        resume: keep the lines of an earlier run.

    Attributes:
        recorded: number of lines of the earlier run.

    Raises:
        OSError: the file cannot be read, or another run is writing to the folder.
    """

    def __init__(
        self, folder: Path, video: str, settings: Mapping[str, Any], metadata: Metadata, *, resume: bool
    ) -> None:
        self._path, self._video, self._settings, self._metadata = folder / LINES, video, dict(settings), metadata
        self._lock = FileLock(folder / LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise OSError(f"{folder}: another run is writing results to this folder; use another one") from error
        self.recorded = 0
        self._mode: Literal["a", "w"] = "a" if resume else "w"
        if resume and self._path.exists():
            drop_broken_line(self._path)
            with self._path.open("rb") as file:
                self.recorded = sum(1 for _ in file)
        self._earlier, self._number = self._read() if self.recorded else iter(()), 0
        self._file: TextIO | None = None

    def __enter__(self) -> "FrameLines":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        release(self._lock)

    def known(self, frame: Frame) -> Detections | None:
        """Return the detections that the earlier run has written for a frame; None after its last line.

        Args:
            frame: the next selected frame of the video.

        Raises:
            ValueError: the next line is damaged, or of another frame, video or settings.
        """
        text = next(self._earlier, None)
        if text is None:
            return None
        self._number += 1
        with _named(self._path, self._number):
            line = dict(json.loads(text))
        mine = {"video": self._video, "frame": frame.index, "time": frame.time, "settings": self._settings}
        if different := [name for name, value in mine.items() if line.get(name) != value]:
            got = ", ".join(f"{name} {line.get(name)}, not {mine[name]}" for name in different)
            raise ValueError(
                f"{self._path}: expected the lines of this video and these settings, got {got};"
                " --overwrite replaces them, --output names another folder"
            )
        with _named(self._path, self._number):
            return self._detections(line, frame.image.shape[:2])

    def write(self, frame: Frame, detections: Detections, tracked: Tracked | None) -> None:
        """Append the line of a frame, unless the earlier run has written it.

        Raises:
            OSError: the file cannot be written.
        """
        content = detections.to_dict()
        line = {"video": self._video, "frame": frame.index, "time": frame.time, "settings": self._settings, **content}
        if tracked is not None:
            for detection, track in zip(content["detections"], tracked.ids, strict=True):
                detection["track"] = track
            line |= {"lines": [count._asdict() for count in tracked.lines], "zones": tracked.zones}
        try:
            if self._file is None:
                self._file = self._path.open(self._mode, encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def _read(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield from itertools.islice(file, self.recorded)

    def _detections(self, line: Mapping[str, Any], size: tuple[int, ...]) -> Detections:
        found = line["detections"]
        labels = [operator.index(one["label"]) for one in found]
        category_ids = tuple(self._metadata.category_ids[label] for label in labels)
        values = [[*one["box"], one["score"]] for one in found]
        numbers = np.array(values, dtype=np.float64).reshape(len(found), 5)
        names = tuple(one["name"] for one in found)
        if (
            not np.isfinite(numbers).all()
            or min(labels, default=0) < 0
            or not all(type(name) is str for name in names)
        ):
            raise ValueError
        if (line["size"]["height"], line["size"]["width"]) != size:
            raise ValueError
        return Detections(
            boxes=torch.from_numpy(numbers[:, :4].astype(np.float32)),
            scores=torch.from_numpy(numbers[:, 4].astype(np.float32)),
            labels=torch.tensor(labels, dtype=torch.int64),
            names=names,
            category_ids=category_ids,
            queries=torch.full((len(found),), -1),  # lines do not have them
            size=(size[0], size[1]),
            source=None,
        )


@contextmanager
def _named(path: Path, number: int) -> Iterator[None]:
    """Name the line of a file in errors of its values."""
    try:
        yield
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path}, line {number}: expected the detections of a frame, got a damaged line;"
            " --overwrite replaces the file"
        ) from error


def write_mot(folder: Path) -> Path:
    """Write the tracks in ``detections.jsonl`` as text of the MOT challenge to ``tracks.txt``, and return its path.

    A row per tracked detection: frame from 1, track, left, top, width, height, score, -1, -1, -1; in pixels, whose
    first one is at 1 as in the challenge's files.

    Raises:
        OSError: the file cannot be written.
        ValueError: a line is damaged.
    """

    def rows(line: Any) -> Iterator[str]:
        for one in line["detections"]:
            if one["track"] is not None:
                x0, y0, x1, y1 = one["box"]
                box = f"{x0 + 1:.2f},{y0 + 1:.2f},{x1 - x0:.2f},{y1 - y0:.2f}"
                yield f"{line['frame'] + 1},{one['track']},{box},{one['score']:.4f},-1,-1,-1\n"

    def write(path: Path) -> None:
        with (folder / LINES).open("rb") as lines, path.open("w", encoding="utf-8") as file:
            for number, text in enumerate(lines, 1):
                with _named(folder / LINES, number):
                    found = list(rows(json.loads(text)))
                file.writelines(found)

    write_atomically({folder / TRACKS: write})
    return folder / TRACKS
