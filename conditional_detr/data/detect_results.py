"""Read what ``conditional-detr detect`` wrote as results for a dataset."""

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from conditional_detr.data.coco import MAX_COORDINATE, Annotations, check_size
from conditional_detr.data.json_values import Id, describe, get_value, shorten_list, to_number
from conditional_detr.inference.result_files import read_written


def is_from_detect(source: Any) -> bool:
    """Return whether results are a folder or a JSON Lines file, as ``detect`` writes them."""
    return isinstance(source, str | Path) and (Path(source).is_dir() or Path(source).suffix.lower() == ".jsonl")


def read_detect_results(path: Path, data: Annotations) -> list[dict[str, Any]]:
    """Return the detections of a folder or JSON Lines file in COCO's results format.

    Images are found by their file names, categories by their names. Warns of images without results, of detections of
    classes that the dataset does not have, and of results that were cut at a threshold.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file of another form, an image that the dataset does not have, or that has results twice or
            another size.
    """
    if (path / "_manifest.json").is_file():
        raise ValueError(
            f"{path}: expected JSON files of detect, got Parquet files of --engine ray, which are not read"
        )
    ids = {_parts(str(info.get("file_name"))): image_id for image_id, info in data.images.items()}
    categories = {name: category_id for category_id, name in {**data.left_out, **data.categories}.items()}
    found: dict[Id, str] = {}
    entries = []
    unknown: Counter[str] = Counter()
    thresholds = set()
    for where, content in read_written(path):
        image_id = _image_id(content["image"], ids, data, where)
        if image_id in found:
            raise ValueError(f"{where}: expected one result of each image, got a second one of {found[image_id]}")
        found[image_id] = content["image"]
        size = get_value(content, "size", where)
        height, width = (int(to_number(get_value(size, side, where), side, where)) for side in ("height", "width"))
        check_size(data, image_id, (height, width), Path(content["image"]))
        settings = content.get("settings")
        if isinstance(settings, Mapping) and (threshold := settings.get("threshold", 0)) != 0:
            thresholds.add(str(threshold))
        for i, detection in enumerate(content["detections"]):
            name, box, score = _fields(detection, f"{where}: detections[{i}]")
            if name in categories:
                entries.append({"image_id": image_id, "category_id": categories[name], "bbox": box, "score": score})
            else:
                unknown[name] += 1
    _warn(path, data, len(found), unknown, thresholds)
    return entries


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of a path with slashes or backslashes."""
    return PureWindowsPath(name).parts


def _image_id(image: str, ids: Mapping[tuple[str, ...], Id], data: Annotations, where: str) -> Id:
    """Return the id of the image whose file name is the end of a path."""
    parts = _parts(image)
    for start in range(len(parts)):  # the longest one first
        if parts[start:] in ids:
            return ids[parts[start:]]
    raise ValueError(f"{where}: expected an image of {data.name}, got {describe(image)}")


def _fields(detection: Any, where: str) -> tuple[str, list[float], float]:
    """Return class name, bbox [x0, y0, w, h] and score of a detection."""
    name, box, score = (get_value(detection, key, where) for key in ("name", "box", "score"))
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected a class name, got {describe(name)}")
    if not isinstance(box, list) or len(box) != 4:
        raise ValueError(f"{where}: expected a box [x0, y0, x1, y1], got {describe(box)}")
    x0, y0, x1, y1 = (to_number(value, "box", where, limit=MAX_COORDINATE) for value in box)
    if x1 < x0 or y1 < y0:
        raise ValueError(f"{where}: expected a box [x0, y0, x1, y1], got {describe(box)}")
    return name, [x0, y0, x1 - x0, y1 - y0], to_number(score, "score", where)


def _warn(path: Path, data: Annotations, images: int, unknown: Counter[str], thresholds: set[str]) -> None:
    """Warn of what makes the numbers other than those of all detections on all images."""
    if images < len(data.images):
        missing = f"{len(data.images) - images} of the {len(data.images)} images of {data.name} have no results"
        warnings.warn(f"{path}: {missing}, which counts as no detections", stacklevel=5)
    if unknown:
        names = shorten_list(f"{name} ({count})" for name, count in unknown.most_common())
        warnings.warn(
            f"{path}: skipped {unknown.total()} detections of classes that are not in {data.name}: {names}",
            stacklevel=5,
        )
    if thresholds:
        warnings.warn(
            f"{path}: made with the threshold {shorten_list(sorted(thresholds), 3)}: what is below is missing, which"
            " lowers AP; detect with --threshold 0",
            stacklevel=5,
        )
