"""Units of work: lists of image files, row groups of Parquet files, and WebDataset shards."""

import fnmatch
import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from conditional_detr.inference.listing import is_image_name, list_images, walk_folder
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.system.parquet_files import image_bytes, image_column, open_parquet
from conditional_detr.system.storage import absolute, is_file, is_folder, is_remote, locate, path_of, walk

_PARQUET, _TAR = ".parquet", (".tar", ".tar.gz", ".tgz")
RESULTS = re.compile(r"part=([0-9a-f]{2})/(\1[0-9a-f]{30})\.parquet")
"""Results of a unit, below the folder of results."""

_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.unfinished/")
_ROWS = 16  # of a Parquet file that are read together
_READERS = 8  # threads that read the footers of Parquet files


class Unit(NamedTuple):
    """Images that are detected on together, and whose results are one file.

    Attributes:
        names: paths or URIs of image files; or of one Parquet file or WebDataset shard.
        row_group: index of the row group in a Parquet file; -1: all of it, and for other files.
    """

    names: tuple[str, ...]
    row_group: int = -1

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that stand for these images, the name of the unit's results."""
        text = json.dumps([*self.names, self.row_group])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Source(NamedTuple):
    """An image of a unit.

    Attributes:
        key: the name of its results: the path or URI of its file; ``FILE#ROW`` in a Parquet file, ``FILE#MEMBER`` in
            a WebDataset shard.
        image: its bytes, or why they cannot be read; None: the key is its file.
    """

    key: str
    image: bytes | Exception | None = None


def absolute_input(name: str) -> str:
    """Return an input as ``storage.absolute`` does; the working folder before a glob is no part of the pattern."""
    if not glob.has_magic(name) or _is_web(name) or is_remote(name) or os.path.lexists(name):
        return absolute(name)
    return absolute(os.path.join(glob.escape(os.getcwd()), name))  # noqa: PTH109, PTH118


def list_units(arguments: Sequence[str], *, output: str, size: int) -> Iterator[Unit]:
    """List units of work, in memory that does not grow with the number of images in one folder tree.

    Names of several arguments are kept, so that no image is listed twice.

    Args:
        arguments: image files, folders (with all folders below), globs, ``.parquet`` files and WebDataset shards, by
            path or URI, as :func:`absolute_input` returns them; http(s) URLs. Folders and globs do not list shards
            whose names begin with "_" or ".", nor results of bulk detections.
        output: the folder of results, which is left out.
        size: largest number of image files in a unit.

    Raises:
        OSError: a folder cannot be listed.
        ValueError: nothing was found, or a Parquet file has no images.
    """
    names: Iterable[str] = chain.from_iterable(_list_names(argument, output) for argument in arguments)
    if len(arguments) > 1:
        names = dict.fromkeys(names)
    for units in map_in_threads(_units_of, _grouped(names, size), workers=_READERS, depth=2 * _READERS):
        yield from units


def read_unit(unit: Unit) -> Iterator[Source]:
    """Yield the images of a unit; what cannot be read, also of a damaged shard, is one with its error."""
    name = unit.names[0]
    if not _is_shard(name):
        yield from map(Source, unit.names)
        return
    read_shard = _read_rows if _is_parquet(name) else _read_tar
    empty = True
    try:
        for source in read_shard(unit):
            empty = False
            yield source
    except Exception as error:  # the type of the error of a damaged shard depends on its format
        yield Source(name, OSError(f"{name}: the shard cannot be read: {error}"))
    else:
        if empty:
            yield Source(name, ValueError(f"{name}: expected images in the shard, found none"))


def _list_names(argument: str, output: str) -> Iterator[str]:
    """Yield the image files and shards that an argument stands for."""
    remote, magic = is_remote(argument), glob.has_magic(path_of(argument))
    if _is_web(argument):
        names = iter((argument,))
    elif is_folder(argument):
        files = walk(argument) if remote else walk_folder(argument, os.path.realpath(output))
        names = (name for name in files if is_image_name(path_of(name)) or _is_input(name))
    elif magic and not remote and not os.path.lexists(argument):
        listed = (listed.image for listed in list_images([argument], output=output).images)
        names = (name for name in listed if not _is_shard(name) or _is_input(name))
    elif magic and remote and not is_file(argument):
        names = (name for name in _matches(argument) if not _is_shard(name) or _is_input(name))
    else:
        names = iter((argument,))
    first = next(names, None)
    if first is None:
        raise ValueError(f"{argument}: expected images or shards, found none")
    yield first
    yield from names


def _matches(pattern: str) -> Iterator[str]:
    """Yield the files in an object store that match a glob, in which ``*`` also stands for ``/``."""
    path = path_of(pattern)
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    folder = "/".join(parts[:fixed]) + pattern[len(path) :]
    return (name for name in walk(folder) if fnmatch.fnmatchcase(path_of(name), path))


def _is_shard(name: str) -> bool:
    return path_of(name).endswith((_PARQUET, *_TAR)) and not _is_web(name)


def _is_parquet(name: str) -> bool:
    return _is_shard(name) and path_of(name).endswith(_PARQUET)


def _is_input(name: str) -> bool:
    """Return whether a file is a shard of images, and none that a bulk detection has written."""
    hidden = name.rpartition("/")[2].startswith(("_", "."))
    return _is_shard(name) and not hidden and not RESULTS.search(name) and not _UNFINISHED.search(name)


def _is_web(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def _grouped(names: Iterable[str], size: int) -> Iterator[list[str]]:
    """Yield shards one by one, and image files in lists."""
    images: list[str] = []
    for name in names:
        if _is_shard(name):
            yield [name]
            continue
        images.append(name)
        if len(images) == size:
            yield images
            images = []
    if images:
        yield images


def _units_of(names: list[str]) -> list[Unit]:
    """Return the units of image files or of a shard; those of a Parquet file are in its footer."""
    if not _is_parquet(names[0]):
        return [Unit(tuple(names))]
    try:
        with open_parquet(names[0]) as file:
            image_column(names[0], file.schema_arrow)
            groups = range(file.num_row_groups)
            return [Unit(tuple(names), group) for group in groups] or [Unit(tuple(names))]
    except (OSError, UnicodeError):  # it may pass; otherwise reading the unit gives it, too
        return [Unit(tuple(names))]


def _read_rows(unit: Unit) -> Iterator[Source]:
    """Yield the images of a row group, or of all."""
    (name,) = unit.names
    with open_parquet(name) as file:
        column = image_column(name, file.schema_arrow)
        groups = [unit.row_group] if unit.row_group >= 0 else [*range(file.num_row_groups)]
        row = sum(file.metadata.row_group(i).num_rows for i in range(unit.row_group))
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=[column]):
            for value in image_bytes(batch.column(0)):
                missing = ValueError(f"{name}#{row}: expected the bytes of an image, got null")
                yield Source(f"{name}#{row}", missing if value is None else value)
                row += 1


class _Member(tarfile.TarInfo):
    """Header of a member, whose damage is an error: tarfile takes it, and a file that was cut, for the end."""

    @classmethod
    def fromtarfile(cls, shard: tarfile.TarFile) -> "_Member":
        """Read the next header; raise ReadError for any but a valid one or the mark of the end."""
        offset = shard.offset
        try:
            return super().fromtarfile(shard)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # it is there
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"expected a header or the mark of the end at byte {offset}: {error}") from error


def _read_tar(unit: Unit) -> Iterator[Source]:
    """Yield the images of a WebDataset shard, from its beginning to its end."""
    (name,) = unit.names
    filesystem, path = locate(name)
    with (
        filesystem.open_input_stream(path, compression=None) as stream,
        tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as shard,
    ):
        for member in shard:
            if member.isfile() and is_image_name(member.name) and (file := shard.extractfile(member)) is not None:
                yield Source(f"{name}#{member.name}", file.read())
