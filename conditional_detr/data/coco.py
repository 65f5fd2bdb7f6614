"""Read and check the annotations of a dataset in COCO's format."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from conditional_detr.data.json_values import (
    Id,
    describe,
    describe_content,
    describe_keys,
    get_value,
    shorten_list,
    to_id,
    to_number,
    to_plain,
)
from conditional_detr.data.rotated_boxes import rotation_of

MAX_SIDE = 2**31 - 1  # pixels
_YOLO = "; this may be of a dataset in YOLO format, which is opened by its data.yaml or its folder"
_VOC = "; this may be of a dataset in Pascal VOC format, which is opened by its folder"
_OTHER_FORMATS = {".yaml": _YOLO, ".yml": _YOLO, ".txt": _YOLO, ".xml": _VOC}
MAX_COORDINATE = 1e15  # pixels: areas stay exact enough, and sums finite


@dataclass(frozen=True)
class Annotations:
    """The checked annotations of a dataset.

    Attributes:
        name: the path of the file, for messages.
        images: the JSON's entry of each image, by image id: file_name, and optionally height and width.
        categories: class names by category id, in any numbering.
        annotations: one dict per annotation: image_id, category_id, bbox [x0, y0, w, h] in pixels, area, iscrowd, id
            (None if it has none), and index, its position in the file's list; rotation in degrees, if its box is the
            one before a rotation.
        left_out: names of categories by id that only group other categories, as Roboflow writes them: without
            annotations, and the supercategory of others. They are not in ``categories``.
    """

    name: str
    images: dict[Id, Mapping[str, Any]]
    categories: dict[Id, str]
    annotations: list[dict[str, Any]]
    left_out: dict[Id, str] = field(default_factory=dict)


def read_annotations(
    source: str | Path | Mapping[str, Any] | Annotations,
    *,
    name: str = "annotations",
    errors: list[str] | None = None,
) -> Annotations:
    """Read the annotations of a dataset and check them.

    Args:
        source: a JSON file, or its content, or annotations that are already read, which are returned unchanged. An
            annotation may lack area, which is then the area of its box, and iscrowd, which is then 0.
        name: name of a content that is in no file, for messages.
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
    name, content = read_json(source, name)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{name}: expected an object with images, annotations and categories, got {describe_content(content)}"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), Sequence):
            raise ValueError(f"{name}: expected a list under {key!r}, got {describe_keys(content)}")
    images, categories = (_by_id(content[key], f"{name}: {key}") for key in ("images", "categories"))
    class_names = {i: _class_name(category, f"{name}: category {i}") for i, category in categories.items()}
    grouping = _grouping_categories(categories, class_names, content["annotations"])
    left_out = {i: class_names.pop(i) for i in grouping}
    if duplicates := sorted(n for n, count in Counter(class_names.values()).items() if count > 1):
        raise ValueError(f"{name}: expected distinct category names, got duplicates: {shorten_list(duplicates)}")
    data = Annotations(name, images, class_names, [], left_out)
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
    given = [to_plain(data.images[image_id].get(side)) for side in ("height", "width")]
    for value in given:
        side = to_id(value)
        if value is not None and (not isinstance(side, int) or not 1 <= side <= MAX_SIDE):
            where, got = f"{data.name}: image {image_id}", " and ".join(map(describe, given))
            raise ValueError(f"{where}: expected height and width as positive integers, got {got}")
    return None if None in given else (int(given[0]), int(given[1]))


def check_image_folder(folder: Path) -> None:
    """Raise NotADirectoryError if the folder of the images does not exist."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "a path that does not exist"
        raise NotADirectoryError(f"{folder}: expected the folder of the images, got {got}")


def image_paths(data: Annotations, folder: str | Path) -> dict[Id, Path]:
    """Check that every image file exists, warn of those outside the folder, and return the paths by image id.

    Raises:
        OSError: the folder or an image does not exist.
        ValueError: an image has no file_name.
    """
    folder = Path(folder)
    check_image_folder(folder)
    paths = {}
    for image_id, info in data.images.items():
        name = info.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{data.name}: image {image_id}: expected a file_name, got {describe(name)}")
        paths[image_id] = folder / name
    if missing := [path for path in paths.values() if not is_file(path)]:
        count = f"{len(missing)} of the {len(paths)} images of {data.name} are missing"
        raise FileNotFoundError(f"{missing[0]}: no such file; {count}")
    if outside := [str(path) for i, path in paths.items() if is_outside(folder, data.images[i]["file_name"])]:
        message = f"{data.name}: {len(outside)} of {len(paths)} images are outside {folder}"
        warnings.warn(f"{message}: {shorten_list(outside, 3)}", stacklevel=3)
    return paths


def is_file(path: Path) -> bool:
    """Return whether a file exists; False for a name that no file can have, such as one with a null character."""
    return os.path.isfile(path)  # noqa: PTH113  # Path.is_file() raises an error for a name that is too long


def is_outside(folder: Path, name: str) -> bool:
    """Return whether a file_name leaves the folder, as an absolute path or by '..'; a link in the folder does not."""
    if ".." in Path(name).parts:  # after a link, it leads to another folder than the name suggests
        folder, path = folder.resolve(), (folder / name).parent.resolve() / Path(name).name
    else:
        folder, path = folder.absolute(), (folder / name).absolute()
    return not path.is_relative_to(folder)


def check_size(data: Annotations, image_id: Id, size: tuple[int, int], path: Path | str) -> None:
    """Raise ValueError if the annotations state another size, for example because the image was rotated later.

    Args:
        data: the annotations.
        image_id: the image.
        size: its height and width, upright.
        path: its file, or another name, for the message.
    """
    height, width = (data.images[image_id].get(side) for side in ("height", "width"))
    stated = size[0] if height is None else height, size[1] if width is None else width
    if stated != size:
        raise ValueError(
            f"{path}: expected {stated[1]} x {stated[0]} pixels, as in {data.name}, got {size[1]} x {size[0]}"
            + explain_size(stated, size, path)
        )


def explain_size(stated: tuple[int, int], size: tuple[int, int], path: Path | str) -> str:
    """Return the end of a message if the stated size is that of the file before its EXIF rotation, else ''."""
    try:
        with Image.open(path) as image:
            sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:  # the type of PIL's error depends on the format
        return ""
    if stated != size[::-1] or not sideways:
        return ""
    return "; stated is the size before the rotation in the file's EXIF data, so the boxes may lack the rotation, too"


def read_json(source: Any, name: str) -> tuple[str, Any]:
    """Return a name for messages, and the content of a JSON file; anything but a path is the content itself."""
    if not isinstance(source, str | Path):
        return name, source
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        jsons = shorten_list(sorted(str(child) for child in path.glob("*.json")), 3)
        hint = f"; JSON files in it: {jsons}" if jsons else ""
        raise IsADirectoryError(f"{path}: expected a JSON file, got a folder{hint}")
    try:
        return str(path), json.loads(path.read_bytes())  # of bytes, json also reads UTF-16 and a byte-order mark
    except (ValueError, RecursionError) as error:  # also raised for bytes that are not UTF-8
        hint = _OTHER_FORMATS.get(path.suffix.lower(), "")
        raise ValueError(f"{path}: expected JSON, got something else: {error}{hint}") from error
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error}") from error


def _by_id(entries: Sequence[Any], where: str) -> dict[Id, Mapping[str, Any]]:
    """Return entries by their ids, which must be distinct and either all integers or all strings."""
    by_id: dict[Id, Mapping[str, Any]] = {}
    for i, entry in enumerate(entries):
        given = get_value(entry, "id", f"{where}[{i}]")
        key = to_id(given)
        if key is None or type(key) is not type(next(iter(by_id), key)):
            raise ValueError(
                f"{where}[{i}]: expected ids that are all integers or all strings, got {describe(to_plain(given))}"
            )
        if key in by_id:
            raise ValueError(f"{where}[{i}]: expected distinct ids, got {describe(key)} again")
        by_id[key] = entry
    if not by_id:
        raise ValueError(f"{where}: expected at least one, got none")
    return by_id


def _class_name(category: Mapping[str, Any], where: str) -> str:
    """Return the name of a category; a number is its own name."""
    given = get_value(category, "name", where)
    name = to_id(given)
    if name is None:
        raise ValueError(f"{where}: expected a name, got {describe(to_plain(given))}")
    return str(name)


def _grouping_categories(
    categories: Mapping[Id, Mapping[str, Any]], names: Mapping[Id, str], annotations: Sequence[Any]
) -> list[Id]:
    """Return the ids of categories without annotations that are the supercategory of others and have none."""
    annotated = {to_id(entry.get("category_id")) for entry in annotations if isinstance(entry, Mapping)}
    members: dict[str, set[Id]] = {}
    for i, category in categories.items():
        members.setdefault(str(category.get("supercategory")), set()).add(i)
    grouping = [
        i
        for i, name in names.items()
        if i not in annotated
        and members.get(name, set()) - {i}
        and str(categories[i].get("supercategory")) in ("none", "None", "", name)
    ]
    return [] if len(grouping) == len(categories) else grouping


def _check_annotation(entry: Any, data: Annotations, where: str) -> dict[str, Any]:
    """Return the fields of an annotation, with defaults for the optional ones."""
    fields = check_fields(entry, data, where)
    area = to_number(entry.get("area", fields["bbox"][2] * fields["bbox"][3]), "area", where)
    iscrowd = to_plain(entry.get("iscrowd", 0))
    if iscrowd not in (0, 1):
        raise ValueError(f"{where}: expected 0 or 1 as iscrowd, got {describe(iscrowd)}")
    annotation_id = to_id(entry.get("id"))
    if annotation_id is None and entry.get("id") is not None:
        raise ValueError(f"{where}: expected an integer or a string as id, got {describe(to_plain(entry['id']))}")
    checked = {**fields, "area": area, "iscrowd": int(iscrowd), "id": annotation_id}
    if degrees := rotation_of(entry):
        checked["rotation"] = degrees
    return checked


def check_fields(entry: Any, data: Annotations, where: str) -> dict[str, Any]:
    """Return image_id, category_id and bbox, which annotations and detections have in common."""
    keys = ("image_id", "category_id", "bbox")
    image_id, category_id, bbox = (to_plain(get_value(entry, key, where)) for key in keys)
    if to_id(image_id) not in data.images:
        raise ValueError(f"{where}: expected the id of an image of {data.name}, got image_id {describe(image_id)}")
    if to_id(category_id) not in data.categories:
        categories = shorten_list(f"{key} {name}" for key, name in data.categories.items())
        raise ValueError(
            f"{where}: expected a category of {data.name} ({categories}), got category_id {describe(category_id)}"
        )
    if not isinstance(bbox, Sequence) or isinstance(bbox, str) or len(bbox) != 4:
        raise ValueError(f"{where}: expected a bbox [x0, y0, w, h], got {describe(bbox)}")
    box = [to_number(value, "bbox", where, limit=MAX_COORDINATE) for value in bbox]
    if min(box[2:]) < 0:
        raise ValueError(f"{where}: expected a bbox [x0, y0, w, h] with w and h of at least 0, got {describe(box)}")
    return {"image_id": to_id(image_id), "category_id": to_id(category_id), "bbox": box}
