"""Write files atomically: readers see either the old files or the complete new ones.

Files that belong together, such as weights and their configuration, are renamed one after the other. A journal that
lists the renames is written before the first and removed after the last, so that :func:`recover` completes what a
killed process has begun.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path

_UNFINISHED = ".unfinished"
_JOURNAL = ".conditional_detr.journal"


def write_atomically(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files under temporary names, and rename all of them when they are complete and on the disk.

    An interrupted run leaves the previous files unchanged, or is completed by :func:`recover`.

    Args:
        writers: the function that writes each file, by the file's final path; all in one existing folder. A function
            receives the temporary path to write to.

    Raises:
        OSError: a file cannot be written.
    """
    path = next(iter(writers))
    folder = path.parent
    assert all(target.parent == folder for target in writers)
    renames: dict[Path, Path] = {}
    try:
        recover(folder)
        for path, write in writers.items():
            renames[path] = temporary = _make_temporary(folder)
            mode = temporary.stat().st_mode  # the user's default mode: safetensors gives only the owner access
            write(temporary)
            temporary.chmod(mode)
            _flush(temporary)
        if len(renames) > 1:
            journal = _make_temporary(folder)
            renames[folder / _JOURNAL] = journal
            journal.write_text(json.dumps({temporary.name: target.name for target, temporary in renames.items()}))
            _flush(journal)
            journal.replace(folder / _JOURNAL)
            del renames[folder / _JOURNAL]
        # with a journal, a reader may have renamed some of them already
        renamed_before = suppress(FileNotFoundError) if len(renames) > 1 else nullcontext()
        for path, temporary in renames.items():
            with renamed_before:
                temporary.replace(path)
        _flush(folder)
        if len(renames) > 1:
            (folder / _JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        detailed = OSError(f"{path}: cannot be written: {error.strerror or error}")
        detailed.errno = error.errno
        raise detailed from error
    finally:
        if not (folder / _JOURNAL).exists():  # otherwise recover() needs them
            for temporary in renames.values():
                temporary.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Complete the renames that a killed process has begun in a folder; do nothing if there are none.

    Raises:
        OSError: the files cannot be renamed.
    """
    journal = folder / _JOURNAL
    try:
        renames = json.loads(journal.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise OSError(f"{journal}: cannot be read: {error}") from error
    for temporary, target in _checked(renames, journal):
        with suppress(FileNotFoundError):  # renamed before the process was killed, or by another reader
            (folder / temporary).replace(folder / target)
    journal.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder that no process is writing to."""
    recover(folder)
    for path in folder.glob(f".*{_UNFINISHED}"):
        path.unlink(missing_ok=True)


def _checked(renames: object, journal: Path) -> Iterable[tuple[str, str]]:
    """Return the renames of a journal; raise OSError unless all of them stay in its folder."""
    if not isinstance(renames, dict):
        raise OSError(f"{journal}: expected temporary names and file names, got {renames!r}")
    items = [*renames.items()]
    for temporary, target in items:
        plain = all(isinstance(name, str) and Path(name).name == name for name in (temporary, target))
        if not (plain and temporary.endswith(_UNFINISHED)):
            raise OSError(f"{journal}: expected temporary names and file names, got {temporary!r}: {target!r}")
    return items


def _make_temporary(folder: Path) -> Path:
    """Create an empty file under a name that nobody can foresee, and return its path."""
    path = folder / f".{secrets.token_hex(8)}{_UNFINISHED}"
    exclusive = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)  # Windows has no O_NOFOLLOW
    os.close(os.open(path, exclusive, 0o666))
    return path


def _flush(path: Path) -> None:
    """Write a file or folder to the disk, where the system allows it."""
    with suppress(PermissionError, IsADirectoryError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
