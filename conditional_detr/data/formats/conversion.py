"""Write a dataset of any format as COCO JSON files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from conditional_detr.data.coco import Annotations, image_paths, read_annotations
from conditional_detr.data.formats.content import WHOLE
from conditional_detr.data.formats.reading import Format, find_splits, image_folder_of
from conditional_detr.data.formats.splitting import parse_fractions, split_data
from conditional_detr.system.atomic_files import encode_text, write_atomically
from conditional_detr.system.outputs import check_output, check_output_folder, is_same_file


class Written(NamedTuple):
    """A COCO JSON file that was written.

    Attributes:
        path: the file.
        images: the folder that its file_names are relative to.
        annotations: what is in it.
    """

    path: Path
    images: Path
    annotations: Annotations


def convert_data(
    source: str | Path,
    output: str | Path,
    images: str | Path | None = None,
    *,
    format: Format | None = None,
    split: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> list[Written]:
    """Write each split of a dataset to ``instances_<split>.json`` in a folder; images stay where they are.

    Args:
        source: a file or folder in any format.
        output: the folder; it is created if necessary.
        images: the folder of the images; default: where the format has them.
        format: the format; default: recognised by the content.
        split: the shares of train, val and test, such as "0.8/0.1/0.1", for a dataset without splits.
        seed: another seed gives another split.
        overwrite: replace existing files.

    Returns:
        The files. All are written, or none.

    Raises:
        OSError: a file cannot be read or written, or exists.
        ValueError: the dataset is invalid, or has splits of its own where ``split`` is given.
    """
    shares = None if split is None else parse_fractions(split)
    splits = find_splits(source, images, format=format)
    if shares is not None and WHOLE not in splits:
        raise ValueError(f"split: expected a dataset without splits, got {source} with {', '.join(splits)}")
    folder = Path(output)
    check_output_folder(folder)
    if is_same_file(folder, source):
        raise ValueError(f"{folder}: expected another folder to write to than that of the dataset")
    targets = {name: folder / f"instances_{name}.json" for name in shares or splits}
    for path in targets.values():
        if folder.is_dir():  # otherwise it is made
            check_output(path, inputs=[source], overwrite=overwrite)
    written, texts = [], {}
    for name, read in splits.items():
        found = read(None)
        data = read_annotations(found.content, name=found.name)
        folder_of = image_folder_of(data, found.images)
        image_paths(data, folder_of)
        parts = {name: data} if shares is None else split_data(data, folder_of, shares, seed=seed)
        for part, annotations in parts.items():
            texts[targets[part]] = json.dumps(_content(found.content, annotations), ensure_ascii=False)
            written.append(Written(targets[part], folder_of, annotations))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically({path: _writer(encode_text(text)) for path, text in texts.items()})
    return written


def _writer(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


def _content(content: Mapping[str, Any], data: Annotations) -> dict[str, Any]:
    """Return the content with the images and annotations of a part, and whatever else these have."""
    kept = [content["annotations"][annotation["index"]] for annotation in data.annotations]
    return {**content, "images": list(data.images.values()), "annotations": kept}
