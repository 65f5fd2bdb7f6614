"""Open the datasets that ``conditional-detr train`` trains and evaluates on, as its options describe them."""

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conditional_detr.cli.options import refuse_with_parquet
from conditional_detr.system.storage import is_remote

if TYPE_CHECKING:
    from conditional_detr.data.augmentation import Augmentation
    from conditional_detr.data.dataset import AnnotatedData
    from conditional_detr.data.formats.reading import Format, OpenedData
    from conditional_detr.data.rotated_boxes import Rotated
    from conditional_detr.data.row_groups import Shards
    from conditional_detr.modeling.metadata import Preprocessing


class Augment(str, Enum):
    """Augmentations, by the names of Augmentation's constructors."""

    PAPER = "paper"
    SMALL = "small"
    STRONG = "strong"
    NOTHING = "none"


class Caching(str, Enum):
    """Caches of decoded images, by the names of CocoData's."""

    RAM = "ram"
    DISK = "disk"


def resized_preprocessing(present: "Preprocessing", edges: dict[str, int | None]) -> "Preprocessing":
    """Return the preprocessing with other sizes; the longer side follows the shorter one unless it is given."""
    short, long = edges["shortest_edge"], edges["longest_edge"]
    if short is None and long is None:
        return present
    if short is not None and long is None:
        long = round(short * present.longest_edge / present.shortest_edge)
    short, long = short or present.shortest_edge, long or present.longest_edge
    return replace(present, shortest_edge=short, longest_edge=long, resizing="edges", size=None)


def make_augmentation(
    choice: Augment, preprocessing: "Preprocessing", vertical_flip: bool = False, quarter_turn: bool = False
) -> "Augmentation | None":
    """Return the augmentation of training images; None: none."""
    from conditional_detr.data.augmentation import Augmentation

    make: dict[Augment, Callable[[], Augmentation]] = {
        Augment.PAPER: partial(Augmentation.paper, preprocessing.shortest_edge),
        Augment.SMALL: Augmentation.small,
        Augment.STRONG: Augmentation.strong,
        Augment.NOTHING: Augmentation,
    }
    chosen = make[choice]()
    if vertical_flip:
        chosen = replace(chosen, vertical_flip=0.5)
    if quarter_turn:
        chosen = replace(chosen, quarter_turn=0.5)
    return None if chosen == Augmentation() else chosen


def read_datasets(
    data: str,
    images: Path | None,
    val_data: str | None,
    val_images: Path | None,
    format: "Format | None",
    shares: str | None,
    seed: int,
) -> "tuple[OpenedData | Shards, OpenedData | Shards | None]":
    """Return what to train on, and what to measure on if there is anything.

    The latter is val_data, or a split that the dataset has, or a part of it by the given shares.

    Args:
        data: the dataset; the path or URI of Parquet files, or a path in any other format.
        images: the folder of its images.
        val_data: the dataset to measure on.
        val_images: the folder of its images.
        format: the format of both; None: recognised.
        shares: shares of train and val, of a dataset without splits.
        seed: seed of the shares.

    Raises:
        OSError, ValueError: as :func:`open_data`, :func:`open_shards` and :func:`split_data`.
    """
    from conditional_detr.data.formats.content import WHOLE
    from conditional_detr.data.formats.parquet import find_shards, is_parquet, open_shards
    from conditional_detr.data.formats.reading import (
        OpenedData,
        find_splits,
        image_folder_of,
        open_data,
        read_found,
    )
    from conditional_detr.data.formats.splitting import parse_fractions, split_data

    def opened_validation() -> "OpenedData | Shards | None":
        if val_data is None:
            return None
        if is_parquet(val_data) or is_remote(val_data):
            return open_shards(val_data, split="val")
        return open_data(val_data, val_images or images, split="val", format=format)

    if is_parquet(data) or is_remote(data):
        refuse_with_parquet(images=images, format=format, split=shares)
        validation = opened_validation()
        if validation is None and "val" in find_shards(data):
            validation = open_shards(data, split="val")
        return open_shards(data), validation

    fractions = None if shares is None else parse_fractions(shares)
    splits = find_splits(data, images, format=format)
    if fractions is not None and (val_data is not None or WHOLE not in splits):
        got = f"--val-data {val_data}" if val_data is not None else f"{data} with {', '.join(splits)}"
        raise ValueError(f"--split: expected --data without splits, and no --val-data, got {got}")

    def opened(name: str) -> OpenedData:
        annotations, folder = read_found(splits, data, split=name)
        return OpenedData(annotations, image_folder_of(annotations, folder))

    training = opened("train")
    if fractions is not None:
        parts = split_data(*training, fractions, seed=seed)
        return OpenedData(parts["train"], training.images), OpenedData(parts["val"], training.images)
    return training, opened_validation() or (opened("val") if "val" in splits else None)


def open_datasets(
    training: "OpenedData | Shards",
    validation: "OpenedData | Shards | None",
    augmentation: "Augmentation | None",
    seed: int,
    cache: Caching | None,
    rotated: "Rotated",
    preprocessing: "Preprocessing",
) -> "tuple[AnnotatedData, AnnotatedData | None]":
    """Return the datasets for training and validation; only training opens an image more than once by its dataset.

    Raises:
        OSError, ValueError: as :class:`CocoData` and :class:`ParquetData`, or an option that is not of Parquet files.
    """
    from conditional_detr.data.dataset import CocoData
    from conditional_detr.data.parquet import ParquetData
    from conditional_detr.data.row_groups import Shards

    def make(source: "OpenedData | Shards", kept: Any, **options: Any) -> "AnnotatedData":
        if isinstance(source, Shards):
            refuse_with_parquet(cache=kept, rotated=None if rotated == "box" else rotated)
            return ParquetData(source, preprocessing=preprocessing, **options)
        return CocoData(*source, preprocessing=preprocessing, rotated=rotated, cache=kept, **options)

    data = make(training, None if cache is None else cache.value, augmentation=augmentation, seed=seed)
    return data, None if validation is None else make(validation, None, class_names=data.class_names)
