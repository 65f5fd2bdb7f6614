"""Write detections as one JSON file per image, JSON Lines, or CSV.

Each process writes a JSON Lines file of its own; CSV is made from all of them. One run at a time writes to a folder.
"""

import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conditional_detr.inference.processes import Process
from conditional_detr.inference.result_files import line_files
from conditional_detr.inference.result_writers import (
    LOCK,
    TABLE,
    JsonFiles,
    JsonLines,
    ResultWriter,
    is_table,
    release,
)


class Format(str, Enum):
    """Formats of results."""

    json = "json"
    jsonl = "jsonl"
    csv = "csv"


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
    lock = lock_folder(folder, acquire=process.rank == 0)
    process.wait()  # the others write only if the first one may
    if format is Format.json:
        return JsonFiles(folder, process, lock, settings, resume=resume, overwrite=overwrite)
    try:
        existing = _prepare_lines(format, folder, process, resume=resume, overwrite=overwrite)
        table = format is Format.csv
        return JsonLines(folder, process, existing, lock, settings, table=table, csv_safe=csv_safe)
    except BaseException:
        release(lock)
        raise


def lock_folder(folder: Path, *, acquire: bool = True) -> FileLock:
    """Make a folder for results if it is missing, and keep other runs from writing to it.

    Args:
        folder: the folder.
        acquire: whether this process locks it; otherwise another one does.

    Raises:
        OSError: the folder cannot be made, or another run has locked it.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder for results, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    if acquire:
        try:
            lock.acquire()
        except Timeout as error:
            raise OSError(f"{folder}: another run is writing results to this folder; use another one") from error
    return lock


def _prepare_lines(format: Format, folder: Path, process: Process, *, resume: bool, overwrite: bool) -> list[Path]:
    """Check the existing files against the options, remove those to replace, and return those to add to."""
    existing = line_files(folder)
    process.wait()  # so that no process takes the new file of another for an old one
    if existing and not (resume or overwrite):
        raise ValueError(f"{existing[0]}: already exists; --resume adds to it, --overwrite replaces it")
    table = folder / TABLE
    if format is Format.csv and os.path.lexists(table) and not overwrite and not (existing and is_table(table)):
        raise ValueError(f"{table}: expected no file, or the table of an earlier run; --overwrite replaces it")
    if overwrite and process.rank == 0:
        for path in existing:
            path.unlink()
    process.wait()
    return existing if resume else []
