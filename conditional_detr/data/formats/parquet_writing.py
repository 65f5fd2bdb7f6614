"""Write a dataset as Parquet files with the encoded images, which Hugging Face's ``datasets`` reads, too."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conditional_detr.data.annotations import map_classes
from conditional_detr.data.coco import Annotations, check_size
from conditional_detr.data.json_values import Id
from conditional_detr.inference.images import size_of_file

ROW_GROUP = 100  # images that are read together
ROW_GROUP_BYTES = 100_000_000  # of them, unless one has more
SHARD_BYTES = 500_000_000  # of a file, unless one row group has more


def plan_shards(
    split: str,
    data: Annotations,
    paths: Mapping[Id, Path],
    *,
    written: Callable[[int], None] = lambda images: None,
) -> dict[str, Callable[[Path], None]]:
    """Return the files of a split, by name, each with the function that writes it.

    Args:
        split: name of the split, with which the names of the files begin.
        data: its annotations.
        paths: the image files by image id.
        written: called with the number of images after each row group.

    Raises:
        OSError: an image cannot be read.
    """
    shards: list[list[list[Id]]] = [[]]
    size = 0
    for group, of_group in _row_groups(paths):
        if size >= SHARD_BYTES:
            shards.append([])
            size = 0
        size += of_group
        shards[-1].append(group)
    names, _ = map_classes(data, None)
    integer_ids = all(isinstance(image_id, int) and abs(image_id) < 2**63 for image_id in paths)
    boxes: dict[Id, list[dict[str, Any]]] = {image_id: [] for image_id in paths}
    for annotation in data.annotations:
        boxes[annotation["image_id"]].append(annotation)

    def rows(group: list[Id]) -> Iterator[dict[str, Any]]:
        for image_id in group:
            size, path = size_of_file(paths[image_id]), paths[image_id]
            check_size(data, image_id, size, path)
            of_image = boxes[image_id]
            objects = {name: [one[name] for one in of_image] for name in ("bbox", "area", "iscrowd")}
            objects["category"] = [names.index(data.categories[one["category_id"]]) for one in of_image]
            name = os.fsencode(path.name).decode("utf-8", "replace")  # other names are no text of Parquet
            image = {"bytes": path.read_bytes(), "path": name}
            shown = image_id if integer_ids else str(image_id)
            yield {"image": image, "image_id": shown, "height": size[0], "width": size[1], "objects": objects}

    def writer(groups: list[list[Id]]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            import pyarrow as pa
            from pyarrow.parquet import ParquetWriter

            schema = _schema([name or "" for name in names], integer_ids)
            with ParquetWriter(path, schema, compression="none") as file:  # images are compressed already
                for group in groups:
                    file.write_table(pa.Table.from_pylist([*rows(group)], schema))
                    written(len(group))

        return write

    total = len(shards)
    return {f"{split}-{i:05}-of-{total:05}.parquet": writer(groups) for i, groups in enumerate(shards)}


def _row_groups(paths: Mapping[Id, Path]) -> Iterator[tuple[list[Id], int]]:
    """Yield the images of each row group, and their bytes."""
    group: list[Id] = []
    size = 0
    for image_id, path in paths.items():
        bytes_of_image = path.stat().st_size
        if group and (len(group) == ROW_GROUP or size + bytes_of_image > ROW_GROUP_BYTES):
            yield group, size
            group, size = [], 0
        group.append(image_id)
        size += bytes_of_image
    yield group, size


def _schema(names: list[str], integer_ids: bool) -> Any:
    """Return the schema, with the description by which ``datasets`` knows images and class names."""
    import pyarrow as pa

    image_id = "int64" if integer_ids else "string"
    columns = {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "image_id": pa.type_for_alias(image_id),
        "height": pa.int64(),
        "width": pa.int64(),
        "objects": pa.struct(
            {
                "bbox": pa.list_(pa.list_(pa.float64())),
                "area": pa.list_(pa.float64()),
                "iscrowd": pa.list_(pa.int64()),
                "category": pa.list_(pa.int64()),
            }
        ),
    }

    def value(kind: str) -> dict[str, Any]:
        return {"dtype": kind, "_type": "Value"}

    def lists(feature: dict[str, Any]) -> dict[str, Any]:
        return {"feature": feature, "_type": "List"}

    features = {
        "image": {"_type": "Image"},
        "image_id": value(image_id),
        "height": value("int64"),
        "width": value("int64"),
        "objects": {
            "bbox": lists(lists(value("float64"))),
            "area": lists(value("float64")),
            "iscrowd": lists(value("int64")),
            "category": lists({"names": names, "_type": "ClassLabel"}),
        },
    }
    return pa.schema(columns, {"huggingface": json.dumps({"info": {"features": features}})})
