"""Describe a dataset and check it: open every image and check every box."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from conditional_detr.data.annotations import (
    GROUPING,
    check_boxes,
    count_unusable,
    describe_annotation,
    duplicates,
    guess_box_format,
)
from conditional_detr.data.coco import (
    Annotations,
    explain_size,
    is_file,
    is_outside,
    stated_size,
)
from conditional_detr.data.formats.reading import DataSource, Format, find_splits, open_data
from conditional_detr.data.json_values import Id
from conditional_detr.data.rotated_boxes import ROTATED, rotated_indices
from conditional_detr.inference.images import open_image, size_of
from conditional_detr.inference.pipeline import map_in_threads

SMALL, LARGE = 32**2, 96**2  # pixels: COCO's bounds of small, medium and large boxes
TINY = 2.0  # pixels: on a shorter side, nothing can be recognised
FULL = 0.99  # fraction of the image's sides

Cases: TypeAlias = dict[str, list[str]]
"""By kind of problem, a description of each case."""


@dataclass(frozen=True)
class DataReport:
    """Contents and problems of a dataset.

    Attributes:
        name: the path of the annotations.
        images: the number of images.
        annotations: the number of annotations, without crowds.
        crowds: the number of crowd annotations, which evaluation uses and training does not.
        classes: the number of annotations of each class, without crowds.
        boxes: the number of "small", "medium" and "large" boxes, by COCO's definition; and the "min", "median" and
            "max" of the square roots of their areas, in pixels.
        image_sizes: the number of images by "width x height", most frequent first.
        problems: what must be corrected, by kind: image files and annotations, one per case.
        notes: what may be intended, in the same form.
    """

    name: str
    images: int
    annotations: int
    crowds: int
    classes: dict[str, int]
    boxes: dict[str, float]
    image_sizes: dict[str, int]
    problems: Cases
    notes: Cases

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes as a dict, for JSON."""
        return dict(vars(self))


class _Opened(NamedTuple):
    """Result of opening an image.

    Attributes:
        size: (height, width); None if the image cannot be read.
        error: why it cannot be read.
        checksum: of the file's bytes; '' if they cannot be read, None if there is no file.
    """

    size: tuple[int, int] | None
    error: str
    checksum: str | None


def check_data(
    annotations: DataSource,
    images: str | Path | None = None,
    *,
    split: str = "train",
    format: Format | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Check every image and annotation of a dataset.

    Args:
        annotations: a file or folder in any format; the content of a COCO JSON file; or annotations that are already
            read.
        images: the folder of the images; default: where the format has them.
        split: the split of a dataset that has several.
        format: the format; default: recognised by the content.
        progress: called with the number of images that are checked, and the total.

    Returns:
        The report.

    Raises:
        OSError: the annotations cannot be read, or the folder does not exist.
        ValueError: the annotations are invalid as a whole, for example with duplicate image ids.
    """
    errors: list[str] = []
    data, folder = open_data(annotations, images, split=split, format=format, errors=errors)
    problems: Cases = defaultdict(list, {"invalid annotations": errors})
    notes: Cases = defaultdict(list)
    opened = _open_all(data, folder, progress)
    sizes = _check_images(data, folder, opened, problems)
    _check_annotations(data, sizes, problems, notes)
    notes[f"annotations that {ROTATED}"] = [describe_annotation(data, i) for i in rotated_indices(data)]
    notes[f"categories that {GROUPING}: left out"] = list(data.left_out.values())
    present = [name for i, name in _file_names(data).items() if opened[i].checksum is not None]
    notes["images outside the image folder"] = [str(folder / name) for name in present if is_outside(folder, name)]
    listed = {(folder / name).resolve() for name in present}
    notes["image files without an entry in the annotations"] = [
        str(path)
        for path in sorted(_files_beside(data, folder, annotations, format))
        if path.suffix.lower() in Image.registered_extensions()
        and not path.name.startswith("._")  # macOS's metadata of another file
        and path.resolve() not in listed
    ]
    no_crowds = [annotation for annotation in data.annotations if not annotation["iscrowd"]]
    counts = Counter(annotation["category_id"] for annotation in no_crowds)
    notes["classes without annotations"] = [name for i, name in data.categories.items() if not counts[i]]
    image_sizes = Counter(f"{image.size[1]} x {image.size[0]}" for image in opened.values() if image.size is not None)
    return DataReport(
        name=data.name,
        images=len(data.images),
        annotations=len(no_crowds),
        crowds=len(data.annotations) - len(no_crowds),
        classes={data.categories[i]: counts[i] for i in sorted(data.categories)},
        boxes=_box_statistics([annotation["bbox"][2:] for annotation in no_crowds]),
        image_sizes=dict(image_sizes.most_common()),
        problems={kind: cases for kind, cases in problems.items() if cases},
        notes={kind: cases for kind, cases in notes.items() if cases},
    )


def _files_beside(data: Annotations, folder: Path, source: DataSource, format: Format | None) -> Iterator[Path]:
    """Yield the files that images may be among: of one of several splits, those in the folders of its images."""
    several = isinstance(source, str | Path) and len(find_splits(source, format=format)) > 1
    if not several:
        yield from folder.rglob("*")
        return
    for parent in {(folder / name).parent for name in _file_names(data).values()}:
        yield from parent.iterdir() if parent.is_dir() else ()


def _file_names(data: Annotations) -> dict[Id, str]:
    """Return the file_name of each image that has one."""
    names = {image_id: info.get("file_name") for image_id, info in data.images.items()}
    return {image_id: name for image_id, name in names.items() if isinstance(name, str) and name}


def _open_all(data: Annotations, folder: Path, progress: Callable[[int, int], None] | None) -> dict[Id, _Opened]:
    """Open each image that has a file_name, and return the results by image id."""
    names = _file_names(data)
    workers = os.cpu_count() or 1
    results = map_in_threads(_open, (folder / name for name in names.values()), workers=workers, depth=2 * workers)
    opened = {}
    for done, (image_id, result) in enumerate(zip(names, results, strict=True), start=1):
        opened[image_id] = result
        if progress is not None:
            progress(done, len(names))
    return opened


def _open(path: Path) -> _Opened:
    """Open an image and decode all of it."""
    if not is_file(path):
        return _Opened(None, f"{path}: no such file", None)
    checksum = ""
    try:
        checksum = hashlib.blake2b(path.read_bytes()).hexdigest()
        return _Opened(size_of(open_image(path, str(path))), "", checksum)
    except (OSError, TypeError, ValueError) as error:
        return _Opened(None, str(error), checksum)


def _check_images(
    data: Annotations, folder: Path, opened: Mapping[Id, _Opened], problems: Cases
) -> dict[Id, tuple[int, int]]:
    """Collect problems of images; return the (height, width) that each image's boxes refer to, if one is available."""
    sizes = {}
    by_checksum: dict[str, list[str]] = {}
    for image_id, info in data.images.items():
        size, error, checksum = opened.get(image_id, _Opened(None, "", None))
        if image_id not in opened:
            problems["images without a file_name"].append(f"image {image_id}")
        elif size is None:
            kind = "images that are missing" if checksum is None else "images that cannot be read"
            problems[kind].append(error)
        if checksum:
            by_checksum.setdefault(checksum, []).append(info["file_name"])
        stated = None
        try:
            stated = stated_size(data, image_id)
        except ValueError as invalid:
            problems["images whose height and width are not positive integers"].append(str(invalid))
        if stated is not None and size is not None and stated != size:
            name = info["file_name"]
            message = f"{name}: expected {stated[1]} x {stated[0]}, got {size[1]} x {size[0]}"
            reason = explain_size(stated, size, folder / name)
            problems["images whose size differs from the annotations"].append(message + reason)
        if reference := stated or size:
            sizes[image_id] = reference
    names = list(_file_names(data).values())
    problems["images with a duplicate file_name"] = [names[i] for i in duplicates(names)]
    groups = (sorted(set(group)) for group in by_checksum.values())
    problems["groups of images with identical bytes"] = [" = ".join(group) for group in groups if len(group) > 1]
    return sizes


def _check_annotations(data: Annotations, sizes: Mapping[Id, tuple[int, int]], problems: Cases, notes: Cases) -> None:
    """Collect problems and rare properties of the boxes in images whose size is available."""
    annotated = {annotation["image_id"] for annotation in data.annotations}
    notes["images without annotations"] = [
        str(info.get("file_name", f"image {image_id}"))
        for image_id, info in data.images.items()
        if image_id not in annotated
    ]
    data = replace(data, annotations=[a for a in data.annotations if a["image_id"] in sizes])
    if other_format := guess_box_format(data, sizes):  # further problems of single boxes would follow from it
        problems["dataset whose boxes are not x0 y0 w h in pixels"].append(other_format)
        return
    checked = check_boxes(data, sizes)
    if not checked.usable.any():
        problems["dataset without annotations to train on"].append(f"{data.name}: got {count_unusable(data)}")
    for problem, indices in checked.problems.items():
        problems[f"annotations that {problem}"] = [describe_annotation(data, i) for i in indices]
    bounds = np.array([sizes[data.annotations[i]["image_id"]][::-1] for i in checked.indices]).reshape(-1, 2)
    sides = checked.boxes[:, 2:] - checked.boxes[:, :2]
    masks = {
        f"annotations with a side under {TINY:g} pixels": (sides < TINY).any(axis=1),
        "annotations as large as their images": (sides >= FULL * bounds).all(axis=1),
    }
    for kind, mask in masks.items():
        rows = np.flatnonzero(mask & checked.usable)
        notes[kind] = [describe_annotation(data, checked.indices[row]) for row in rows]


def _box_statistics(sides: list[list[float]]) -> dict[str, float]:
    """Count boxes by COCO's size classes, and return the statistics of the square roots of their areas.

    Args:
        sides: (K, 2) w h in pixels.
    """
    areas = np.array(sides, dtype=np.float64).reshape(-1, 2).prod(axis=1)
    small, large = int((areas < SMALL).sum()), int((areas > LARGE).sum())
    statistics: dict[str, float] = {"small": small, "medium": len(areas) - small - large, "large": large}
    if len(areas):
        roots = np.sqrt(areas)
        values = {"min": roots.min(), "median": np.median(roots), "max": roots.max()}
        statistics.update({name: round(float(value), 2) for name, value in values.items()})
    return statistics
