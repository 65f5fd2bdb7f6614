"""Write a dataset of any format as COCO JSON files, or with its images as Parquet files."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from conditional_detr.data.coco import Annotations, image_paths, read_annotations
from conditional_detr.data.formats.content import WHOLE, Splits, split_name
from conditional_detr.data.formats.parquet_writing import plan_shards
from conditional_detr.data.formats.reading import Format, find_splits, image_folder_of
from conditional_detr.data.formats.splitting import parse_fractions, split_data
from conditional_detr.data.json_values import Id, shorten_list
from conditional_detr.system.atomic_files import encode_text, remove_unfinished, write_atomically
from conditional_detr.system.outputs import check_output, check_output_folder, is_same_file
from conditional_detr.system.parquet_files import check_pyarrow

Target: TypeAlias = Literal["coco", "parquet"]
"""What is written: annotations as COCO JSON, or Parquet files with the images, too."""


class Written(NamedTuple):
    """A split that was written.

    Attributes:
        files: its files.
        images: the folder of its images, to which the file_names in COCO JSON are relative.
        annotations: what is in it.
    """

    files: tuple[Path, ...]
    images: Path
    annotations: Annotations


class _Part(NamedTuple):
    """A split that is to be written: its name, the content that was read, what is kept of it, and its images."""

    name: str
    content: Mapping[str, Any]
    annotations: Annotations
    images: Path
    paths: dict[Id, Path]


def convert_data(
    source: str | Path,
    output: str | Path,
    images: str | Path | None = None,
    *,
    to: Target = "coco",
    format: Format | None = None,
    split: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Write each split of a dataset to a folder.

    Args:
        source: a file or folder in any format.
        output: the folder; it is created if necessary.
        images: the folder of the images; default: where the format has them.
        to: "coco": ``instances_<split>.json``, while images stay where they are; "parquet": files
            ``<split>-00000-of-00002.parquet`` of about 500 MB with the annotations and the bytes of the images, which
            :class:`~conditional_detr.data.parquet.ParquetData` and Hugging Face's ``datasets`` read.
        format: the format; default: recognised by the content.
        split: the shares of train, val and test, such as "0.8/0.1/0.1", for a dataset without splits.
        seed: another seed gives another split.
        overwrite: replace existing files.
        progress: called with the number of images that are written to Parquet files, and the total.

    Returns:
        The splits. All files are written, or none.

    Raises:
        ModuleNotFoundError: pyarrow, which writes Parquet files, is not installed.
        OSError: a file cannot be read or written, or exists; or the folder has other Parquet files.
        ValueError: the dataset is invalid, or has splits of its own where ``split`` is given.
    """
    if to not in get_args(Target):
        raise ValueError(f"to: expected {' or '.join(get_args(Target))}, got {to!r}")
    if to == "parquet":
        check_pyarrow()
    shares = None if split is None else parse_fractions(split)
    splits = find_splits(source, images, format=format)
    if shares is not None and WHOLE not in splits:
        raise ValueError(f"split: expected a dataset without splits, got {source} with {', '.join(splits)}")
    folder = Path(output)
    check_output_folder(folder)
    if is_same_file(folder, source):
        raise ValueError(f"{folder}: expected another folder to write to than that of the dataset")

    def check(names: list[str]) -> None:
        for name in names:
            if folder.is_dir():  # otherwise it is made
                check_output(folder / name, inputs=[source], overwrite=overwrite)

    remove_unfinished(folder)
    if to == "coco":
        check([_json_name(name) for name in shares or splits])
    else:
        _check_split_names([*(shares or splits)])
    parts = [*_read_parts(splits, shares, seed)]
    total, done = sum(len(part.paths) for part in parts), 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total)

    writers: dict[Path, Callable[[Path], object]] = {}
    written = []
    for part in parts:
        files: Mapping[str, Callable[[Path], object]]
        if to == "coco":
            text = json.dumps(_content(part.content, part.annotations), ensure_ascii=False)
            files = {_json_name(part.name): _writer(encode_text(text))}
        else:
            files = plan_shards(part.name, part.annotations, part.paths, written=count)
            check([*files])
        writers |= {folder / name: write for name, write in files.items()}
        written.append(Written(tuple(folder / name for name in files), part.images, part.annotations))
    if to == "parquet" and (
        others := {path.name for path in folder.glob("*.parquet")} - {path.name for path in writers}
    ):
        got = shorten_list(sorted(others), 3)
        raise FileExistsError(f"{folder}: expected no other Parquet files, which would be read with these, got {got}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(writers)
    return written


def _check_split_names(names: list[str]) -> None:
    """Raise ValueError if splits cannot be told apart by the names of their Parquet files."""
    found = [split_name(name) for name in names]
    if len(names) > 1 and (None in found or len(set(found)) < len(found)):
        raise ValueError(f"expected splits that are called train, val or test, got {', '.join(names)}")


def _json_name(split: str) -> str:
    return f"instances_{split}.json"


def _read_parts(splits: Splits, shares: Mapping[str, float] | None, seed: int) -> Iterator[_Part]:
    """Yield the splits of a dataset, or the parts of the one that it has."""
    for name, read in splits.items():
        found = read(None)
        data = read_annotations(found.content, name=found.name)
        folder = image_folder_of(data, found.images)
        paths = image_paths(data, folder)
        parts = {name: data} if shares is None else split_data(data, folder, shares, seed=seed)
        for part, annotations in parts.items():
            of_part = {image_id: paths[image_id] for image_id in annotations.images}
            yield _Part(part, found.content, annotations, folder, of_part)


def _writer(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


def _content(content: Mapping[str, Any], data: Annotations) -> dict[str, Any]:
    """Return the content with the images and annotations of a part, and whatever else these have."""
    kept = [content["annotations"][annotation["index"]] for annotation in data.annotations]
    return {**content, "images": list(data.images.values()), "annotations": kept}
