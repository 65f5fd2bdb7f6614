"""Read and check the two kinds of COCO JSON: annotations of a dataset, and detection results."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Id: TypeAlias = int | str


@dataclass(frozen=True)
class Annotations:
    """The checked annotations of a dataset.

    Attributes:
        name: the path of the file, for messages.
        images: the JSON's entry of each image, by image id: file_name, and optionally height and width.
        categories: class names by category id, in any numbering.
        annotations: one dict per annotation: image_id, category_id, bbox [x0, y0, w, h] in pixels, area, iscrowd, id
            (None if it has none), and index, its position in the file's list.
    """

    name: str
    images: dict[Id, Mapping[str, Any]]
    categories: dict[Id, str]
    annotations: list[dict[str, Any]]


def read_annotations(
    source: str | Path | Mapping[str, Any] | Annotations, *, errors: list[str] | None = None
) -> Annotations:
    """Read the annotations of a dataset and check them.

    Args:
        source: a JSON file, or its content, or annotations that are already read, which are returned unchanged. An
            annotation may lack area, which is then the area of its box, and iscrowd, which is then 0.
        errors: collects one message per invalid annotation. These annotations are then skipped; without this list,
            the first one raises.

    Returns:
        The annotations, crowds included.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not in COCO's format; the message has the file and the position in it.
    """
    if isinstance(source, Annotations):
        return source
    name, content = _read(source, "annotations")
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{name}: expected an object with images, annotations and categories, got {_describe_json(content)}"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), Sequence):
            raise ValueError(f"{name}: expected a list under {key!r}, got the keys {', '.join(map(repr, content))}")
    images, categories = (_by_id(content[key], f"{name}: {key}") for key in ("images", "categories"))
    class_names = {i: str(_get(category, "name", f"{name}: category {i}")) for i, category in categories.items()}
    if duplicates := sorted({n for n in class_names.values() if list(class_names.values()).count(n) > 1}):
        raise ValueError(f"{name}: expected distinct category names, got duplicates: {', '.join(duplicates)}")
    data = Annotations(name, images, class_names, [])
    for i, entry in enumerate(content["annotations"]):
        try:
            data.annotations.append({**_check_annotation(entry, data, f"{name}: annotations[{i}]"), "index": i})
        except ValueError as error:  # noqa: PERF203  # one message per annotation
            if errors is None:
                raise
            errors.append(str(error))
    return data


def stated_size(data: Annotations, image_id: Id) -> tuple[int, int] | None:
    """Return the height and width that the annotations state for an image, or None if one is missing.

    Raises:
        ValueError: one of them is not a positive integer.
    """
    height, width = (data.images[image_id].get(side) for side in ("height", "width"))
    for value in (height, width):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            where, got = f"{data.name}: image {image_id}", f"{height!r} and {width!r}"
            raise ValueError(f"{where}: expected height and width as positive integers, got {got}")
    return None if height is None or width is None else (height, width)


def check_image_folder(folder: Path) -> None:
    """Raise NotADirectoryError if the folder of the images does not exist."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "a path that does not exist"
        raise NotADirectoryError(f"{folder}: expected the folder of the images, got {got}")


def image_paths(data: Annotations, folder: str | Path) -> dict[Id, Path]:
    """Check that every image file exists, and return the paths by image id.

    Raises:
        OSError: the folder or an image does not exist.
        ValueError: an image has no file_name.
    """
    folder = Path(folder)
    check_image_folder(folder)
    paths = {}
    for image_id, info in data.images.items():
        if not isinstance(info.get("file_name"), str):
            raise ValueError(f"{data.name}: image {image_id}: expected a file_name, got {info.get('file_name')!r}")
        paths[image_id] = folder / info["file_name"]
    if missing := [path for path in paths.values() if not path.is_file()]:
        count = f"{len(missing)} of the {len(paths)} images of {data.name} are missing"
        raise FileNotFoundError(f"{missing[0]}: no such file; {count}")
    return paths


def check_size(data: Annotations, image_id: Id, size: tuple[int, int], path: Path) -> None:
    """Raise ValueError if the annotations state another size, for example because the image was rotated later.

    Args:
        data: the annotations.
        image_id: the image.
        size: its height and width, upright.
        path: its file, for the message.
    """
    height, width = (data.images[image_id].get(side) for side in ("height", "width"))
    stated = size[0] if height is None else height, size[1] if width is None else width
    if stated != size:
        raise ValueError(
            f"{path}: expected {stated[1]} x {stated[0]} pixels, as in {data.name}, got {size[1]} x {size[0]}"
        )


def read_results(source: str | Path | Sequence[Mapping[str, Any]], data: Annotations) -> list[dict[str, Any]]:
    """Read detections in COCO's results format: a list of image_id, category_id, bbox [x0, y0, w, h] and score.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not in this format, or has an image or category that the annotations lack; the
            message has the file and the position in it.
    """
    name, content = _read(source, "results")
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise ValueError(f"{name}: expected a list of detections, got {_describe_json(content)}")
    results = []
    for i, entry in enumerate(content):
        where = f"{name}: [{i}]"
        fields = _check_fields(entry, data, where)
        results.append({**fields, "score": _number(_get(entry, "score", where), "score", where)})
    return results


def _read(source: Any, name: str) -> tuple[str, Any]:
    """Return a name for messages, and the content of a JSON file; anything but a path is the content itself."""
    if not isinstance(source, str | Path):
        return name, source
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a JSON file, got a folder")
    try:
        return str(path), json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also raised for bytes that are not UTF-8
        raise ValueError(f"{path}: expected JSON, got something else: {error}") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error}") from error


def _by_id(entries: Sequence[Any], where: str) -> dict[Id, Mapping[str, Any]]:
    """Return entries by their ids, which must be distinct and either all integers or all strings."""
    by_id: dict[Id, Mapping[str, Any]] = {}
    for i, entry in enumerate(entries):
        key = _get(entry, "id", f"{where}[{i}]")
        if not isinstance(key, int | str) or isinstance(key, bool) or type(key) is not type(next(iter(by_id), key)):
            raise ValueError(f"{where}[{i}]: expected ids that are all integers or all strings, got {key!r}")
        if key in by_id:
            raise ValueError(f"{where}[{i}]: expected distinct ids, got {key!r} again")
        by_id[key] = entry
    if not by_id:
        raise ValueError(f"{where}: expected at least one, got none")
    return by_id


def _check_annotation(entry: Any, data: Annotations, where: str) -> dict[str, Any]:
    """Return the fields of an annotation, with defaults for the optional ones."""
    fields = _check_fields(entry, data, where)
    area = _number(entry.get("area", fields["bbox"][2] * fields["bbox"][3]), "area", where)
    iscrowd = entry.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise ValueError(f"{where}: expected 0 or 1 as iscrowd, got {iscrowd!r}")
    if not isinstance(entry.get("id"), int | str | None):
        raise ValueError(f"{where}: expected an integer or a string as id, got {entry['id']!r}")
    return {**fields, "area": area, "iscrowd": int(iscrowd), "id": entry.get("id")}


def _check_fields(entry: Any, data: Annotations, where: str) -> dict[str, Any]:
    """Return image_id, category_id and bbox, which annotations and detections have in common."""
    image_id, category_id, bbox = (_get(entry, key, where) for key in ("image_id", "category_id", "bbox"))
    if not isinstance(image_id, int | str) or image_id not in data.images:
        raise ValueError(f"{where}: expected the id of an image of {data.name}, got image_id {image_id!r}")
    if not isinstance(category_id, int | str) or category_id not in data.categories:
        categories = ", ".join(f"{key} {name}" for key, name in data.categories.items())
        raise ValueError(
            f"{where}: expected a category of {data.name} ({categories}), got category_id {category_id!r}"
        )
    if not isinstance(bbox, Sequence) or len(bbox) != 4:
        raise ValueError(f"{where}: expected a bbox [x0, y0, w, h], got {bbox!r}")
    numbers = [_number(value, "bbox", where) for value in bbox]
    if min(numbers[2:]) < 0:
        raise ValueError(f"{where}: expected a bbox [x0, y0, w, h] with w and h of at least 0, got {bbox!r}")
    return {"image_id": image_id, "category_id": category_id, "bbox": numbers}


def _get(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, Mapping) or key not in entry:
        got = f"the keys {', '.join(map(repr, entry))}" if isinstance(entry, Mapping) else _describe_json(entry)
        raise ValueError(f"{where}: expected an object with {key!r}, got {got}")
    return entry[key]


def _number(value: Any, key: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{where}: expected finite numbers as {key}, got {value!r}")
    return value


def _describe_json(content: Any) -> str:
    """Describe a value in JSON's terms, for messages."""
    if isinstance(content, Mapping):
        return f"an object with the keys {', '.join(map(repr, content))}"
    return "a list" if isinstance(content, list | tuple) else repr(content)
