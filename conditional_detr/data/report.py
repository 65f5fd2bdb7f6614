"""What is in a data set, and what is wrong with it: every image opened, every box looked at."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from conditional_detr.data.annotations import clip_objects, misread, name_object, repeated
from conditional_detr.data.coco import Annotations, Id, read_annotations, said_size
from conditional_detr.inference.images import open_image, size_of
from conditional_detr.inference.pipeline import map_in_threads

SMALL, LARGE = 32**2, 96**2  # pixels: COCO's bounds of small, medium and large boxes
TINY = 2.0  # pixels: a side that nothing can be seen on
FULL = 0.99  # share of the image's sides

Cases: TypeAlias = dict[str, list[str]]


@dataclass(frozen=True)
class DataReport:
    """What is in a data set.

    Attributes:
        name: of the annotations.
        images: how many.
        objects: how many, crowds apart.
        crowds: how many boxes around crowds, which count in evaluation and are no targets.
        classes: the number of objects of each class.
        boxes: how many are "small", "medium" and "large", as COCO counts, and the "least", "median" and "greatest"
            side in pixels.
        image_sizes: the number of images by "width x height", the commonest first.
        problems: what to mend, by kind: names of images and places of objects, one a case.
        notes: what may be meant, in the same form.
    """

    name: str
    images: int
    objects: int
    crowds: int
    classes: dict[str, int]
    boxes: dict[str, float]
    image_sizes: dict[str, int]
    problems: dict[str, list[str]]
    notes: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for json."""
        return dict(vars(self))


class _Opened(NamedTuple):
    """What came of opening an image: its (height, width), or what is wrong; and a checksum, if there are bytes."""

    size: tuple[int, int] | None
    message: str
    checksum: str


def check_data(
    annotations: str | Path | Mapping[str, Any],
    images: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at every image and object of a data set.

    Args:
        annotations: COCO's json, or what it holds.
        images: the folder of the images.
        progress: called with the number of images done and of all.

    Raises:
        OSError: annotations that cannot be read, or no such folder.
        ValueError: annotations that are none as a whole, such as with one id for two images.
    """
    refused: list[str] = []
    data = read_annotations(annotations, refused=refused)
    folder = Path(images)
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing of that name"
        raise NotADirectoryError(f"{folder}: expected the folder of the images, got {got}")
    problems: Cases = defaultdict(list, {"objects that are none": refused})
    notes: Cases = defaultdict(list)
    opened = _open_all(data, folder, progress)
    sizes = _check_images(data, folder, opened, problems)
    _check_objects(data, sizes, problems, notes)
    named = {(folder / name).resolve() for name in _file_names(data).values()}
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in Image.registered_extensions())
    notes["files that the json does not name"] = [str(path) for path in files if path.resolve() not in named]
    objects = [entry for entry in data.objects if not entry["iscrowd"]]
    counts = Counter(entry["category_id"] for entry in objects)
    notes["classes without an object"] = [name for category, name in data.categories.items() if not counts[category]]
    frequent = Counter(f"{size[1]} x {size[0]}" for size, _, _ in opened.values() if size is not None)
    return DataReport(
        name=data.name,
        images=len(data.images),
        objects=len(objects),
        crowds=len(data.objects) - len(objects),
        classes={data.categories[category]: counts[category] for category in sorted(data.categories)},
        boxes=_measure([entry["bbox"][2:] for entry in objects]),
        image_sizes=dict(frequent.most_common()),
        problems={kind: cases for kind, cases in problems.items() if cases},
        notes={kind: cases for kind, cases in notes.items() if cases},
    )


def _file_names(data: Annotations) -> dict[Id, str]:
    """Return the file_name of each image that has one."""
    names = {image: entry.get("file_name") for image, entry in data.images.items()}
    return {image: name for image, name in names.items() if isinstance(name, str) and name}


def _open_all(data: Annotations, folder: Path, progress: Callable[[int, int], None] | None) -> dict[Id, _Opened]:
    """Open each image that has a file_name."""
    names = _file_names(data)
    workers = os.cpu_count() or 1
    results = map_in_threads(_open, (folder / name for name in names.values()), workers=workers, depth=2 * workers)
    opened = {}
    for done, (image, result) in enumerate(zip(names, results, strict=True), start=1):
        opened[image] = result
        if progress is not None:
            progress(done, len(names))
    return opened


def _open(path: Path) -> _Opened:
    """Open an image to the last pixel."""
    if not path.is_file():
        return _Opened(None, f"{path}: no such file", "")
    try:
        checksum = hashlib.blake2b(path.read_bytes()).hexdigest()
        return _Opened(size_of(open_image(path, str(path))), "", checksum)
    except (OSError, TypeError, ValueError) as error:
        return _Opened(None, str(error), checksum)


def _check_images(
    data: Annotations, folder: Path, opened: Mapping[Id, _Opened], problems: Cases
) -> dict[Id, tuple[int, int]]:
    """Find what is wrong with images; return the (height, width) that the boxes of each are meant for, if any."""
    sizes = {}
    same: dict[str, list[str]] = {}
    for image, entry in data.images.items():
        size, message, checksum = opened.get(image, _Opened(None, "", ""))
        if image not in opened:
            problems["images without file_name"].append(f"image {image}")
        elif size is None:
            problems["images that cannot be read" if checksum else "images that are missing"].append(message)
        if checksum:
            same.setdefault(checksum, []).append(entry["file_name"])
        said = None
        try:
            said = said_size(data, image)
        except ValueError as error:
            problems["images without height and width in whole pixels"].append(str(error))
        if said is not None and size is not None and said != size:
            message = f"{entry['file_name']}: said {said[1]} x {said[0]}, is {size[1]} x {size[0]}"
            problems["images of another size than the json says"].append(message)
        if meant := said or size:
            sizes[image] = meant
    names = list(_file_names(data).values())
    problems["images with a file_name that stood before"] = [names[place] for place in repeated(names)]
    doubles = (sorted(set(group)) for group in same.values())
    problems["images of the same bytes"] = [" = ".join(group) for group in doubles if len(group) > 1]
    return sizes


def _check_objects(data: Annotations, sizes: Mapping[Id, tuple[int, int]], problems: Cases, notes: Cases) -> None:
    """Find what is wrong with the boxes of images whose size is known, and what is rare."""
    busy = {entry["image_id"] for entry in data.objects}
    notes["images without an object"] = [
        str(entry.get("file_name", f"image {image}")) for image, entry in data.images.items() if image not in busy
    ]
    data = replace(data, objects=[entry for entry in data.objects if entry["image_id"] in sizes])
    if looks := misread(data, sizes):  # what else is wrong with each follows from that
        problems["data set whose boxes are not x0 y0 w h in pixels"].append(looks)
        return
    found = clip_objects(data, sizes)
    if not found.usable.any():
        problems["data set without an object to train on"].append(data.name)
    for what, places in found.findings.items():
        problems[f"objects that {what}"] = [name_object(data, place) for place in places]
    bounds = np.array([sizes[data.objects[place]["image_id"]][::-1] for place in found.places]).reshape(-1, 2)
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    masks = {
        f"objects with a side under {TINY:g} pixels": (sides < TINY).any(axis=1),
        "objects as large as their images": (sides >= FULL * bounds).all(axis=1),
    }
    for kind, mask in masks.items():
        rows = np.flatnonzero(mask & found.usable)
        notes[kind] = [name_object(data, found.places[row]) for row in rows]


def _measure(sides: list[list[float]]) -> dict[str, float]:
    """Count boxes (K, 2) by size as COCO does, and measure their sides: roots of their areas."""
    areas = np.array(sides, dtype=np.float64).reshape(-1, 2).prod(axis=1)
    small, large = int((areas < SMALL).sum()), int((areas > LARGE).sum())
    counts: dict[str, float] = {"small": small, "medium": len(areas) - small - large, "large": large}
    if len(areas):
        roots = np.sqrt(areas)
        measures = {"least": roots.min(), "median": np.median(roots), "greatest": roots.max()}
        counts.update({name: round(float(value), 2) for name, value in measures.items()})
    return counts
