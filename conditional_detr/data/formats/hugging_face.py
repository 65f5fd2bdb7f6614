"""Read Hugging Face's image folders: a metadata.jsonl beside the images, with ``objects`` for each of them."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from conditional_detr.data.coco import MAX_COORDINATE
from conditional_detr.data.formats.content import (
    WHOLE,
    Collector,
    Errors,
    Split,
    Splits,
    read_sizes,
    read_text,
    split_folders,
    split_name,
)
from conditional_detr.data.json_values import Id, describe, describe_content, get_value, to_id, to_number

METADATA = "metadata.jsonl"
_CATEGORIES = ("categories", "category", "label", "labels")  # as datasets on the hub call them

_Lines = list[tuple[str, dict[str, Any]]]


def find_metadata(path: Path) -> dict[str, Path]:
    """Return the metadata files of a folder by split; empty if there are none."""
    if path.is_file():
        return {WHOLE: path}
    if (path / METADATA).is_file():
        return {WHOLE: path / METADATA}
    folders = {**(split_folders(path / "data") if (path / "data").is_dir() else {}), **split_folders(path)}
    return {name: child / METADATA for name, child in folders.items() if (child / METADATA).is_file()}


def find_splits(path: Path) -> Splits:
    """Return the splits of a dataset: folders with a metadata.jsonl, or the first folders in the one file's names.

    Args:
        path: the folder, or a metadata.jsonl.

    Raises:
        OSError: there is no metadata.jsonl, or it cannot be read.
        ValueError: it is not JSON Lines.
    """
    files = find_metadata(path)
    if not files:
        raise FileNotFoundError(f"{path}: expected {METADATA} in it, in train, validation or test; got none")
    names = _class_names(path if path.is_dir() else path.parent)
    lines = {name: _read_lines(file) for name, file in files.items()}
    roots = {name: file.parent for name, file in files.items()}
    if list(files) == [WHOLE]:
        by_split: dict[str, _Lines] = {}
        for line in lines[WHOLE]:
            first, slash, _ = str(line[1].get("file_name", "")).partition("/")
            by_split.setdefault((slash and split_name(first)) or WHOLE, []).append(line)
        lines, roots = by_split, dict.fromkeys(by_split, roots[WHOLE])
    known = names or names_in(path, [entry for of_split in lines.values() for _, entry in of_split])

    def reader(name: str) -> Callable[[Errors], Split]:
        return lambda errors: _read_split(f"{path} ({name})", lines[name], roots[name], known, errors)

    return {name: reader(name) for name in lines}


def _read_lines(file: Path) -> _Lines:
    """Return the entries of a file, each after its position for messages."""
    entries = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            where = f"{file}: line {number}"
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: expected JSON, got something else: {error}") from error
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{where}: expected an object with file_name and objects, got {describe_content(entry)}"
                )
            entries.append((where, entry))
    return entries


def _class_names(folder: Path) -> dict[int, str]:
    """Return the class names in the head of the README.md, as ``datasets`` writes those of a ClassLabel."""
    import yaml

    card = folder / "README.md"
    if not card.is_file():
        return {}
    _, *parts = read_text(card).split("---\n", 2)
    try:
        head = yaml.safe_load(parts[0]) if len(parts) == 2 else None
    except yaml.YAMLError as error:
        raise ValueError(f"{card}: expected YAML between the lines ---, got {' '.join(str(error).split())}") from error
    info = head.get("dataset_info") if isinstance(head, Mapping) else None
    names = _find_class_label(info)
    return {int(i): str(name) for i, name in names.items() if str(i).isdecimal()}


def _find_class_label(node: Any) -> Mapping[Any, Any]:
    """Return the names of the first class_label in the features, which may be nested in lists and structures."""
    if isinstance(node, Mapping):
        label = node.get("class_label")
        if isinstance(label, Mapping) and isinstance(label.get("names"), Mapping):
            return label["names"]
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        if found := _find_class_label(child):
            return found
    return {}


def names_in(path: str | Path, entries: Iterable[Mapping[str, Any]]) -> dict[int, str]:
    """Return the categories that occur, of all splits: integers as they are, names sorted."""
    found: set[Id] = set()
    for entry in entries:
        with suppress(ValueError):  # raised or reported where its split is read
            found.update(key for one in _read_objects(entry, "") if (key := to_id(one["category"])) is not None)
    integers = {i: str(i) for i in sorted(key for key in found if isinstance(key, int))}
    texts = sorted(key for key in found if isinstance(key, str))
    if integers and texts:
        got = describe([*integers, *texts])
        raise ValueError(f"{path}: expected categories that are all integers or all names, got {got}")
    return integers or dict(enumerate(texts))


def category_key(objects: Mapping[str, Any]) -> str:
    """Return the name of the categories in an image's objects."""
    return next((key for key in _CATEGORIES if key in objects), _CATEGORIES[0])


def _read_split(name: str, lines: _Lines, root: Path, names: dict[int, str], errors: Errors) -> Split:
    """Read the objects of a split's images."""
    files = []
    for where, entry in lines:
        file_name = get_value(entry, "file_name", where)
        if not isinstance(file_name, str) or not file_name:
            raise ValueError(f"{where}: expected a file_name, got {describe(file_name)}")
        files.append(root / file_name)
    collector = Collector(root, names, errors)
    for (where, entry), path, size in zip(lines, files, read_sizes(files, errors), strict=True):
        add_objects(collector, collector.add_image(path, size), entry, where)
    return collector.split(name)


def add_objects(collector: Collector, image_id: int, entry: Mapping[str, Any], where: str) -> None:
    """Add the boxes in the ``objects`` of an image, with ``area`` and ``iscrowd`` if they have them.

    Args:
        collector: what they are added to.
        image_id: the id of the image.
        entry: the columns of the image.
        where: its position, for messages.

    Raises:
        ValueError: they are invalid, and the collector does not collect errors.
    """
    try:
        objects = _read_objects(entry, where)
    except ValueError as error:
        collector.reject(str(error))
        return
    for i, one in enumerate(objects):
        try:
            category_id, bbox, others = _check(one, collector, f"{where}: objects[{i}]")
        except ValueError as error:
            collector.reject(str(error))
            continue
        collector.add_box(image_id, category_id, bbox, **others)


def _read_objects(entry: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    """Return the boxes of an image: bbox, category, and what else is known of them."""
    objects = get_value(entry, "objects", where)
    if objects is None:
        return []
    if isinstance(objects, list):  # one object per box, as ``datasets`` shows lists of structures
        return [_fields(one, where)[1] for one in objects]
    key, columns = _fields(objects, f"{where}: objects")
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(lengths) > 1 or -1 in lengths:
        got = ", ".join(f"{key if name == 'category' else name} {_length(values)}" for name, values in columns.items())
        raise ValueError(f"{where}: objects: expected lists of one length, got {got}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _fields(objects: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the category, and bbox, category, and area and iscrowd if they are there."""
    key = category_key(objects) if isinstance(objects, Mapping) else ""
    found = {"bbox": get_value(objects, "bbox", where), "category": get_value(objects, key, where)}
    return key, found | {name: objects[name] for name in ("area", "iscrowd") if objects.get(name) is not None}


def _length(value: Any) -> str:
    return f"of {len(value)}" if isinstance(value, list) else describe(value)


def _check(one: Mapping[str, Any], collector: Collector, where: str) -> tuple[int, list[float], dict[str, Any]]:
    """Return the category id of a box, the box [x0, y0, w, h], and its area and iscrowd if it has them."""
    bbox, category = one["bbox"], one["category"]
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise ValueError(f"{where}: expected a bbox [x0, y0, w, h], got {describe(bbox)}")
    numbers = [to_number(value, "bbox", where, limit=MAX_COORDINATE) for value in bbox]
    if min(numbers[2:]) < 0:
        raise ValueError(f"{where}: expected a bbox [x0, y0, w, h] with w and h of at least 0, got {describe(bbox)}")
    found = to_id(category)
    category_id = collector.ids.get(found) if isinstance(found, str) else found  # a name, or an index
    if category_id is None or category_id not in collector.ids.values():
        raise ValueError(f"{where}: expected a category of {describe(list(collector.ids))}, got {describe(category)}")
    others = {name: one[name] for name in ("area", "iscrowd") if one.get(name) is not None}
    to_number(others.get("area", 0), "area", where)
    if others.get("iscrowd", 0) not in (0, 1):
        raise ValueError(f"{where}: expected 0 or 1 as iscrowd, got {describe(others['iscrowd'])}")
    return category_id, numbers, others
