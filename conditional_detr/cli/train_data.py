"""Open the datasets that ``conditional-detr train`` trains and evaluates on, as its options describe them."""

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conditional_detr.data.augmentation import Augmentation
    from conditional_detr.data.dataset import CocoData
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
    choice: Augment, vertical_flip: bool = False, quarter_turn: bool = False
) -> "Augmentation | None":
    """Return the augmentation of training images; None: none."""
    from conditional_detr.data.augmentation import Augmentation

    chosen = Augmentation() if choice is Augment.NOTHING else getattr(Augmentation, choice.value)()
    if vertical_flip:
        chosen = replace(chosen, vertical_flip=0.5)
    if quarter_turn:
        chosen = replace(chosen, quarter_turn=0.5)
    return None if chosen == Augmentation() else chosen


def open_datasets(
    data: Path,
    images: Path,
    val_data: Path | None,
    val_images: Path | None,
    augmentation: "Augmentation | None",
    seed: int,
    cache: Caching | None,
    **options: Any,
) -> "tuple[CocoData, CocoData | None]":
    """Return the datasets for training and validation; only training opens an image more than once by its dataset."""
    from conditional_detr.data.dataset import CocoData

    kept: Any = None if cache is None else cache.value
    training = CocoData(data, images, augmentation=augmentation, seed=seed, cache=kept, **options)
    if val_data is None:
        return training, None
    names = training.class_names
    return training, CocoData(val_data, val_images or images, class_names=names, **options)
