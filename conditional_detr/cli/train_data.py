"""Open the datasets that ``conditional-detr train`` trains and evaluates on, as its options describe them."""

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conditional_detr.data.augmentation import Augmentation
    from conditional_detr.data.dataset import CocoData
    from conditional_detr.data.formats.reading import Format, OpenedData
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
    data: Path,
    images: Path | None,
    val_data: Path | None,
    val_images: Path | None,
    format: "Format | None",
    shares: str | None,
    seed: int,
) -> "tuple[OpenedData, OpenedData | None]":
    """Return the annotations and image folders for training, and for validation if there are any.

    Those for validation are of val_data, or of a split that the dataset has, or a part of it by the given shares.

    Raises:
        OSError, ValueError: as :func:`open_data` and :func:`split_data`.
    """
    from conditional_detr.data.formats.content import WHOLE
    from conditional_detr.data.formats.reading import (
        OpenedData,
        find_splits,
        image_folder_of,
        open_data,
        read_found,
    )
    from conditional_detr.data.formats.splitting import parse_fractions, split_data

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
    if val_data is not None:
        return training, open_data(val_data, val_images or images, split="val", format=format)
    return training, opened("val") if "val" in splits else None


def open_datasets(
    training: "OpenedData",
    validation: "OpenedData | None",
    augmentation: "Augmentation | None",
    seed: int,
    cache: Caching | None,
    **options: Any,
) -> "tuple[CocoData, CocoData | None]":
    """Return the datasets for training and validation; only training opens an image more than once by its dataset."""
    from conditional_detr.data.dataset import CocoData

    kept: Any = None if cache is None else cache.value
    data = CocoData(*training, augmentation=augmentation, seed=seed, cache=kept, **options)
    return data, None if validation is None else CocoData(*validation, class_names=data.class_names, **options)
