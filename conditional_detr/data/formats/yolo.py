"""Read YOLO datasets: a data.yaml, or darknet's obj.data as CVAT writes it, or classes.txt as Label Studio does."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conditional_detr.data.formats.content import (
    WHOLE,
    Collector,
    Errors,
    Split,
    Splits,
    is_image_name,
    list_image_files,
    read_sizes,
    read_text,
    split_name,
)
from conditional_detr.data.json_values import describe, describe_keys, shorten_list
from conditional_detr.system.paths import expand_home

_SLACK = 0.01  # fraction of the image: how far rounding may take a number outside [0, 1]
_EXPECTED = "class cx cy w h, or class and the corners x y of a polygon"


class _Description(NamedTuple):
    """A data.yaml.

    Attributes:
        file: the file, for messages.
        roots: folders that paths may be relative to, first the likeliest.
        names: class names by index.
        entries: the folders, lists or images of each split.
        keypoints: how many numbers of keypoints follow a box.
    """

    file: Path
    roots: list[Path]
    names: dict[int, str]
    entries: dict[str, list[str]]
    keypoints: int = 0


def find_description(folder: Path) -> Path | None:
    """Return the file of a folder that describes a YOLO dataset; None if there is none.

    Raises:
        ValueError: there are several.
    """
    found = [path for pattern in ("*.yaml", "*.yml") for path in sorted(folder.glob(pattern)) if _describes(path)]
    if len(found) > 1:
        raise ValueError(f"{folder}: expected one data.yaml, got {shorten_list(path.name for path in found)}")
    if (folder / "obj.data").is_file():
        found.append(folder / "obj.data")
    if (folder / "classes.txt").is_file() and (folder / "labels").is_dir():
        found.append(folder / "classes.txt")
    return found[0] if found else None


def find_splits(path: Path) -> Splits:
    """Return the splits of a dataset.

    Args:
        path: the data.yaml, or its folder.

    Raises:
        OSError: it does not exist.
        ValueError: it lacks names or splits, or is no YAML.
    """
    file = path if path.is_file() else find_description(path)
    if file is None:
        raise FileNotFoundError(f"{path}: expected a data.yaml, obj.data, or classes.txt beside labels/; got none")
    read = {".data": _read_darknet, ".txt": _read_classes}.get(file.suffix.lower(), _read_yaml)
    description = read(file)

    def reader(name: str) -> Any:
        return lambda errors: _read_split(description, name, errors)

    return {name: reader(name) for name in description.entries}


def _describes(path: Path) -> bool:
    """Return whether a YAML file has the keys of a dataset; one that cannot be read shall say why when it is read."""
    try:
        content = _load_yaml(path)
    except ValueError:
        return path.stem in ("data", "dataset")
    return isinstance(content, Mapping) and any(key in content for key in ("names", "nc")) and "train" in content


def _load_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{path}: expected YAML, got something else: {detail}") from error


def _read_yaml(file: Path) -> _Description:
    """Read a data.yaml. Paths are relative to its ``path``, which is relative to the working or the file's folder."""
    content = _load_yaml(file)
    if not isinstance(content, Mapping):
        raise ValueError(f"{file}: expected names, train and val, got {describe(content)}")
    names = _read_names(file, content)
    entries = {}
    for key, value in content.items():
        name = split_name(key) if isinstance(key, str) and key.isalpha() else None
        if name is None or value in (None, "", []):
            continue
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{file}: {key}: expected a path or a list of paths, got {describe(value)}")
        if name in entries:
            raise ValueError(f"{file}: expected one {name} split, got {key} besides it")
        entries[name] = parts
    if not entries:
        raise ValueError(f"{file}: expected train, val or test, got {describe_keys(content)}")
    root = content.get("path")
    if not isinstance(root, str | None):
        raise ValueError(f"{file}: path: expected a folder, got {describe(root)}")
    roots = [file.parent] if not root else [expand_home(root), file.parent / root, file.parent]
    return _Description(file, roots, names, entries, _keypoint_numbers(file, content.get("kpt_shape")))


def _read_names(file: Path, content: Mapping[Any, Any]) -> dict[int, str]:
    """Return the class names: a list, or an object by index; without, nc classes with names that ultralytics gives."""
    names, count = content.get("names"), content.get("nc")
    if names is None and isinstance(count, int):
        names = [f"class_{i}" for i in range(count)]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, Mapping) or not names:
        raise ValueError(
            f"{file}: names: expected a list of class names, or an object by index, got {describe(names)}"
        )
    found = {}
    for key, name in names.items():
        index = int(key) if isinstance(key, str) and key.isdecimal() else key
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"{file}: names: expected indices from 0, got {describe(key)}")
        if isinstance(name, list | Mapping) or name is None:
            raise ValueError(f"{file}: names: expected a class name for {index}, got {describe(name)}")
        found[index] = str(name)
    if count is not None and count != len(found):
        raise ValueError(f"{file}: nc: expected {len(found)}, the number of names, got {describe(count)}")
    return found


def _keypoint_numbers(file: Path, shape: Any) -> int:
    """Return how many numbers of keypoints a label has after its box, from kpt_shape: points and numbers of each."""
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{file}: kpt_shape: expected two positive integers, got {describe(shape)}")
    return int(shape[0] * shape[1])


def _read_darknet(file: Path) -> _Description:
    """Read an obj.data: lines "key = value". CVAT's paths begin with the folder "data", which is the file's own."""
    content = {}
    for line in read_text(file).splitlines():
        key, _, value = line.partition("=")
        content[key.strip()] = value.strip()
    if "names" not in content:
        raise ValueError(f"{file}: expected a line 'names = ...', got {describe_keys(content)}")
    names = _resolve(content["names"], [file.parent])
    if names is None:
        raise FileNotFoundError(f"{file}: names: {content['names']}: no such file")
    entries = {split_name(key) or "": [value] for key, value in content.items() if split_name(key) and value}
    if not entries:
        raise ValueError(f"{file}: expected a line 'train = ...', got {describe_keys(content)}")
    return _Description(file, [file.parent], _read_lines_of_names(names), entries)


def _read_classes(file: Path) -> _Description:
    """Read a classes.txt with one name a line, beside the folders images and labels."""
    return _Description(file, [file.parent], _read_lines_of_names(file), {WHOLE: ["images"]})


def _read_lines_of_names(file: Path) -> dict[int, str]:
    names = dict(enumerate(line.strip() for line in read_text(file).splitlines() if line.strip()))
    if not names:
        raise ValueError(f"{file}: expected one class name per line, got none")
    return names


def _resolve(entry: str, roots: list[Path]) -> Path | None:
    """Return the first existing path of an entry.

    As in ultralytics, a path that begins with "../" and does not exist is tried without it: Roboflow writes it so.
    """
    tries = [entry]
    if entry.startswith("../"):
        tries.append(entry[3:])
    elif entry.startswith("data/"):
        tries.append(entry[5:])
    for root in roots:
        for text in tries:
            path = Path(os.path.normpath(root / text))
            if path.exists():
                return path
    return None


def _read_split(description: _Description, name: str, errors: Errors) -> Split:
    """Read the images and labels of a split."""
    paths: list[Path] = []
    for entry in description.entries[name]:
        place = _resolve(entry, description.roots)
        if place is None:
            tried = shorten_list(
                str(Path(os.path.normpath(root / entry))) for root in dict.fromkeys(description.roots)
            )
            raise FileNotFoundError(f"{description.file}: {name}: expected {entry} to exist, tried {tried}")
        paths += list_image_files(place) if place.is_dir() else _read_list(place, description.roots)
    if not paths:
        raise ValueError(f"{description.file}: {name}: expected images, got none in {description.entries[name]}")
    labels = [_label_file(path) for path in paths]
    if not any(label.is_file() for label in labels):
        raise FileNotFoundError(
            f"{description.file}: {name}: expected label files such as {labels[0]}, got none for {len(paths)} images"
        )
    inside = [root for root in description.roots if paths[0].absolute().is_relative_to(root.absolute())]
    root = max(inside, key=lambda root: len(root.absolute().parts), default=description.file.parent)
    collector = Collector(root, description.names, errors)
    for path, label, size in zip(paths, labels, read_sizes(paths, errors), strict=True):
        image_id = collector.add_image(path, size)
        if size is not None and label.is_file():
            _read_labels(label, description, image_id, size, collector)
    return collector.split(f"{description.file} ({name})")


def _read_list(file: Path, roots: list[Path]) -> list[Path]:
    """Return the images of a list, or the one image that a path is. A line "./..." is relative to its folder."""
    if is_image_name(file):
        return [file]
    paths = []
    for line in read_text(file).splitlines():
        if text := line.strip():
            places = [file.parent] if text.startswith("./") else [Path(), *roots, file.parent]
            paths.append(_resolve(text, places) or Path(os.path.normpath(places[-1] / text)))
    return paths


def _label_file(image: Path) -> Path:
    """Return the label file of an image: the last folder "images" of its path is "labels", or it is beside it."""
    parts = list(image.with_suffix(".txt").parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts)


def _read_labels(
    file: Path, description: _Description, image_id: int, size: tuple[int, int], collector: Collector
) -> None:
    """Add the boxes of a label file."""
    try:
        lines = read_text(file).splitlines()
    except ValueError as error:
        return collector.reject(str(error))
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                label, (x0, y0, x1, y1) = _read_line(line.split(), description)
            except ValueError as error:
                collector.reject(f"{file}: line {number}: {error}")
                continue
            width, height = size[1], size[0]
            collector.add_box(image_id, label, [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height])
    return None


def _read_line(words: list[str], description: _Description) -> tuple[int, tuple[float, float, float, float]]:
    """Return the class index and the box x0 y0 x1 y1 in fractions of the image.

    Raises:
        ValueError: with what was expected and got.
    """
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"expected numbers: {_EXPECTED}, got {describe(' '.join(words))}")
    if description.keypoints and len(values) == 5 + description.keypoints:
        values = values[:5]
    if len(values) not in (5, 6) and (len(values) < 7 or len(values) % 2 == 0):
        raise ValueError(f"expected {_EXPECTED}, got {len(values)} numbers: {describe(' '.join(words))}")
    label = int(values[0])
    if label != values[0] or label not in description.names:
        known = shorten_list(f"{i} {name}" for i, name in description.names.items())
        raise ValueError(f"expected a class index of {description.file.name} ({known}), got {words[0]}")
    numbers = values[1:5] if len(values) == 6 else values[1:]  # the sixth number is a score or a track
    if not all(-_SLACK <= number <= 1 + _SLACK for number in numbers):
        raise ValueError(f"expected fractions of the image in [0, 1], got {describe(' '.join(words[1:]))}")
    if len(numbers) > 4:
        return label, (min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2]))
    cx, cy, w, h = numbers
    if w < 0 or h < 0:
        raise ValueError(f"expected w and h of at least 0, got {words[3]} and {words[4]}")
    return label, (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
