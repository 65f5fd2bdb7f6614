"""Read Pascal VOC datasets: one XML file per image, in one folder, in folders of splits, or as in the VOC devkit.

The devkit counts pixels from 1 and includes the last one, so that a box covers xmin - 1 to xmax. The programs that
export VOC files today (LabelImg, CVAT, Label Studio) write the corners themselves, from 0: xmin to xmax. Corners are
read as they are, unless the file says that it is of the devkit, or ``devkit`` does.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from conditional_detr.data.formats.content import (
    WHOLE,
    Collector,
    Errors,
    Split,
    Splits,
    is_image_name,
    read_sizes,
    read_text,
    split_folders,
    split_name,
)
from conditional_detr.data.json_values import describe, shorten_list

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_IMAGE_FOLDERS = ("JPEGImages", "images", ".")  # beside or above the folder of the XML files


class _Object(NamedTuple):
    """An object of an XML file: its class, its corners as they are written, and whether it is difficult."""

    name: str
    corners: list[float]
    difficult: bool


class _File(NamedTuple):
    """The content of an XML file; problems are those of objects that were left out."""

    filename: str
    size: tuple[int, int] | None
    of_devkit: bool
    objects: list[_Object]
    problems: list[str]


def find_file(folder: Path) -> Path | None:
    """Return an XML file of a dataset in a folder; None if there is none."""
    return next((file for files in _files_by_split(folder).values() for file in files), None)


def find_splits(folder: Path, images: Path | None, *, devkit: bool = False) -> Splits:
    """Return the splits of a dataset: those of ImageSets/Main, or subfolders, or all files.

    Args:
        folder: the folder.
        images: the folder of the images; default: JPEGImages or images, or that of the XML files.
        devkit: all files count pixels from 1.

    Raises:
        OSError: there are no XML files.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected the folder of the XML files, got a file")
    files = _files_by_split(folder)
    if not any(files.values()):
        raise FileNotFoundError(f"{folder}: expected XML files in it, in Annotations, train, valid or test; got none")
    read = cache(_read_file)  # once for the names of all splits, once for the boxes of one

    def reader(name: str) -> Callable[[Errors], Split]:
        def read_split(errors: Errors) -> Split:
            classes = _class_names((file for of_split in files.values() for file in of_split), read)
            collector = Collector(images or folder, classes, errors)
            _collect(files[name], read, images, devkit, collector, errors)
            return collector.split(str(folder) if name == WHOLE else f"{folder} ({name})")

        return read_split

    return {name: reader(name) for name in files}


def _class_names(files: Iterable[Path], read: Callable[[Path], _File]) -> dict[int, str]:
    """Return the names of all files, sorted, by ids from 1, so that they are the same in all splits."""
    names: set[str] = set()
    for file in files:
        with suppress(OSError, ValueError):  # raised or reported where its split is read
            names.update(found.name for found in read(file).objects)
    return dict(enumerate(sorted(names), 1))


def _collect(
    files: list[Path],
    read: Callable[[Path], _File],
    images: Path | None,
    devkit: bool,
    collector: Collector,
    errors: Errors,
) -> None:
    """Add the images and boxes of files. The size of an image is the stated one, or else that of its file."""
    found, listing = [], cache(_images_by_name)
    for file in files:
        try:
            content = read(file)
        except ValueError as error:
            collector.reject(str(error))
            continue
        found.append((content, _image_file(file, content.filename, images, listing)))
    unstated = [path for content, path in found if content.size is None]
    sizes = dict(zip(unstated, read_sizes(unstated, errors), strict=True))
    for content, path in found:
        image_id = collector.add_image(path, content.size or sizes[path])
        for problem in content.problems:
            collector.reject(problem)
        _add_boxes(content, image_id, devkit, collector)


def _xml_files(folder: Path) -> Iterator[Path]:
    """Yield the XML files of a folder, sorted, but those that macOS adds."""
    return (path for path in sorted(folder.glob("*.xml")) if not path.name.startswith("."))


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Return the XML files of each split."""
    annotations = folder / "Annotations"
    place = annotations if annotations.is_dir() else folder
    sets = {path.stem: path for path in sorted((folder / "ImageSets" / "Main").glob("*.txt"))}
    sets = {name: path for name, path in sets.items() if split_name(name) == name or name in ("trainval", "default")}
    if place is annotations and sets:
        return {
            WHOLE if name == "default" else name: [place / f"{stem}.xml" for stem in _stems(path)]
            for name, path in sets.items()
        }
    if direct := list(_xml_files(place)):
        return {WHOLE: direct}
    if place is annotations:
        folder = place
    return {name: list(_xml_files(child)) for name, child in split_folders(folder).items() if any(_xml_files(child))}


def _stems(path: Path) -> list[str]:
    """Return the first column of an image set: the names of images without suffix."""
    return [line.split()[0] for line in read_text(path).splitlines() if line.strip()]


def _read_file(file: Path) -> _File:
    """Read an XML file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no VOC annotation.
    """
    root = _parse(file)
    if root.tag != "annotation":
        hint = "; this is CVAT's own format: export as COCO, YOLO or Pascal VOC" if root.tag == "annotations" else ""
        raise ValueError(f"{file}: expected Pascal VOC's <annotation>, got <{root.tag}>{hint}")
    objects, problems = [], []
    for i, element in enumerate(root.findall("object"), 1):
        try:
            objects.append(_read_object(element))
        except ValueError as error:  # noqa: PERF203  # one message per object
            problems.append(f"{file}: object {i}: {error}")
    origin = " ".join(_text(root, f"source/{key}") for key in ("annotation", "database"))
    of_devkit = re.search(r"\bPASCAL VOC|\bVOC20\d\d Database", origin) is not None
    # some programs write a path
    filename = _text(root, "filename").replace("\\", "/").rpartition("/")[2]
    return _File(filename, _read_size(root, file), of_devkit, objects, problems)


def _parse(file: Path) -> ElementTree.Element:
    """Parse an XML file without entities, which could expand to any size."""

    def refuse(name: str, *_: object) -> None:
        raise ValueError(f"{file}: expected XML without entities, got the entity {name!r}")

    if not file.is_file():  # which a set lists
        raise FileNotFoundError(f"{file}: no such file")
    content = file.read_bytes()
    try:
        check = expat.ParserCreate()
        check.EntityDeclHandler = refuse
        check.Parse(content, True)
        return ElementTree.fromstring(content)
    except (expat.ExpatError, ElementTree.ParseError, LookupError) as error:  # LookupError: of an unknown encoding
        raise ValueError(f"{file}: expected XML, got something else: {error}") from error


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _read_size(root: ElementTree.Element, file: Path) -> tuple[int, int] | None:
    """Return the stated (height, width); None if there is none, or zeros, as some programs write."""
    texts = [_text(root, f"size/{key}") for key in ("height", "width")]
    try:
        height, width = (int(float(text or 0)) for text in texts)
    except (ValueError, OverflowError):
        got = " and ".join(map(describe, texts))
        raise ValueError(f"{file}: size: expected height and width as integers, got {got}") from None
    return (height, width) if height > 0 and width > 0 else None


def _read_object(element: ElementTree.Element) -> _Object:
    """Return an object; raises ValueError with what was expected and got."""
    name = _text(element, "name")
    if not name:
        raise ValueError(f"expected a name, got {describe(name)}")
    if element.find("bndbox") is None:
        raise ValueError(f"expected a bndbox, got {shorten_list(child.tag for child in element)}")
    corners = []
    for key in _CORNERS:
        text = _text(element, f"bndbox/{key}")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{key}: expected a number, got {describe(text)}")
        corners.append(value)
    if corners[0] > corners[2] or corners[1] > corners[3]:
        shown = ", ".join(f"{key} {value:g}" for key, value in zip(_CORNERS, corners, strict=True))
        raise ValueError(f"expected xmin <= xmax and ymin <= ymax, got {shown}")
    return _Object(name, corners, _text(element, "difficult") in ("1", "true", "True"))


def _image_file(file: Path, filename: str, images: Path | None, listing: Callable[[Path], dict[str, Path]]) -> Path:
    """Return the image of an XML file: of its filename, or else of its own name; a missing one has its filename."""
    below = file.parent.name if file.parent.name != "Annotations" else ""  # CVAT has a folder per split in each
    tops = [file.parent, file.parent.parent, file.parent.parent.parent]
    places = (
        [images] if images else [top / name / sub for top in tops for name in _IMAGE_FOLDERS for sub in ("", below)]
    )
    for name in (filename, file.stem):
        for place in dict.fromkeys(places):
            if name in listing(place):
                return listing(place)[name]
    return places[0] / (filename or f"{file.stem}.jpg")


def _images_by_name(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by their names, with and without suffix; empty if there is no folder."""
    paths = [path for path in sorted(folder.iterdir()) if is_image_name(path)] if folder.is_dir() else []
    return {**{path.stem: path for path in reversed(paths)}, **{path.name: path for path in paths}}


def _add_boxes(content: _File, image_id: int, devkit: bool, collector: Collector) -> None:
    """Add the boxes of a file; difficult ones as crowds, which training leaves out and evaluation ignores."""
    first = 1 if devkit or content.of_devkit else 0
    for found in content.objects:
        x0, y0, x1, y1 = found.corners
        bbox = [x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first]
        collector.add_box(image_id, collector.ids[found.name], bbox, iscrowd=int(found.difficult))
