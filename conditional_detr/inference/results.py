"""Write detections as one JSON file per image, JSON Lines, or CSV.

An image is done when its name is in its JSON file, or in any of the JSON Lines files. Each process writes a JSON Lines
file of its own; CSV is made from all of them. Results record the settings they were made with, so that results of
different settings are not mixed.
"""

import csv
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from filelock import FileLock, Timeout

from conditional_detr.inference.listing import ListedImage
from conditional_detr.inference.processes import Process
from conditional_detr.system.atomic_files import remove_unfinished, write_atomically

if TYPE_CHECKING:
    from conditional_detr.inference.detections import Detections

_LINES = "detections"
_LINE_NAMES = rf"{_LINES}(-\d+-of-\d+)?\.jsonl"
_TABLE = f"{_LINES}.csv"
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # also in full width
_COLUMNS = ("image", "name", "score", "x0", "y0", "x1", "y1", "label")


class Format(str, Enum):
    """Formats of results."""

    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class ResultWriter(ABC):
    """Write the detections of images; use it as a context manager, or call :meth:`close` in the end.

    ``open_results`` makes one.

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
        before, now = content.get("settings") or {}, self.settings or {}
        if isinstance(before, Mapping) and before == now:
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
        _release(self._lock)

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self.release()


def open_results(
    format: Format | str,
    folder: str | Path,
    process: Process = Process(),  # noqa: B008  # immutable
    *,
    resume: bool = False,
    overwrite: bool = False,
    csv_safe: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> ResultWriter:
    """Prepare to write results.

    ::

        listing = list_images(["photos"], output="results")
        settings = detector.settings(detector.postprocessing())
        with open_results("jsonl", "results", settings=settings) as results:
            images = (listed.image for listed in listing.images)
            for listed, detections in zip(listing.images, detector(images)):
                results.write(listed, detections)

    Args:
        format: "json" writes one file per image, "jsonl" one file with a line per image, "csv" also a table with a
            row per detection.
        folder: made if missing.
        process: which of the processes that share the work this is; each of them must call this function.
        resume: keep existing results and add to them.
        overwrite: replace existing results. With neither, JSON files are replaced, and an existing JSON Lines file is
            an error.
        csv_safe: in a table, write an apostrophe before names that a spreadsheet would run as a formula.
        settings: what decides the detections, from :meth:`conditional_detr.Detector.settings`; it is written with the
            results of each image, and compared when results are kept.

    Raises:
        OSError: the folder cannot be made or written, or another run is writing to it.
        ValueError: an unknown format; a file that would be overwritten, or that holds something else, such as results
            of other settings.
    """
    format, folder = Format(format), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder for results, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{_LINES}.lock", timeout=0)
    if process.rank == 0:
        try:
            lock.acquire()
        except Timeout as error:
            raise OSError(f"{folder}: another run is writing results to this folder; use another one") from error
    process.wait()  # the others write only if the first one may
    if format is Format.json:
        return _JsonFiles(folder, process, lock, settings, resume=resume, overwrite=overwrite)
    try:
        existing = _prepare_lines(format, folder, process, resume=resume, overwrite=overwrite)
        return _JsonLines(folder, format, process, existing, lock, settings, csv_safe)
    except BaseException:
        _release(lock)
        raise


def _release(lock: FileLock) -> None:
    """Release a lock and remove its file; do nothing in a process that has not acquired it."""
    if lock.is_locked:
        with suppress(PermissionError):  # Windows keeps open files
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _prepare_lines(format: Format, folder: Path, process: Process, *, resume: bool, overwrite: bool) -> list[Path]:
    """Check the existing files against the options, remove those to replace, and return those to add to."""
    existing = _line_files(folder)
    process.wait()  # so that no process takes the new file of another for an old one
    if existing and not (resume or overwrite):
        raise ValueError(f"{existing[0]}: already exists; --resume adds to it, --overwrite replaces it")
    table = folder / _TABLE
    if format is Format.csv and os.path.lexists(table) and not overwrite and not (existing and _is_table(table)):
        raise ValueError(f"{table}: expected no file, or the table of an earlier run; --overwrite replaces it")
    if overwrite and process.rank == 0:
        for path in existing:
            path.unlink()
    process.wait()
    return existing if resume else []


class _JsonFiles(ResultWriter):
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
            image, _ = content["image"], content["detections"]
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
        try:
            return self._file(listed).exists()
        except OSError:  # a name that is too long fails when it is written
            return False

    def write(self, listed: ListedImage, detections: "Detections") -> None:
        text = json.dumps(self.as_json(listed, detections), indent=2) + "\n"
        file = self._file(listed)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent not in self.tidied:
            remove_unfinished(file.parent)
            self.tidied.add(file.parent)
        write_atomically({file: lambda path: path.write_text(text, encoding="utf-8")})


class _JsonLines(ResultWriter):
    """``detections.jsonl``, one line per image in the order they were finished, and a CSV made from it if wanted."""

    def __init__(
        self,
        folder: Path,
        format: Format,
        process: Process,
        earlier: list[Path],
        lock: FileLock,
        settings: Mapping[str, Any] | None,
        csv_safe: bool,
    ) -> None:
        super().__init__(process, lock, settings)
        remove_unfinished(folder)
        self.csv_safe = csv_safe
        self.format = format
        self.path = folder / f"{_LINES}{f'-{process.rank + 1}-of-{process.size}' if process.size > 1 else ''}.jsonl"
        if self.path in earlier:
            _drop_broken_line(self.path)
        self.done = set()
        for path in earlier:
            for number, line in enumerate(_read_lines(path), 1):
                self.check_settings(line, f"{path}, line {number}")
                self.done.add(_file_of(line["image"]))
        self.file: TextIO = self.path.open("a", encoding="utf-8")

    def is_done(self, listed: ListedImage) -> bool:
        return _file_of(listed.image) in self.done

    has_results = is_done

    def write(self, listed: ListedImage, detections: "Detections") -> None:
        try:
            self.file.write(json.dumps(self.as_json(listed, detections)) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> list[Path]:
        with suppress(OSError):  # every line was flushed, but one that a full disk refused and that was reported
            self.file.close()
        self.process.wait()
        parts = _line_files(self.path.parent)
        files = parts if self.format is Format.jsonl else [self.path.with_name(_TABLE), *parts]
        if self.format is Format.csv and self.process.rank == 0:
            write_atomically({files[0]: lambda path: self._write_table(path, parts)})
        self.release()
        return files

    def _write_table(self, path: Path, parts: list[Path]) -> None:
        """Write one row per detection, of all processes."""
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(_COLUMNS)
            for line in (line for part in parts for line in _read_lines(part)):
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


def _line_files(folder: Path) -> list[Path]:
    """Return the JSON Lines files that runs with any number of processes have written; other names are the user's."""
    return sorted(path for path in folder.glob(f"{_LINES}*.jsonl") if re.fullmatch(_LINE_NAMES, path.name))


def _is_table(path: Path) -> bool:
    """Return whether a CSV file begins as those of this module."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return file.readline().rstrip("\r\n") == ",".join(_COLUMNS)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the results in a JSON Lines file; skip a last line that another process is still writing."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                content = json.loads(line)
                content["image"], content["detections"]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: expected the detections of one image as JSON") from error
            yield content


def _drop_broken_line(path: Path) -> None:
    """Cut off what a killed process has left after the end of the last complete line."""
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
