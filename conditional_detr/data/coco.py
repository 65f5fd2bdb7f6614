"""COCO's two kinds of json, read and checked: the annotations of a data set, and detections on its images."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Id: TypeAlias = int | str


@dataclass(frozen=True)
class Annotations:
    """The objects of a data set.

    Attributes:
        name: what messages call it: its path.
        images: what it says of each image, by id: file_name, and perhaps height and width.
        categories: class names by id, in any numbering.
        objects: one dict an object: image_id, category_id, bbox [x0, y0, w, h] in pixels, area, iscrowd, id (None
            where it has none), and place: which of the file's annotations it is.
    """

    name: str
    images: dict[Id, Mapping[str, Any]]
    categories: dict[Id, str]
    objects: list[dict[str, Any]]


def read_annotations(
    source: str | Path | Mapping[str, Any] | Annotations, *, refused: list[str] | None = None
) -> Annotations:
    """Read the annotations of a data set.

    Args:
        source: a json file, or what such a file holds, or annotations that were read before, which are given back.
            An object may lack area, which is then that of its box, and iscrowd, which is then 0.
        refused: takes the messages of objects that are none, which are then left out instead of raising.

    Raises:
        OSError: a file that cannot be read.
        ValueError: no json, or none of COCO's annotations; the message has the file and the place in it.
    """
    if isinstance(source, Annotations):
        return source
    name, content = _read(source, "annotations")
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: expected an object with images, annotations and categories, got {_kind(content)}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), Sequence):
            raise ValueError(f"{name}: expected a list under {key!r}, got the keys {', '.join(map(repr, content))}")
    images, categories = (_by_id(content[key], f"{name}: {key}") for key in ("images", "categories"))
    names = {i: str(_get(category, "name", f"{name}: category {i}")) for i, category in categories.items()}
    if twice := sorted({n for n in names.values() if list(names.values()).count(n) > 1}):
        raise ValueError(f"{name}: expected each category's name once, got more than one {', '.join(twice)}")
    annotations = Annotations(name, images, names, [])
    for i, entry in enumerate(content["annotations"]):
        try:
            annotations.objects.append({**_object(entry, annotations, f"{name}: annotations[{i}]"), "place": i})
        except ValueError as error:  # noqa: PERF203  # a message an object
            if refused is None:
                raise
            refused.append(str(error))
    return annotations


def said_size(annotations: Annotations, image: Id) -> tuple[int, int] | None:
    """Return the height and width of an image as the annotations have it, None if they lack one.

    Raises:
        ValueError: they are no whole pixels.
    """
    height, width = (annotations.images[image].get(side) for side in ("height", "width"))
    for value in (height, width):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            where, got = f"{annotations.name}: image {image}", f"{height!r} and {width!r}"
            raise ValueError(f"{where}: expected height and width in whole pixels, got {got}")
    return None if height is None or width is None else (height, width)


def image_paths(annotations: Annotations, folder: str | Path) -> dict[Id, Path]:
    """Return where each image is, having looked that it is there.

    Raises:
        OSError: no such folder, or an image that is not in it.
        ValueError: an image without file_name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing of that name"
        raise NotADirectoryError(f"{folder}: expected the folder of the images, got {got}")
    paths = {}
    for image, entry in annotations.images.items():
        if not isinstance(entry.get("file_name"), str):
            raise ValueError(
                f"{annotations.name}: image {image}: expected a file_name, got {entry.get('file_name')!r}"
            )
        paths[image] = folder / entry["file_name"]
    if missing := [path for path in paths.values() if not path.is_file()]:
        count = f"{len(missing)} of the {len(paths)} images of {annotations.name} are missing"
        raise FileNotFoundError(f"{missing[0]}: no such file; {count}")
    return paths


def check_size(entry: Mapping[str, Any], size: tuple[int, int], path: Path, name: str) -> None:
    """Raise ValueError if annotations were made for an image of another size, such as before it was turned.

    Args:
        entry: what the annotations say of the image.
        size: its height and width, upright.
        path: its file.
        name: what the annotations are called.
    """
    height, width = entry.get("height"), entry.get("width")
    said = size[0] if height is None else height, size[1] if width is None else width
    if said != size:
        raise ValueError(f"{path}: expected {said[1]} x {said[0]} pixels, as {name} says, got {size[1]} x {size[0]}")


def read_results(source: str | Path | Sequence[Mapping[str, Any]], annotations: Annotations) -> list[dict[str, Any]]:
    """Read detections in COCO's form for results: a list of image_id, category_id, bbox [x0, y0, w, h] and score.

    Raises:
        OSError: a file that cannot be read.
        ValueError: no json, or none of such detections on images and of categories of the annotations; the message
            has the file and the place in it.
    """
    name, content = _read(source, "results")
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise ValueError(f"{name}: expected a list of detections, got {_kind(content)}")
    results = []
    for i, entry in enumerate(content):
        where = f"{name}: [{i}]"
        found = _checked(entry, annotations, where)
        results.append({**found, "score": _number(_get(entry, "score", where), "score", where)})
    return results


def _read(source: Any, name: str) -> tuple[str, Any]:
    """Return what messages call it, and the content of a json file, or what was given in place of one."""
    if not isinstance(source, str | Path):
        return name, source
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a json file, got a folder")
    try:
        return str(path), json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{path}: expected json, got something else: {error}") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error}") from error


def _by_id(entries: Sequence[Any], where: str) -> dict[Id, Mapping[str, Any]]:
    """Return entries by their ids, which stand once each and are all numbers or all strings."""
    found: dict[Id, Mapping[str, Any]] = {}
    for i, entry in enumerate(entries):
        key = _get(entry, "id", f"{where}[{i}]")
        if not isinstance(key, int | str) or isinstance(key, bool) or type(key) is not type(next(iter(found), key)):
            raise ValueError(f"{where}[{i}]: expected ids that are all whole numbers or all strings, got {key!r}")
        if key in found:
            raise ValueError(f"{where}[{i}]: expected each id once, got {key!r} again")
        found[key] = entry
    if not found:
        raise ValueError(f"{where}: expected at least one, got none")
    return found


def _object(entry: Any, annotations: Annotations, where: str) -> dict[str, Any]:
    """Return an object, what it may lack filled in."""
    found = _checked(entry, annotations, where)
    area = _number(entry.get("area", found["bbox"][2] * found["bbox"][3]), "area", where)
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"{where}: expected 0 or 1 as iscrowd, got {crowd!r}")
    if not isinstance(entry.get("id"), int | str | None):
        raise ValueError(f"{where}: expected a whole number or a string as id, got {entry['id']!r}")
    return {**found, "area": area, "iscrowd": int(crowd), "id": entry.get("id")}


def _checked(entry: Any, annotations: Annotations, where: str) -> dict[str, Any]:
    """Return image_id, category_id and bbox of an object or detection."""
    image, category, box = (_get(entry, key, where) for key in ("image_id", "category_id", "bbox"))
    if not isinstance(image, int | str) or image not in annotations.images:
        raise ValueError(f"{where}: expected the id of an image of {annotations.name}, got image_id {image!r}")
    if not isinstance(category, int | str) or category not in annotations.categories:
        known = ", ".join(f"{key} {name}" for key, name in annotations.categories.items())
        raise ValueError(f"{where}: expected a category of {annotations.name} ({known}), got category_id {category!r}")
    if not isinstance(box, Sequence) or len(box) != 4:
        raise ValueError(f"{where}: expected a bbox [x0, y0, w, h], got {box!r}")
    numbers = [_number(value, "bbox", where) for value in box]
    if min(numbers[2:]) < 0:
        raise ValueError(f"{where}: expected a bbox [x0, y0, w, h] with w and h of at least 0, got {box!r}")
    return {"image_id": image, "category_id": category, "bbox": numbers}


def _get(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        got = f"the keys {', '.join(map(repr, entry))}" if isinstance(entry, Mapping) else _kind(entry)
        raise ValueError(f"{where}: expected an object with {key!r}, got {got}")
    return entry[key]


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{where}: expected finite numbers as {key}, got {value!r}")
    return value


def _kind(content: Any) -> str:
    """Say in json's words what something is."""
    if isinstance(content, Mapping):
        return f"an object with the keys {', '.join(map(repr, content))}"
    return "a list" if isinstance(content, list | tuple) else repr(content)
