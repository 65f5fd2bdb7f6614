"""Find COCO JSON files in a folder, and the image folder of each: as COCO itself, Roboflow, CVAT or Label Studio."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from conditional_detr.data.coco import is_file, read_json
from conditional_detr.data.formats.content import (
    WHOLE,
    Errors,
    Split,
    Splits,
    distinct_splits,
    split_folders,
    split_name,
)

ROBOFLOW = "_annotations.coco.json"
_KEYS = ("images", "annotations", "categories")
_INSTANCES = "instances_"  # what COCO's own names begin with; its other files have captions and keypoints


def find_files(folder: Path) -> dict[str, Path]:
    """Return the COCO JSON files of a folder by split; empty if there are none.

    Raises:
        ValueError: there are several of one split.
    """
    of_splits = [(name, child / ROBOFLOW) for name, child in split_folders(folder).items()]
    if found := [(name, file) for name, file in of_splits if file.is_file()]:
        return distinct_splits(found)
    if (folder / ROBOFLOW).is_file():
        return {WHOLE: folder / ROBOFLOW}
    for place in (folder / "annotations", folder):
        files = sorted(path for path in place.glob("*.json") if not path.name.startswith("."))
        files = [path for path in files if path.name.startswith(_INSTANCES)] or [p for p in files if _is_coco(p)]
        if len(files) == 1 and split_name(files[0].stem) is None:
            return {WHOLE: files[0]}
        if files:
            return distinct_splits((split_name(p.stem) or p.stem.removeprefix(_INSTANCES), p) for p in files)
    return {}


def find_splits(path: Path, images: Path | None) -> Splits:
    """Return the splits of a folder; or a file as the only one.

    Args:
        path: the folder, or the file.
        images: the folder of the images; default: the first folder that has the first image, see :func:`image_folder`.

    Raises:
        OSError: there are none.
        ValueError: there are several files of one split.
    """
    files = find_files(path) if path.is_dir() else {WHOLE: path}
    if not files:
        raise FileNotFoundError(
            f"{path}: expected COCO JSON files in it, in annotations, train, valid or test; got none"
        )

    def reader(file: Path) -> Callable[[Errors], Split]:
        def read(errors: Errors) -> Split:
            name, content = read_json(file, "annotations")
            return Split(name, content, images or image_folder(file, content))

        return read

    return {name: reader(file) for name, file in files.items()}


def image_folder(file: Path, content: Any) -> Path | None:
    """Return the folder of a JSON file's images: the first that has the first image.

    Tried are the file's folder and, when it is "annotations", the one above; in each, its subfolders images, and that
    of the file's name or split: train2017 for instances_train2017.json. None has it: None.
    """
    names = [entry.get("file_name") for entry in _entries(content)[:1] if isinstance(entry, Mapping)]
    if not names or not isinstance(names[0], str):
        return file.parent  # the checks of the content say what is wrong
    return next((folder for folder in _candidates(file) if is_file(folder / names[0])), None)


def _candidates(file: Path) -> Iterator[Path]:
    """Yield the folders that may have the images of a file."""
    stem = file.stem.removeprefix(_INSTANCES)
    tops = [file.parent, file.parent.parent] if file.parent.name == "annotations" else [file.parent]
    for top in tops:
        yield from (top / stem, top / "images" / stem)
        for place in (top, top / "images"):
            if place.is_dir():
                yield from (child for name, child in split_folders(place).items() if name == split_name(stem))
        yield from (top / "images", top)


def _entries(content: Any) -> Sequence[Any]:
    images = content.get("images") if isinstance(content, Mapping) else None
    return images if isinstance(images, list) else ()


def _is_coco(path: Path) -> bool:
    """Return whether a JSON file has COCO's keys."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return isinstance(content, dict) and all(key in content for key in _KEYS)
    return False
