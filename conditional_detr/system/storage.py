"""Files on this machine and in object stores, by path or URI, through the file systems of pyarrow."""

import os
import posixpath
import re
import secrets
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from conditional_detr.system.atomic_files import write_atomically

_URI = re.compile(r"([a-z][a-z0-9+.-]+)://([^/?]*)/?(.*?)(\?[^?/]*=[^?/]*)?", re.IGNORECASE | re.DOTALL)
_WITHOUT_FOLDERS = ("s3", "gcs", "abfs")  # types of file systems


def is_remote(name: str) -> bool:
    """Return whether a name is a URI of an object store: no path, and no address on the web."""
    found = _URI.fullmatch(name)
    return found is not None and found[1].lower() not in ("http", "https")


def path_of(name: str) -> str:
    """Return a name without the options of a URI, such as ``?region=...``."""
    found = _URI.fullmatch(name)
    options = (found and found[4]) or ""
    return name.removesuffix(options) if options else name


def absolute(name: str) -> str:
    """Return a path, also of a ``file://`` URI, as processes in other working folders need it; keep other URIs."""
    if name.lower().startswith("file://"):
        name = urllib.request.url2pathname(name[len("file://") :])
    return name if _URI.fullmatch(name) else os.path.abspath(name)  # noqa: PTH100  # links stay


def locate(name: str) -> tuple[Any, str]:
    """Return the ``pyarrow.fs.FileSystem`` of a file or folder, and the path in it.

    Args:
        name: a path; or a URI such as ``s3://bucket/folder``, ``gs://...``, ``hf://datasets/owner/name`` or
            ``fsspec+PROTOCOL://...``. Options of pyarrow, such as ``endpoint_override``, are after "?".

    Raises:
        ImportError: the package of the file system is not installed.
        OSError: the file system cannot be reached.
        ValueError: there is no such file system.
    """
    from pyarrow.fs import LocalFileSystem

    if not is_remote(name):
        return LocalFileSystem(), name
    scheme, host, path, options = _URI.fullmatch(name).groups("")  # type: ignore[union-attr]
    filesystem, base = _open(f"{scheme.lower()}://{host or '/'}{options}")
    return filesystem, posixpath.join(base, path)  # names in stores may have characters that a URI would quote


@lru_cache
def _open(root: str) -> tuple[Any, str]:
    """Return a file system and the path of its root."""
    from pyarrow.fs import FileSystem

    try:
        return FileSystem.from_uri(root)
    except ValueError as error:
        raise ValueError(f"{root}: expected a file system of pyarrow, or fsspec+PROTOCOL://: {error}") from error


def child(folder: str, *names: str) -> str:
    """Return the name of a file below a folder that is given by path or URI."""
    path = path_of(folder)
    return posixpath.join(path, *names) + folder[len(path) :]


def walk(folder: str) -> Iterator[str]:
    """Yield the names of the files in a folder and below it; the entries of one branch are in memory.

    Links to folders are followed on this machine; each folder is listed once.

    Raises:
        OSError: the folder cannot be listed.
    """
    from pyarrow.fs import FileSelector, FileType

    if not is_remote(folder):
        yield from _walk_here(folder)
        return
    filesystem, root = locate(folder)
    todo = [root]
    while todo:
        entries = filesystem.get_file_info(FileSelector(todo.pop()))
        todo += sorted((entry.path for entry in entries if entry.type == FileType.Directory), reverse=True)
        for path in sorted(entry.path for entry in entries if entry.type == FileType.File):
            yield child(folder, path[len(root) :].lstrip("/"))


def _walk_here(folder: str) -> Iterator[str]:
    """Do as :func:`walk` on this machine, where names may be bytes that are no UTF-8, which pyarrow has not."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for current, below, files in os.walk(folder, followlinks=True, onerror=fail):
        if (real := os.path.realpath(current)) in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        for file in sorted(files):
            yield child(folder, Path(current, file).relative_to(folder).as_posix())


def is_file(name: str) -> bool:
    """Return whether there is a file of this name, which need not be a valid one."""
    if not is_remote(name):
        return os.path.isfile(name)  # noqa: PTH113  # Path raises errors for names that are too long
    filesystem, path = locate(name)
    return bool(filesystem.get_file_info(path).is_file)


def is_folder(name: str) -> bool:
    """Return whether there is a folder of this name, which need not be a valid one."""
    from pyarrow.fs import FileType

    if not is_remote(name):
        return os.path.isdir(name)  # noqa: PTH112  # as above
    filesystem, path = locate(name)
    return bool(filesystem.get_file_info(path).type == FileType.Directory)


def read(name: str) -> bytes:
    """Return the content of a file; raise OSError if it cannot be read."""
    filesystem, path = locate(name)
    try:
        with filesystem.open_input_stream(path, compression=None) as file:
            return bytes(file.read())
    except OSError as error:
        raise OSError(f"{name}: cannot be read: {error}") from error


def write(name: str, write_to: Callable[[Any], object]) -> None:
    """Write a file that is seen complete or not at all.

    Object stores show a file once it is complete; in other file systems it is renamed then.

    Args:
        name: its path or URI.
        write_to: writes the content to an open binary file.

    Raises:
        OSError: it cannot be written.
    """
    if is_remote(name):
        _write_remote(name, write_to)
        return

    def write_here(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            write_to(file)

    Path(name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically({Path(name): write_here})


def _write_remote(name: str, write_to: Callable[[Any], object]) -> None:
    filesystem, path = locate(name)
    if filesystem.type_name in _WITHOUT_FOLDERS:
        with filesystem.open_output_stream(path, compression=None) as file:
            write_to(file)
        return
    folder = posixpath.dirname(path)
    filesystem.create_dir(folder)
    unfinished = posixpath.join(folder, f".{secrets.token_hex(8)}.unfinished")
    try:
        with filesystem.open_output_stream(unfinished, compression=None) as file:
            write_to(file)
        remove(name)  # HDFS does not move to an existing file
        filesystem.move(unfinished, path)
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(unfinished)
        raise


def remove(name: str) -> None:
    """Remove a file; do nothing if there is none."""
    if is_file(name):
        filesystem, path = locate(name)
        filesystem.delete_file(path)
