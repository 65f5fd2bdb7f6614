"""Writing files so that nobody ever meets half of one."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path


def write_whole(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files beside their places, and move them there when all are whole.

    A run that breaks off leaves what was there.

    Args:
        writers: what writes each file, at the path it is given; by the file's place, in a folder that is there.

    Raises:
        OSError: a file cannot be written.
    """
    unfinished = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in writers}
    try:
        for path, write in writers.items():
            write(unfinished[path])
        for path, written in unfinished.items():
            written.replace(path)
    finally:
        for written in unfinished.values():
            written.unlink(missing_ok=True)
