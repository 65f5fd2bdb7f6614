"""Decide which files may be written: an input never, an existing file only if this program wrote it or on request."""

import os
from collections.abc import Iterable
from pathlib import Path

from conditional_detr.system.paths import expand_home


def check_output(
    path: str | Path, *, inputs: Iterable[str | Path] = (), overwrite: bool = False, ours: bool = False
) -> None:
    """Check that a file may be written.

    Args:
        path: the file.
        inputs: files and folders that are read. A folder protects all files in it.
        overwrite: whether an existing file may be replaced.
        ours: whether an existing file was written by this program for the same input.

    Raises:
        OSError: the folder of the file does not exist, the path is a folder, or the file exists and may not be
            replaced.
        ValueError: the file is an input.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise NotADirectoryError(f"{path}: expected a file in an existing folder, got {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, got a folder")
    if not os.path.lexists(path):
        return
    for entry in map(expand_home, inputs):
        if is_same_file(path, entry) or _is_below(path, entry):
            raise ValueError(f"{path}: expected a file to write, got an input")
    if not (overwrite or ours):
        raise FileExistsError(f"{path}: already exists; set overwrite, or --overwrite, to replace it")


def check_output_folder(folder: Path) -> None:
    """Raise NotADirectoryError if a folder to write to cannot be made, because a file is in its place or above it."""
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not present.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder to write to, got the file {present}")


def is_same_file(first: str | Path, second: str | Path) -> bool:
    """Return whether two paths are the same existing file, also through links."""
    try:
        return Path(first).samefile(second)
    except (OSError, ValueError):
        return False


def file_ids(paths: Iterable[str | Path]) -> dict[tuple[int, int], str]:
    """Return the paths of existing files by device and inode, which two paths of one file share."""
    found = {}
    for path in paths:
        try:
            state = os.stat(path)  # noqa: PTH116  # a Path each would take most of the time
        except (OSError, ValueError):
            continue
        found[state.st_dev, state.st_ino] = str(path)
    return found


def _is_below(path: Path, folder: Path) -> bool:
    """Return whether a path is an existing folder or in it, also through links."""
    return folder.is_dir() and path.resolve().is_relative_to(folder.resolve())
