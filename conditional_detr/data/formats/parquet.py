"""Read the annotations in Parquet files as Hugging Face's datasets have them: a row per image, with its bytes.

The columns are ``image``, or another one of image bytes; ``width`` and ``height``; and ``objects``, with ``bbox``,
x0 y0 w h in pixels, and ``category``. Class names are those of the ClassLabel in the schema's metadata.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from conditional_detr.data.coco import read_annotations
from conditional_detr.data.formats.content import WHOLE, Collector, split_name
from conditional_detr.data.formats.hugging_face import add_objects, category_key, names_in
from conditional_detr.data.formats.reading import recognise
from conditional_detr.data.json_values import shorten_list
from conditional_detr.data.row_groups import RowGroup, Shards
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.system.atomic_files import recover
from conditional_detr.system.parquet_files import check_pyarrow, image_column, open_parquet
from conditional_detr.system.storage import absolute, is_file, is_folder, is_remote, path_of, walk

SUFFIX = ".parquet"
_SIZE, _OBJECTS = ("width", "height"), "objects"
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.parquet")
_READERS = 8  # threads that read annotations


class _File(NamedTuple):
    """What is read of a file in the beginning: its footer, annotations, and class names."""

    footer: Any
    table: Any
    names: tuple[str, ...]


def is_parquet(source: str | Path) -> bool:
    """Return whether a path or URI is a Parquet file, or a folder of them and no dataset in another format."""
    name = absolute(str(source))
    if path_of(name).endswith(SUFFIX) and is_file(name):
        return True
    if not is_folder(name):
        return False
    if not is_remote(name):
        with suppress(ValueError):  # no other format, or several
            recognise(Path(name))
            return False
    return next(_walk(name), None) is not None


def find_shards(source: str | Path) -> dict[str, list[str]]:
    """Return the Parquet files of each split, which is a word in the file's name, or else in the nearest folder's.

    Args:
        source: the path or URI of a folder or a file.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        OSError: there are no Parquet files, or files of those that are numbered, ``00000-of-00002``, are missing.
        ValueError: some files have the name of a split, others have not; or the splits are in several folders, as of
            several configurations of a dataset.
    """
    check_pyarrow()
    name = absolute(str(source))
    if is_file(name):
        return {WHOLE: [name]}
    if not is_remote(name):
        recover(Path(name))
    start = len(path_of(name).rstrip("/"))
    splits: dict[str, list[str]] = {}
    folders: set[str] = set()
    for file in _walk(name) if is_folder(name) else ():
        folder, split = _split_of(path_of(file)[start:].lstrip("/"))
        splits.setdefault(split or WHOLE, []).append(file)
        folders.update({folder} if split else ())
    if not splits:
        raise FileNotFoundError(f"{source}: expected a Parquet file, or a folder with them, got none")
    if WHOLE in splits and len(splits) > 1:
        others = ", ".join(sorted(splits.keys() - {WHOLE}))
        raise ValueError(f"{splits[WHOLE][0]}: expected a split in the file's name, as others have it: {others}")
    if len(folders) > 1:
        got = shorten_list(sorted(folder or "." for folder in folders))
        raise ValueError(f"{source}: expected the splits in one folder, got {got}; give the one to use")
    for files in splits.values():
        _check_numbers(files)
    return splits


def _split_of(path: str) -> tuple[str, str | None]:
    """Return the folder of a split, and its name, of a path below the folder of a dataset; None: it has no split."""
    parts = path.split("/")
    for i in range(len(parts) - 1, -1, -1):
        if found := split_name(parts[i]):
            return "/".join(parts[:i]), found
    return "", None


def _check_numbers(files: Sequence[str]) -> None:
    """Raise FileNotFoundError if files are missing of those whose names end in the number of each and of all."""
    numbers: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if found := _NUMBERED.fullmatch(path_of(file)):
            numbers.setdefault((found[1], int(found[3])), set()).add(int(found[2]))
    for (start, total), present in numbers.items():
        if missing := [i for i in range(total) if i not in present]:
            names = shorten_list((f"{i:05}-of-{total:05}{SUFFIX}" for i in missing), 3)
            raise FileNotFoundError(f"{start}: expected {total} files, got {len(present)}, without {names}")


def open_shards(source: str | Path, *, split: str = "train") -> Shards:
    """Read the annotations of a dataset in Parquet files, but not its images.

    Args:
        source: the path or URI of a folder or a file.
        split: train, val or test; files without splits are used as they are.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        OSError: a file cannot be read.
        ValueError: the split is missing, or a file lacks a column or has invalid annotations.
    """
    splits = find_shards(source)
    wanted = WHOLE if WHOLE in splits else split
    if wanted not in splits:
        raise ValueError(f"{source}: expected the split {split}, got {shorten_list(splits)}")
    files = dict(zip(splits[wanted], _read_all(splits[wanted]), strict=True))
    name = str(source) if wanted == WHOLE else f"{source} ({wanted})"
    start = 0 if list(files) == [absolute(str(source))] else len(path_of(absolute(str(source))).rstrip("/")) + 1
    others = [file for split_of, found in splits.items() if split_of != wanted for file in found]
    collector = Collector(Path(), _class_names(name, files, others), None)
    groups: list[RowGroup] = []
    count = 0
    for file, read in files.items():
        shown = path_of(file)[start:]
        for row, entry in enumerate(read.table.to_pylist()):
            image_id = collector.add_named_image(f"{shown}#{row}", (entry["height"], entry["width"]))
            add_objects(collector, image_id, entry, f"{file}#{row}")
        first = 0
        for position in range(read.footer.num_row_groups):
            rows = read.footer.row_group(position).num_rows
            groups.append(RowGroup(file, position, first, range(count, count + rows), read.footer))
            first, count = first + rows, count + rows
    annotations = read_annotations(collector.split(name).content, name=name)
    return Shards(annotations, tuple(group for group in groups if len(group.samples)))


def _walk(folder: str) -> Iterator[str]:
    """Yield the Parquet files in a folder; files and folders whose names begin with "_" or "." are no data."""
    start = len(path_of(folder).rstrip("/"))
    for name in walk(folder):
        path = path_of(name)[start:].lstrip("/")
        if path.endswith(SUFFIX) and not any(part.startswith(("_", ".")) for part in path.split("/")):
            yield name


def _read_all(names: Sequence[str]) -> Iterator[_File]:
    """Read the footers and the annotations of files in threads."""
    return map_in_threads(_read, names, workers=_READERS, depth=2 * _READERS)


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
        try:
            table = file.read(columns=[*_SIZE, _OBJECTS])
        except Exception as error:  # the type of the error of a damaged file depends on the damage
            raise OSError(f"{name}: the annotations cannot be read: {error}") from error
        names = _stated_names(name, (schema.metadata or {}).get(b"huggingface"))
        return _File(file.metadata, table, names)


def _stated_names(name: str, metadata: bytes | None) -> tuple[str, ...]:
    """Return the names of the categories' ClassLabel, which ``datasets`` describes in a file's metadata."""
    if metadata is None:
        return ()
    try:
        described = json.loads(metadata)
    except ValueError as error:
        raise ValueError(
            f"{name}: expected JSON in the metadata of huggingface, got something else: {error}"
        ) from error
    for key in ("info", "features", _OBJECTS):
        described = described.get(key) if isinstance(described, Mapping) else None
    return _names_of_categories(described)


def _names_of_categories(node: Any) -> tuple[str, ...]:
    """Return the names of the ClassLabel of a feature called category or the like, at any depth."""
    if isinstance(node, Mapping):
        key = category_key(node)
        if key in node:
            return _names_of_class_label(node[key])
        node = list(node.values())
    return (
        next((names for part in node if (names := _names_of_categories(part))), ()) if isinstance(node, list) else ()
    )


def _names_of_class_label(node: Any) -> tuple[str, ...]:
    """Return the names of a ClassLabel, which may be in a list."""
    if isinstance(node, Mapping) and node.get("_type") == "ClassLabel":
        return tuple(node.get("names") or ())
    parts = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return next((names for part in parts if (names := _names_of_class_label(part))), ())


def _class_names(where: str, files: Mapping[str, _File], others: Sequence[str]) -> dict[int, str]:
    """Return the class names that all files state, or else those that occur, also in the files of other splits."""
    stated = {read.names: name for name, read in files.items() if read.footer.num_rows}
    if len(stated) > 1:
        (first, file), (second, other) = list(stated.items())[:2]
        raise ValueError(
            f"{where}: expected the same class names in all files, got {shorten_list(first) or 'none'} in {file}, and"
            f" {shorten_list(second) or 'none'} in {other}"
        )
    if names := next(iter(stated), ()):
        return dict(enumerate(names))
    tables = [read.table for read in [*files.values(), *_read_all(others)]]
    return names_in(where, (entry for table in tables for entry in table.to_pylist()))
