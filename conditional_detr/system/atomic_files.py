"""Write files atomically: readers see either the old file or the complete new file."""

import os
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

_UNFINISHED = ".unfinished"
_number = count()


def write_atomically(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files under temporary names, and rename all of them when they are complete.

    An interrupted run leaves the previous files unchanged.

    Args:
        writers: the function that writes each file, by the file's final path, in an existing folder. A function
            receives the temporary path to write to.

    Raises:
        OSError: a file cannot be written.
    """
    unfinished = {path: path.with_name(f".{os.getpid()}-{next(_number)}{_UNFINISHED}") for path in writers}
    try:
        for path, write in writers.items():
            unfinished[path].touch()
            mode = unfinished[path].stat().st_mode  # the user's default mode: safetensors gives only the owner access
            write(unfinished[path])
            unfinished[path].chmod(mode)
        for path, temporary in unfinished.items():
            temporary.replace(path)
    except OSError as error:
        detailed = OSError(f"{path}: cannot be written: {error.strerror or error}")
        detailed.errno = error.errno
        raise detailed from error
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder that no process is writing to."""
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)
