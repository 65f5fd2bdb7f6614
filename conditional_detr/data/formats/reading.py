"""Open a dataset in any supported format, recognised by its content, as checked annotations and an image folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from conditional_detr.data.coco import Annotations, check_image_folder, read_annotations
from conditional_detr.data.formats import coco_folder, hugging_face, voc, yolo
from conditional_detr.data.formats.content import WHOLE, Errors, Splits
from conditional_detr.data.json_values import shorten_list

Format: TypeAlias = Literal["coco", "yolo", "voc", "voc-devkit", "huggingface"]
"""Formats of annotations; "voc-devkit" is "voc" with pixels counted from 1 in all files."""

DataSource: TypeAlias = str | Path | Mapping[str, Any] | Annotations
"""A file or folder in any format, the content of a COCO JSON file, or annotations that are already read."""

_SUFFIXES: dict[str, Format] = {".yaml": "yolo", ".yml": "yolo", ".data": "yolo", ".jsonl": "huggingface"}
_PARQUET = "; Parquet files are read by train, compare and evaluate"


class OpenedData(NamedTuple):
    """A dataset that was found and checked.

    Attributes:
        annotations: the checked annotations, crowds included.
        images: the folder of the images.
    """

    annotations: Annotations
    images: Path


def open_data(
    source: DataSource,
    images: str | Path | None = None,
    *,
    split: str = "train",
    format: Format | None = None,
    errors: Errors = None,
) -> OpenedData:
    """Open one split of a dataset.

    Args:
        source: the dataset.
        images: the folder of the images; default: where the format has them.
        split: train, val, test, or another name that the dataset has. A dataset without splits is used as it is.
        format: the format; default: recognised by the content.
        errors: as in :func:`read_annotations`.

    Raises:
        OSError: a file or folder does not exist or cannot be read.
        ValueError: the format is not recognised, the dataset lacks the split, or it is invalid; the message has the
            file and the position in it.
    """
    if images is None and not isinstance(source, str | Path):
        raise ValueError("images: expected the folder of the images, got None")
    annotations, folder = read_split(source, images, split=split, format=format, errors=errors)
    return OpenedData(annotations, image_folder_of(annotations, folder))


def image_folder_of(annotations: Annotations, found: Path | None) -> Path:
    """Return the folder of the images.

    Raises:
        OSError: it was not found, or does not exist.
    """
    if found is None:
        first = next(iter(annotations.images.values())).get("file_name")
        raise FileNotFoundError(
            f"{annotations.name}: expected the folder of the images, got none; {first} is in none near the annotations"
        )
    check_image_folder(found)
    return found


def read_split(
    source: DataSource,
    images: str | Path | None = None,
    *,
    split: str = "train",
    format: Format | None = None,
    errors: Errors = None,
) -> tuple[Annotations, Path | None]:
    """Read one split of a dataset like :func:`open_data`; the folder of the images is None if it was not found."""
    _check_format(format)
    if not isinstance(source, str | Path):
        return read_annotations(source, errors=errors), None if images is None else Path(images)
    return read_found(find_splits(source, images, format=format), source, split=split, errors=errors)


def read_found(
    splits: Splits, source: str | Path, *, split: str, errors: Errors = None
) -> tuple[Annotations, Path | None]:
    """Read one of the splits of :func:`find_splits` like :func:`read_split`."""
    name = WHOLE if WHOLE in splits else split
    if name not in splits:
        raise ValueError(f"{source}: expected the split {name}, got {shorten_list(splits)}")
    found = splits[name](errors)
    return read_annotations(found.content, name=found.name, errors=errors), found.images


def find_splits(source: str | Path, images: str | Path | None = None, *, format: Format | None = None) -> Splits:
    """Find the splits of a dataset, and return the function that reads each.

    Args:
        source: a file or folder.
        images: as in :func:`open_data`.
        format: as in :func:`open_data`.

    Raises:
        OSError: it does not exist.
        ValueError: the format is unknown or not recognised, or images are given where the format says where they are.
    """
    path, folder = Path(source), None if images is None else Path(images)
    _check_format(format)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if folder is not None:
        check_image_folder(folder)
    chosen = format or recognise(path)
    if chosen == "coco":
        return coco_folder.find_splits(path, folder)
    if chosen in ("voc", "voc-devkit"):
        return voc.find_splits(path, folder, devkit=chosen == "voc-devkit")
    if folder is not None:
        raise ValueError(f"{path}: expected no image folder, because {chosen} says where images are, got {folder}")
    return (yolo if chosen == "yolo" else hugging_face).find_splits(path)


def _check_format(format: Format | None) -> None:
    """Raise ValueError unless a format is known."""
    if format is not None and format not in get_args(Format):
        raise ValueError(f"format: expected {', '.join(get_args(Format))}, got {format!r}")


def recognise(path: Path) -> Format:
    """Return the format of a file or folder by its content.

    Raises:
        ValueError: none or several formats fit.
    """
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            raise ValueError(f"{path}: expected annotations, got a Parquet file{_PARQUET}")
        return _SUFFIXES.get(path.suffix.lower(), "coco")
    found: dict[Format, Path | None] = {
        "coco": next(iter(coco_folder.find_files(path).values()), None),
        "yolo": yolo.find_description(path),
        "voc": voc.find_file(path),
        "huggingface": next(iter(hugging_face.find_metadata(path).values()), None),
    }
    present = {format: file.relative_to(path) for format, file in found.items() if file is not None}
    if len(present) == 1:
        return next(iter(present))
    if present:
        got = " and ".join(f"{format} ({file})" for format, file in present.items())
        raise ValueError(f"{path}: expected a dataset in one format, got {got}; give the format to use")
    children = shorten_list(sorted(child.name for child in path.iterdir()), 5) or "an empty folder"
    parquet = next(path.rglob("*.parquet"), None)
    hint = "" if parquet is None else _PARQUET
    raise ValueError(
        f"{path}: expected annotations: COCO JSON, {coco_folder.ROBOFLOW}, data.yaml with names and train, Pascal"
        f" VOC's XML or {hugging_face.METADATA}; got {children}{hint}"
    )
