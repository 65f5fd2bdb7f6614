"""Read the annotations in Parquet files as Hugging Face's datasets have them: a row per image, with its bytes.

The columns are ``image``, or another one of image bytes; ``width`` and ``height``; and ``objects``, with ``bbox``,
x0 y0 w h in pixels, and ``category``. Class names are those of the ClassLabel in the schema's metadata.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from conditional_detr.data.coco import Annotations, read_annotations
from conditional_detr.data.formats.content import WHOLE, Collector, split_name
from conditional_detr.data.formats.hugging_face import add_objects, names_in
from conditional_detr.data.formats.reading import recognise
from conditional_detr.data.json_values import Id, shorten_list
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.system.parquet_files import image_bytes, image_column, open_parquet
from conditional_detr.system.storage import absolute, is_file, is_folder, is_remote, path_of, walk

SUFFIX = ".parquet"
_SIZE, _OBJECTS = ("width", "height"), "objects"
_READERS = 8  # threads that read annotations


Contents: TypeAlias = dict[int, bytes | Exception]
"""The bytes of images by the index of the sample, or why they cannot be read."""


class RowGroup(NamedTuple):
    """Rows of a Parquet file that are read together.

    Attributes:
        file: the path or URI of the file.
        position: of the row group in the file.
        first: row of the file, the first of the group.
        samples: indices in the dataset.
        size: bytes of its columns.
    """

    file: str
    position: int
    first: int
    samples: range
    size: int

    def name(self, sample: int) -> str:
        """Return the name of a sample's image: ``FILE#ROW``."""
        return f"{self.file}#{self.first + sample - self.samples.start}"

    def read(self) -> Contents:
        """Return the encoded images; each has the error if the row group cannot be read."""
        try:
            with open_parquet(self.file) as file:
                column = image_column(self.file, file.schema_arrow)
                chunks = file.read_row_group(self.position, columns=[column], use_threads=False).column(0).chunks
                images = [image for chunk in chunks for image in image_bytes(chunk)]
        except Exception as error:  # the type of the error of a damaged file depends on the damage
            message = f"{self.file}: row group {self.position} cannot be read: {error}"
            return {sample: OSError(message) for sample in self.samples}
        missing = "expected the bytes of an image, got null"
        return {
            sample: ValueError(f"{self.name(sample)}: {missing}") if image is None else image
            for sample, image in zip(self.samples, images, strict=True)
        }


class Shards(NamedTuple):
    """A split of a dataset in Parquet files.

    Attributes:
        annotations: the checked annotations; the images' file_names are ``FILE#ROW``, relative to the folder.
        row_groups: where the images are, in the order of the annotations.
    """

    annotations: Annotations
    row_groups: tuple[RowGroup, ...]


class ShardImages(Mapping[Id, bytes]):
    """The encoded images of a dataset in Parquet files, by image id; the last row group is in memory.

    Args:
        shards: the dataset.
    """

    def __init__(self, shards: Shards) -> None:
        self.row_groups = shards.row_groups
        self._indices = {image_id: index for index, image_id in enumerate(shards.annotations.images)}
        self._starts = np.array([group.samples.start for group in shards.row_groups])
        self._last: tuple[int, Contents] = (-1, {})

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Id]:
        return iter(self._indices)

    def __getitem__(self, image_id: Id) -> bytes:
        """Return an encoded image.

        Raises:
            OSError: it cannot be read.
            ValueError: there is none.
        """
        content = self.content(self._indices[image_id])
        if isinstance(content, Exception):
            raise content
        return content

    def content(self, index: int) -> bytes | Exception:
        """Return the encoded image of a sample, or why it cannot be read."""
        position = self.group_of(index)
        if position != self._last[0]:
            self._last = position, self.row_groups[position].read()
        return self._last[1][index]

    def name(self, index: int) -> str:
        """Return the name of a sample's image: ``FILE#ROW``."""
        return self.row_groups[self.group_of(index)].name(index)

    def group_of(self, index: int) -> int:
        """Return the position of the row group of a sample."""
        return int(np.searchsorted(self._starts, index, side="right")) - 1


class _File(NamedTuple):
    """What is read of a file in the beginning: rows and bytes of its groups, annotations, and class names."""

    groups: list[tuple[int, int]]
    table: Any
    names: tuple[str, ...]


def is_parquet(source: str | Path) -> bool:
    """Return whether a path or URI is a Parquet file, or a folder of them and no dataset in another format."""
    name = absolute(str(source))
    if path_of(name).endswith(SUFFIX):
        return is_file(name)
    if not is_remote(name):
        if not is_folder(name):
            return False
        with suppress(ValueError):  # no other format, or several
            recognise(Path(name))
            return False
    return is_folder(name) and next(_walk(name), None) is not None


def find_shards(source: str | Path) -> dict[str, list[str]]:
    """Return the Parquet files of each split, which is a word in their paths below the folder.

    Args:
        source: the path or URI of a folder or a file.

    Raises:
        OSError: there are no Parquet files.
        ValueError: some files have the name of a split, others have not.
    """
    name = absolute(str(source))
    if is_file(name):
        return {WHOLE: [name]}
    start = len(path_of(name).rstrip("/"))
    splits: dict[str, list[str]] = {}
    for file in _walk(name) if is_folder(name) else ():
        splits.setdefault(split_name(path_of(file)[start:]) or WHOLE, []).append(file)
    if not splits:
        raise FileNotFoundError(f"{source}: expected a Parquet file, or a folder with them, got none")
    if WHOLE in splits and len(splits) > 1:
        others = ", ".join(sorted(splits.keys() - {WHOLE}))
        raise ValueError(f"{splits[WHOLE][0]}: expected a split in the file's name, as others have it: {others}")
    return splits


def open_shards(source: str | Path, *, split: str = "train") -> Shards:
    """Read the annotations of a dataset in Parquet files, but not its images.

    Args:
        source: the path or URI of a folder or a file.
        split: train, val or test; files without splits are used as they are.

    Raises:
        OSError: a file cannot be read.
        ValueError: the split is missing, or a file lacks a column or has invalid annotations.
    """
    splits = find_shards(source)
    wanted = WHOLE if WHOLE in splits else split
    if wanted not in splits:
        raise ValueError(f"{source}: expected the split {split}, got {shorten_list(splits)}")
    files = dict(zip(splits[wanted], map_in_threads(_read, splits[wanted], workers=_READERS, depth=64), strict=True))
    name = str(source) if wanted == WHOLE else f"{source} ({wanted})"
    start = 0 if list(files) == [absolute(str(source))] else len(path_of(absolute(str(source))).rstrip("/")) + 1
    collector = Collector(Path(), _class_names(name, files), None)
    groups: list[RowGroup] = []
    count = 0
    for file, read in files.items():
        shown = path_of(file)[start:]
        for row, entry in enumerate(read.table.to_pylist()):
            image_id = collector.add_named_image(f"{shown}#{row}", (entry["height"], entry["width"]))
            add_objects(collector, image_id, entry, f"{file}#{row}")
        first = 0
        for position, (rows, size) in enumerate(read.groups):
            groups.append(RowGroup(file, position, first, range(count, count + rows), size))
            first, count = first + rows, count + rows
    annotations = read_annotations(collector.split(name).content, name=name)
    return Shards(annotations, tuple(group for group in groups if len(group.samples)))


def _walk(folder: str) -> Iterator[str]:
    """Yield the Parquet files in a folder; those whose names begin with "_" or "." are no data."""
    for name in walk(folder):
        path = path_of(name)
        if path.endswith(SUFFIX) and not path.rpartition("/")[2].startswith(("_", ".")):
            yield name


def _read(name: str) -> _File:
    """Read the footer and the annotations of a file."""
    with open_parquet(name) as file:
        schema = file.schema_arrow
        image_column(name, schema)
        if missing := [column for column in (*_SIZE, _OBJECTS) if column not in schema.names]:
            raise ValueError(
                f"{name}: expected the columns {', '.join((*_SIZE, _OBJECTS))}, got {', '.join(schema.names)} without"
                f" {', '.join(missing)}"
            )
        described = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        groups = [(group.num_rows, group.total_byte_size) for group in described]
        try:
            table = file.read(columns=[*_SIZE, _OBJECTS])
        except Exception as error:  # the type of the error of a damaged file depends on the damage
            raise OSError(f"{name}: the annotations cannot be read: {error}") from error
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return _File(groups, table, tuple(_find_names(features.get(_OBJECTS))))


def _find_names(node: Any) -> Sequence[str]:
    """Return the names of the first ClassLabel in described features, which may be nested."""
    if isinstance(node, Mapping):
        if node.get("_type") == "ClassLabel":
            return list(node.get("names") or ())
        node = list(node.values())
    return next((names for part in node if (names := _find_names(part))), ()) if isinstance(node, list) else ()


def _class_names(where: str, files: Mapping[str, _File]) -> dict[int, str]:
    """Return the class names that all files state, or else those that occur."""
    stated = {read.names: name for name, read in files.items()}
    if len(stated) > 1:
        (first, file), (second, other) = list(stated.items())[:2]
        raise ValueError(
            f"{where}: expected the same class names in all files, got {shorten_list(first)} in {file}, and"
            f" {shorten_list(second)} in {other}"
        )
    if names := next(iter(stated)):
        return dict(enumerate(names))
    return names_in(where, (entry for read in files.values() for entry in read.table.to_pylist()))
