"""Files on this machine and in object stores, by path or URI, through the file systems of pyarrow."""

import os
import posixpath
import re
import urllib.request
from collections.abc import Callable, Iterator
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
    found = _URI.fullmatch(folder)
    options = (found and found[4]) or ""
    return posixpath.join(folder.removesuffix(options) if options else folder, *names) + options


def walk(folder: str) -> Iterator[str]:
    """Yield the names of the files in a folder and below it; the entries of one branch are in memory.

    Raises:
        OSError: the folder cannot be listed.
    """
    from pyarrow.fs import FileSelector, FileType

    filesystem, root = locate(folder)
    todo = [root]
    while todo:
        entries = filesystem.get_file_info(FileSelector(todo.pop()))
        todo += sorted((entry.path for entry in entries if entry.type == FileType.Directory), reverse=True)
        for path in sorted(entry.path for entry in entries if entry.type == FileType.File):
            yield child(folder, path[len(root) :].lstrip("/"))


def is_file(name: str) -> bool:
    """Return whether there is a file of this name."""
    filesystem, path = locate(name)
    return bool(filesystem.get_file_info(path).is_file)


def is_folder(name: str) -> bool:
    """Return whether there is a folder of this name."""
    from pyarrow.fs import FileType

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

    Object stores show a file once it is complete; here it is renamed then.

    Args:
        name: its path or URI.
        write_to: writes the content to an open binary file.

    Raises:
        OSError: it cannot be written.
    """
    if is_remote(name):
        filesystem, path = locate(name)
        if filesystem.type_name not in _WITHOUT_FOLDERS:
            filesystem.create_dir(posixpath.dirname(path))
        with filesystem.open_output_stream(path, compression=None) as file:
            write_to(file)
        return

    def write_here(unfinished: Path) -> None:
        with unfinished.open("wb") as file:
            write_to(file)

    Path(name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically({Path(name): write_here})


def remove(name: str) -> None:
    """Remove a file; do nothing if there is none."""
    if is_file(name):
        filesystem, path = locate(name)
        filesystem.delete_file(path)
