"""How detections are written: one json file an image, or one growing file of json lines; csv is made from the latter.

The name of an image in its file, or in any of the growing files, tells that it is done. A growing file belongs to one
process.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TextIO

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.listing import Input
from conditional_detr.inference.processes import Process
from conditional_detr.system.atomic_files import write_atomically

_LINES = "detections"
_COLUMNS = ("image", "name", "score", "x0", "y0", "x1", "y1", "label")


class Format(str, Enum):
    """What ``--format`` takes."""

    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Records(Protocol):
    """Where results go, and what is there already."""

    def has(self, which: Input) -> bool:
        """Tell whether the results of an image are there and shall stay."""

    def knows(self, which: Input) -> bool:
        """Tell whether an earlier run was here and worked on an image."""

    def write(self, which: Input, found: Detections) -> None:
        """Write the results of an image, whole or not at all."""

    def close(self) -> list[Path]:
        """Finish, and return the files that hold all results together."""


def open_records(kind: Format, folder: Path, process: Process, *, resume: bool, overwrite: bool) -> Records:
    """Make ready to write.

    Args:
        kind: the format.
        folder: made if missing.
        process: which of those that share the work this is; all of them must call it.
        resume: go on where results are; otherwise those of json are written anew and the others must not be there.
        overwrite: replace whatever is there.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: a file that would have to be overwritten, or that holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind is Format.json:
        return _FileEach(folder, resume=resume, overwrite=overwrite)
    there = sorted(folder.glob(f"{_LINES}*.jsonl"))
    process.wait()  # so that no process takes another's new file for an old one
    if there and not (resume or overwrite):
        raise ValueError(f"{there[0]}: it is there already; --resume goes on with it, --overwrite replaces it")
    if overwrite and process.rank == 0:
        for path in there:
            path.unlink()
    process.wait()
    return _Lines(folder, kind, process, there if resume else [])


def as_json(which: Input, found: Detections) -> dict[str, Any]:
    """Return an image's results as they are written."""
    return {"image": which.image, **found.to_dict()}


class _FileEach:
    """``NAME.json`` for each image."""

    def __init__(self, folder: Path, *, resume: bool, overwrite: bool) -> None:
        self.folder = folder
        self.resume = resume
        self.overwrite = overwrite

    def _file(self, which: Input) -> Path:
        return self.folder / which.output.with_name(f"{which.output.name}.json")

    def has(self, which: Input) -> bool:
        """Look into the file: by its name alone it might be another image's, or no result at all."""
        path = self._file(which)
        if self.overwrite or not self.knows(which):
            return False
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            image, _ = content["image"], content["detections"]
        except (ValueError, TypeError, KeyError):
            image = None
        if image != which.image:
            holds = "something else than detections" if image is None else f"the detections on {image}"
            raise ValueError(
                f"{path}: expected the place of those on {which.image}, but it holds {holds};"
                " --overwrite replaces it, --output names another folder"
            )
        return self.resume

    def knows(self, which: Input) -> bool:
        try:
            return self._file(which).exists()
        except OSError:  # a name that is too long fails at its turn
            return False

    def write(self, which: Input, found: Detections) -> None:
        text = json.dumps(as_json(which, found), indent=2) + "\n"
        self._file(which).parent.mkdir(parents=True, exist_ok=True)
        write_atomically({self._file(which): lambda path: path.write_text(text, encoding="utf-8")})

    def close(self) -> list[Path]:
        return []


class _Lines:
    """``detections.jsonl``, a line an image in the order they were done, and, if wanted, a csv made of it."""

    def __init__(self, folder: Path, kind: Format, process: Process, former: list[Path]) -> None:
        self.kind = kind
        self.process = process
        self.path = folder / f"{_LINES}{f'-{process.rank + 1}-of-{process.size}' if process.size > 1 else ''}.jsonl"
        if self.path in former:
            _drop_broken_line(self.path)
        self.done = {line["image"] for path in former for line in _read_lines(path)}
        self.file: TextIO = self.path.open("a", encoding="utf-8")

    def has(self, which: Input) -> bool:
        return which.image in self.done

    knows = has

    def write(self, which: Input, found: Detections) -> None:
        try:
            self.file.write(json.dumps(as_json(which, found)) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> list[Path]:
        with suppress(OSError):  # all lines are out, but one that a full disk refused and that was told
            self.file.close()
        self.process.wait()
        parts = sorted(self.path.parent.glob(f"{_LINES}*.jsonl"))
        if self.kind is Format.jsonl:
            return parts
        table = self.path.with_name(f"{_LINES}.csv")
        if self.process.rank == 0:
            write_atomically({table: lambda path: self._write_table(path, parts)})
        return [table, *parts]

    @staticmethod
    def _write_table(path: Path, parts: list[Path]) -> None:
        """Write a row an object, of all processes."""
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(_COLUMNS)
            for line in (line for part in parts for line in _read_lines(part)):
                for found in line["detections"]:
                    rows.writerow((line["image"], found["name"], found["score"], *found["box"], found["label"]))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Give the results in a file of json lines; what another process is just writing is not yet there."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                content = json.loads(line)
                content["image"], content["detections"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: expected one image's detections as json") from error
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
