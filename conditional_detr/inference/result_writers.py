"""Writers of detections: one JSON file per image, JSON Lines, or CSV; ``results.open_results`` chooses one.

An image is done when its name is in its JSON file, or in any of the JSON Lines files. Results record the settings they
were made with, so that results of different settings are not mixed.
"""

import csv
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from filelock import FileLock

from conditional_detr.inference.listing import ListedImage
from conditional_detr.inference.processes import Process
from conditional_detr.inference.result_files import LINES, check_form, drop_broken_line, line_files, read_lines
from conditional_detr.system.atomic_files import remove_unfinished, write_atomically

if TYPE_CHECKING:
    from conditional_detr.inference.detections import Detections

TABLE = f"{LINES}.csv"
"""File name of the table."""
LOCK = f".{LINES}.lock"
"""File name of the lock of a folder."""

_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # also in full width
_COLUMNS = ("image", "name", "score", "x0", "y0", "x1", "y1", "label")


class ResultWriter(ABC):
    """Write the detections of images; use it as a context manager, or call :meth:`close` in the end.

    ``results.open_results`` makes one.

    Args:
        process: which of the processes that share the work this is.
        lock: keeps other runs from writing to the folder; the first process has acquired it.
        settings: what decides the detections, written with the results of each image; None: not known.
    """

    def __init__(self, process: Process, lock: FileLock, settings: Mapping[str, Any] | None) -> None:
        self.process = process
        self.settings = settings
        self._lock = lock

    @abstractmethod
    def is_done(self, listed: ListedImage) -> bool:
        """Return whether the results of an image exist and must stay."""

    @abstractmethod
    def has_results(self, listed: ListedImage) -> bool:
        """Return whether an earlier run has written results of an image."""

    @abstractmethod
    def write(self, listed: ListedImage, detections: "Detections") -> None:
        """Write the results of an image, completely or not at all.

        Raises:
            OSError: the file cannot be written.
        """

    def as_json(self, listed: ListedImage, detections: "Detections") -> dict[str, Any]:
        """Return the results of an image as they are written."""
        settings = {} if self.settings is None else {"settings": self.settings}
        return {"image": listed.image, **settings, **detections.to_dict()}

    def check_settings(self, content: Mapping[str, Any], where: str) -> None:
        """Raise ValueError if the results of an image were made with other settings than those of this run."""
        before, now = content.get("settings"), self.settings or {}
        before = before if isinstance(before, Mapping) else {}
        if before == now:
            return
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        found = ", ".join(f"{name} {before.get(name)}, not {now.get(name)}" for name in names)
        raise ValueError(
            f"{where}: expected results of the settings of this run, got {found}; --overwrite replaces them,"
            " --output names another folder"
        )

    def close(self) -> list[Path]:
        """Finish the files, wait for the other processes, and return the files that hold results of all images."""
        self.process.wait()
        self.release()
        return []

    def release(self) -> None:
        """Let other runs write to the folder; :meth:`close` does this, too."""
        release(self._lock)

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self.release()


def release(lock: FileLock) -> None:
    """Release a lock and remove its file; do nothing in a process that has not acquired it."""
    if lock.is_locked:
        with suppress(PermissionError):  # Windows keeps open files
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


class JsonFiles(ResultWriter):
    """``NAME.json`` for each image."""

    def __init__(
        self,
        folder: Path,
        process: Process,
        lock: FileLock,
        settings: Mapping[str, Any] | None,
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        super().__init__(process, lock, settings)
        self.folder = folder
        self.tidied: set[Path] = set()
        self.resume = resume
        self.overwrite = overwrite

    def _file(self, listed: ListedImage) -> Path:
        return self.folder / listed.output.with_name(f"{listed.output.name}.json")

    def is_done(self, listed: ListedImage) -> bool:
        """Read the file: by its name alone it could hold another image's results, or something else."""
        path = self._file(listed)
        if self.overwrite or not self.has_results(listed):
            return False
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            check_form(content)
            image = content["image"]
        except (ValueError, TypeError, KeyError):
            image = None
        if image is None or _file_of(image) != _file_of(listed.image):
            holds = "something other than detections" if image is None else f"the detections of {image}"
            raise ValueError(
                f"{path}: expected the detections of {listed.image}, got a file with {holds};"
                " --overwrite replaces it, --output names another folder"
            )
        if self.resume:
            self.check_settings(content, str(path))
        return self.resume

    def has_results(self, listed: ListedImage) -> bool:
        """Return whether the file of an image exists."""
        try:
            return self._file(listed).exists()
        except OSError:  # a name that is too long fails when it is written
            return False

    def write(self, listed: ListedImage, detections: "Detections") -> None:
        """Write the file of an image."""
        text = json.dumps(self.as_json(listed, detections), indent=2) + "\n"
        file = self._file(listed)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent not in self.tidied:
            remove_unfinished(file.parent)
            self.tidied.add(file.parent)
        write_atomically({file: lambda path: path.write_text(text, encoding="utf-8")})


class JsonLines(ResultWriter):
    """``detections.jsonl``, one line per image in the order they were finished, and a CSV made from it if wanted."""

    def __init__(
        self,
        folder: Path,
        process: Process,
        earlier: list[Path],
        lock: FileLock,
        settings: Mapping[str, Any] | None,
        *,
        table: bool,
        csv_safe: bool,
    ) -> None:
        super().__init__(process, lock, settings)
        remove_unfinished(folder)
        self.csv_safe = csv_safe
        self.table = table
        self.path = folder / f"{LINES}{f'-{process.rank + 1}-of-{process.size}' if process.size > 1 else ''}.jsonl"
        if self.path in earlier:
            drop_broken_line(self.path)
        self.done = set()
        for path in earlier:
            for number, line in enumerate(read_lines(path), 1):
                self.check_settings(line, f"{path}, line {number}")
                self.done.add(_file_of(line["image"]))
        self.file: TextIO = self.path.open("a", encoding="utf-8")

    def is_done(self, listed: ListedImage) -> bool:
        """Return whether a line of an earlier run has the image."""
        return _file_of(listed.image) in self.done

    has_results = is_done

    def write(self, listed: ListedImage, detections: "Detections") -> None:
        """Append a line."""
        try:
            self.file.write(json.dumps(self.as_json(listed, detections)) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> list[Path]:
        """Close the file, wait for the other processes, and write the table."""
        with suppress(OSError):  # every line was flushed, but one that a full disk refused and that was reported
            self.file.close()
        self.process.wait()
        parts = line_files(self.path.parent)
        files = [self.path.with_name(TABLE), *parts] if self.table else parts
        if self.table and self.process.rank == 0:
            write_atomically({files[0]: lambda path: self._write_table(path, parts)})
        self.release()
        return files

    def _write_table(self, path: Path, parts: list[Path]) -> None:
        """Write one row per detection, of all processes."""
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(_COLUMNS)
            for line in (line for part in parts for line in read_lines(part)):
                for one in line["detections"]:
                    names = [line["image"], one["name"].encode("utf-8", "backslashreplace").decode("utf-8")]
                    if self.csv_safe:
                        names = [_no_formula(name) for name in names]
                    rows.writerow((*names, one["score"], *one["box"], one["label"]))


def _file_of(image: str) -> str:
    """Return the path of an image without links and ``.``, so that two names of one file are equal; or its URL."""
    if re.match("https?://", image, re.IGNORECASE):
        return image
    try:
        return os.path.realpath(image)
    except (OSError, ValueError):  # opening it raises the documented error
        return image


def _no_formula(text: str) -> str:
    """Return text that a spreadsheet shows as text, as OWASP recommends: formulas get an apostrophe in front."""
    return f"'{text}" if text.lstrip().startswith(_FORMULA) or text.startswith(("\t", "\r", "\n")) else text


def is_table(path: Path) -> bool:
    """Return whether a CSV file begins as those of this module."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return file.readline().rstrip("\r\n") == ",".join(_COLUMNS)
