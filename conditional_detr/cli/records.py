"""How detections are written: one json file a picture, or one growing file of json lines; csv is made from the latter.

A file a picture needs no more than to be there to tell that its picture is done. The growing file belongs to one
process; the names in all processes' files tell what is done.
"""

import csv
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TextIO

from conditional_detr.cli.inputs import Input
from conditional_detr.detections import Detections
from conditional_detr.files import write_whole

_LINES = "detections"
_COLUMNS = ("picture", "name", "score", "x0", "y0", "x1", "y1", "label")


class Format(str, Enum):
    """What ``--format`` takes."""

    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Records(Protocol):
    """Where results go, and what is there already."""

    def has(self, which: Input) -> bool:
        """Tell whether the results of a picture are there."""

    def write(self, which: Input, found: Detections) -> None:
        """Write the results of a picture, whole or not at all."""

    def close(self) -> list[Path]:
        """Finish, and return the files that hold all results together."""


def open_records(kind: Format, folder: Path, *, resume: bool, overwrite: bool, rank: int, processes: int) -> Records:
    """Make ready to write.

    Args:
        kind: the format.
        folder: made if missing.
        resume: go on where results are; otherwise those of json are written anew and the others must not be there.
        overwrite: remove what is there.
        rank: this process's number among those that share the work, from 0.
        processes: their number.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: a file that would have to be overwritten, or that holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind is Format.json:
        return _FileEach(folder, resume=resume)
    return _Lines(folder, kind, resume=resume, overwrite=overwrite, rank=rank, processes=processes)


def as_json(which: Input, found: Detections) -> dict[str, Any]:
    """Return a picture's results as they are written."""
    return {"picture": which.picture, **found.to_dict()}


class _FileEach:
    """``NAME.json`` for each picture."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.folder = folder
        self.resume = resume

    def _file(self, which: Input) -> Path:
        return self.folder / which.output.with_name(f"{which.output.name}.json")

    def has(self, which: Input) -> bool:
        return self.resume and self._file(which).is_file()

    def write(self, which: Input, found: Detections) -> None:
        text = json.dumps(as_json(which, found), indent=2, ensure_ascii=False) + "\n"
        self._file(which).parent.mkdir(parents=True, exist_ok=True)
        write_whole({self._file(which): lambda path: path.write_text(text, encoding="utf-8")})

    def close(self) -> list[Path]:
        return []


class _Lines:
    """``detections.jsonl``, a line a picture in the order they were done, and, if wanted, a csv made of it."""

    def __init__(
        self, folder: Path, kind: Format, *, resume: bool, overwrite: bool, rank: int, processes: int
    ) -> None:
        part = f"-{rank + 1}-of-{processes}" if processes > 1 else ""
        self.kind = kind
        self.path = folder / f"{_LINES}{part}.jsonl"
        if self.path.exists() and not (resume or overwrite):
            raise ValueError(f"{self.path}: it is there already; --resume goes on with it, --overwrite replaces it")
        if overwrite:
            self.path.unlink(missing_ok=True)
        if self.path.exists():
            _drop_broken_line(self.path)
        others = folder.glob(f"{_LINES}*.jsonl") if resume else []
        self.done = {line["picture"] for path in others for line in _read_lines(path)}
        self.file: TextIO = self.path.open("a", encoding="utf-8")

    def has(self, which: Input) -> bool:
        return which.picture in self.done

    def write(self, which: Input, found: Detections) -> None:
        self.file.write(json.dumps(as_json(which, found), ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self) -> list[Path]:
        self.file.close()
        if self.kind is Format.jsonl:
            return [self.path]
        table = self.path.with_suffix(".csv")
        write_whole({table: self._write_table})
        return [table, self.path]

    def _write_table(self, path: Path) -> None:
        """Write a row an object."""
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(_COLUMNS)
            for line in _read_lines(self.path):
                for found in line["detections"]:
                    rows.writerow((line["picture"], found["name"], found["score"], *found["box"], found["label"]))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Give the results in a file of json lines; what another process is just writing is not yet there."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                content = json.loads(line)
                content["picture"], content["detections"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: expected one picture's detections as json") from error
            yield content


def _drop_broken_line(path: Path) -> None:
    """Cut off what a killed process left behind the last line's end."""
    with path.open("rb+") as file:
        size = file.seek(0, 2)
        while size:
            start = max(size - (1 << 16), 0)
            file.seek(start)
            newline = file.read(size - start).rfind(b"\n")
            if newline >= 0:
                size = start + newline + 1
                break
            size = start
        file.truncate(size)
