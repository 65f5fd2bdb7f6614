"""Write files atomically: readers see either the old files or the complete new ones.

Files are written to a temporary folder beside their targets and renamed when all are complete. Files that belong
together, such as weights and their configuration, are renamed one after the other. A journal that lists the renames
is written before the first and removed after the last, so that :func:`recover` completes what a killed process has
begun. Locks, which the system releases when a process ends, keep writers, readers and cleaners of a folder apart.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.unfinished")
_JOURNAL = ".conditional_detr.journal"


def encode_text(text: str) -> bytes:
    """Return text, such as JSON, in UTF-8; a lone surrogate becomes its escape in JSON."""
    return text.encode("utf-8", "backslashreplace")


def write_atomically(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files in a temporary folder, and rename all of them when they are complete and on the disk.

    An interrupted run leaves the previous files unchanged, or is completed by :func:`recover`.

    Args:
        writers: the function that writes each file, by the file's final path; all in one existing folder. A function
            receives the temporary path to write to.

    Raises:
        OSError: a file cannot be written.
    """
    path = next(iter(writers))
    assert all(target.parent == path.parent for target in writers)
    try:
        with unfinished_folder(path.parent) as temporary:
            for path, write in writers.items():
                write(temporary / path.name)
            publish(temporary, {path.name: path.name for path in writers})
    except OSError as error:
        detailed = OSError(f"{path}: cannot be written: {error.strerror or error}")
        detailed.errno = error.errno
        raise detailed from error


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder for files that are not complete yet, and remove it in the end.

    Its name cannot be foreseen. It is locked, so that :func:`remove_unfinished` leaves it alone.

    Args:
        folder: where the files will be moved by :func:`publish`.

    Raises:
        OSError: the folder cannot be made.
    """
    while True:
        path = folder / f".{secrets.token_hex(8)}.unfinished"
        path.mkdir(mode=0o700)
        with _locked(path) as locked:
            if locked is False or not path.exists():  # taken for one of a killed process before it was locked
                continue
            try:
                yield path
            finally:
                if _files_in_journal(folder)[0] != path.name:  # otherwise recover() needs the files
                    shutil.rmtree(path, ignore_errors=True)
            return


def publish(temporary: Path, names: Mapping[str, str]) -> None:
    """Move complete files out of their temporary folder, when they are on the disk.

    They get the user's default mode: some libraries give access only to the owner.

    Args:
        temporary: the folder of :func:`unfinished_folder`.
        names: the final name of each file, by its temporary name.

    Raises:
        OSError: a file cannot be renamed.
    """
    folder, draft = temporary.parent, temporary / _JOURNAL
    draft.touch()
    mode = draft.stat().st_mode
    for name in names:
        (temporary / name).chmod(mode)
        _flush(temporary / name)
    with _locked(folder, wait=True):
        _complete(folder)  # of another process, which was killed
        if len(names) > 1:
            draft.write_text(json.dumps({"folder": temporary.name, "files": dict(names)}))
            _flush(draft)
            draft.replace(folder / _JOURNAL)
            _complete(folder)
        else:
            for name, target in names.items():
                (temporary / name).replace(folder / target)
        _flush(folder)


def recover(folder: Path) -> None:
    """Complete the renames that a killed process has begun in a folder; do nothing if there are none.

    Raises:
        OSError: the files cannot be renamed, or the journal is damaged.
    """
    if (folder / _JOURNAL).exists():
        with consistent(folder):
            pass


@contextmanager
def consistent(folder: Path) -> Iterator[None]:
    """Complete what a killed process has begun, and keep writers from a folder while its files are opened.

    Raises:
        OSError: as :func:`recover`.
    """
    with _locked(folder, wait=True):
        _complete(folder)
        yield


def remove_unfinished(folder: Path) -> None:
    """Complete what killed processes have begun in a folder, and remove their temporary files."""
    recover(folder)
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name):
            with _locked(path) as locked:
                if locked:
                    shutil.rmtree(path, ignore_errors=True)


def _complete(folder: Path) -> None:
    """Do the renames of a folder's journal, if there is one, and remove it."""
    temporary, names = _files_in_journal(folder)
    if temporary is None:
        return
    for name, target in names.items():
        with suppress(FileNotFoundError):  # renamed before the process was killed
            (folder / temporary / name).replace(folder / target)
    _flush(folder)
    (folder / _JOURNAL).unlink(missing_ok=True)


def _files_in_journal(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Return the temporary folder and the renames in a folder's journal; None if there is no journal.

    Raises:
        OSError: the journal cannot be read, or its renames leave the folder.
    """
    journal = folder / _JOURNAL
    try:
        content = json.loads(journal.read_bytes())
        temporary, names = content["folder"], content["files"]
        parts = [*names, *names.values()]
    except (FileNotFoundError, NotADirectoryError):
        return None, {}
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise OSError(f"{journal}: cannot be read: {error!r}") from error
    plain = all(isinstance(name, str) and Path(name).name == name for name in (temporary, *parts))
    if not (plain and _UNFINISHED.fullmatch(temporary)):
        raise OSError(f"{journal}: expected a temporary folder and file names, got {content!r}")
    return temporary, names


@contextmanager
def _locked(folder: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder while the context is active.

    Yields:
        Whether it is locked; None if the system or the file system has no such locks. With ``wait``, another process
        is waited for.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        yield False if isinstance(error, FileNotFoundError) else None
        return
    try:
        locked: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            locked = False
        except OSError:  # a network file system
            locked = None
        yield locked
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Write a file or folder to the disk, where the system allows it."""
    with suppress(PermissionError, IsADirectoryError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
