"""Read the files of detections that :mod:`conditional_detr.inference.result_writers` writes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES = "detections"
"""File name of JSON Lines, to which a process of several adds its number, without the suffix."""

_LINE_NAMES = rf"{LINES}(-\d+-of-\d+)?\.jsonl"


def line_files(folder: Path) -> list[Path]:
    """Return the JSON Lines files that runs with any number of processes have written; other names are the user's."""
    return sorted(path for path in folder.glob(f"{LINES}*.jsonl") if re.fullmatch(_LINE_NAMES, path.name))


def read_written(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the results of each image in a JSON Lines file, or in the files of either kind in a folder.

    Returns:
        An iterator of (file and line, for messages; the results).

    Raises:
        OSError: a file does not exist or cannot be read.
        ValueError: a file of another form or that ends within a line; a folder without results or with both kinds.
    """
    lines = line_files(path) if path.is_dir() else [path]
    files = sorted(path.rglob("*.json"))
    if bool(lines) == bool(files):
        both = "both kinds" if files else "neither"
        raise ValueError(f"{path}: expected results of detect, JSON files or {LINES}.jsonl, got {both}")
    for part in lines:
        for number, content in enumerate(read_lines(part, finished=True), 1):
            yield f"{part}, line {number}", content
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            check_form(content)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}: expected the detections of one image as JSON") from error
        yield str(file), content


def read_lines(path: Path, *, finished: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the results in a JSON Lines file; unless it is finished, another process may be writing the last line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                if finished:
                    raise ValueError(f"{path}, line {number}: expected a whole line; detect --resume finishes it")
                return
            try:
                content = json.loads(line)
                check_form(content)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: expected the detections of one image as JSON") from error
            yield content


def check_form(content: Any) -> None:
    """Raise KeyError or TypeError unless this is the result of an image."""
    if not isinstance(content["image"], str) or not isinstance(content["detections"], list):
        raise TypeError("expected the name of an image and a list of detections")


def drop_broken_line(path: Path) -> None:
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
