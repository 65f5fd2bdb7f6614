"""What all readers share: splits by name, texts, image sizes, and the content of a COCO JSON file as it grows."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from PIL import Image

from conditional_detr.inference.images import size_of_file

WHOLE = "all"
"""Name of a dataset without splits."""

_THREADS = 16  # waiting for files, not computing
_ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


class Split(NamedTuple):
    """A split of a dataset, before it is checked.

    Attributes:
        name: name for messages: a file or folder, and the split if there are several.
        content: as in a COCO JSON file.
        images: the folder that the images' file_names are relative to; None if it was not found.
    """

    name: str
    content: Mapping[str, Any]
    images: Path | None


Errors: TypeAlias = list[str] | None
"""Collects one message per invalid annotation, which is skipped; None: the first one raises."""

Splits: TypeAlias = dict[str, Callable[[Errors], Split]]
"""By the name of each split, the function that reads it."""


def split_name(name: str) -> str | None:
    """Return train, val or test if a word of a name says so, such as "instances_train2017" or "valid"; else None."""
    return next((_ALIASES[word] for word in re.findall("[a-z]+", name.lower()) if word in _ALIASES), None)


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the subfolders whose names are those of splits.

    Raises:
        ValueError: two subfolders are of one split.
    """
    folders = sorted(child for child in folder.iterdir() if child.is_dir() and child.name.lower() in _ALIASES)
    return distinct_splits((_ALIASES[child.name.lower()], child) for child in folders)


def distinct_splits(found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return paths by split.

    Raises:
        ValueError: two paths are of one split.
    """
    splits: dict[str, Path] = {}
    for name, path in found:
        if name in splits:
            raise ValueError(f"{path.parent}: expected one {name} split, got {splits[name].name} and {path.name}")
        splits[name] = path
    return splits


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got the byte {error.object[error.start]:#04x}") from error


def is_image_name(path: Path) -> bool:
    """Return whether a file has an image's suffix; those of macOS's metadata do not count."""
    return path.suffix.lower() in Image.registered_extensions() and not path.name.startswith(".")


def list_image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if is_image_name(path) and path.is_file())


def read_sizes(paths: Sequence[Path], errors: Errors) -> list[tuple[int, int] | None]:
    """Read the headers of images and return their (height, width), upright as their EXIF data says.

    With ``errors``, None stands for an image that cannot be read: it is for the checks of images to report. Without,
    the first one raises OSError or ValueError.
    """

    def read(path: Path) -> tuple[int, int] | None:
        try:
            return size_of_file(path)
        except (OSError, ValueError):
            if errors is None:
                raise
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(read, paths))


class Collector:
    """The content of a COCO JSON file as a reader finds it."""

    def __init__(self, root: Path, categories: Mapping[int, str], errors: Errors) -> None:
        self.root = root
        self.ids = {name: i for i, name in categories.items()}
        self._errors = errors
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._categories = [{"id": i, "name": name} for i, name in categories.items()]

    def add_image(self, path: Path, size: tuple[int, int] | None) -> int:
        """Add an image of a (height, width) and return its id."""
        inside = path.is_relative_to(self.root)
        name = path.relative_to(self.root).as_posix() if inside else os.path.abspath(path)  # noqa: PTH100  # no links
        return self.add_named_image(name, size)

    def add_named_image(self, name: str, size: tuple[int, int] | None) -> int:
        """Add an image whose file_name is given, of a (height, width), and return its id."""
        info = {"id": len(self._images) + 1, "file_name": name}
        self._images.append(info if size is None else {**info, "height": size[0], "width": size[1]})
        return len(self._images)

    def add_box(
        self, image_id: int, category_id: int, bbox: Sequence[float], *, area: Any = None, iscrowd: Any = 0
    ) -> None:
        """Add a box [x0, y0, w, h] in pixels; the default area is that of the box."""
        entry = {"id": len(self._annotations) + 1, "image_id": image_id, "category_id": category_id}
        area = bbox[2] * bbox[3] if area is None else area
        self._annotations.append({**entry, "bbox": list(bbox), "area": area, "iscrowd": iscrowd})

    def reject(self, message: str) -> None:
        """Raise ValueError for an invalid annotation, or collect the message."""
        if self._errors is None:
            raise ValueError(message)
        self._errors.append(message)

    def split(self, name: str) -> Split:
        """Return what was collected.

        Raises:
            ValueError: no images or no categories were.
        """
        if self._errors and not (self._images and self._categories):
            raise ValueError(self._errors[0])  # which says why
        if not self._images:
            raise ValueError(f"{name}: expected at least one image, got none")
        content = {"images": self._images, "annotations": self._annotations, "categories": self._categories}
        return Split(name, content, self.root)
