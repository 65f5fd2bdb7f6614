"""Writing files so that nobody ever meets half of one."""

import os
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

_UNFINISHED = ".unfinished"
_number = count()


def write_atomically(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files beside their places, and move them there when all are whole.

    A run that breaks off leaves what was there.

    Args:
        writers: what writes each file, at the path it is given; by the file's place, in a folder that is there.

    Raises:
        OSError: a file cannot be written.
    """
    unfinished = {path: path.with_name(f".{os.getpid()}-{next(_number)}{_UNFINISHED}") for path in writers}
    try:
        for path, write in writers.items():
            unfinished[path].touch()
            mode = unfinished[path].stat().st_mode  # the user's default: safetensors would let nobody else read
            write(unfinished[path])
            unfinished[path].chmod(mode)
        for path, written in unfinished.items():
            written.replace(path)
    except OSError as error:
        named = OSError(f"{path}: cannot be written: {error.strerror or error}")
        named.errno = error.errno
        raise named from error
    finally:
        for written in unfinished.values():
            written.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed had not finished writing, in a folder where nobody writes now."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)
