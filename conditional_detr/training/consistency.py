"""Comparison of a model with the datasets of a run, and of its modules with what a checkpoint stores."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Subset

from conditional_detr.checkpoints.meta_init import other_modules
from conditional_detr.checkpoints.saving import writers_of
from conditional_detr.data.coco import Annotations
from conditional_detr.data.dataset import Sample
from conditional_detr.data.image_check import find_bad_images
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.set_prediction.losses import SetLoss
from conditional_detr.training.loader import SampleDataset

_EXAMPLES = 3  # bad images in a message


class MatchedClasses:
    """A dataset whose labels are changed to the model's rows of the classes of the same names.

    All other attributes are those of the dataset.

    Args:
        data: the dataset.
        rows: the model's row for each label of the dataset.
    """

    def __init__(self, data: SampleDataset, rows: Sequence[int]) -> None:
        self.data = data
        self.rows = torch.tensor(rows, dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        pixels, target = self.data[index]
        labels = target["labels"]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.rows):
            raise ValueError(f"labels: expected 0..{len(self.rows) - 1}, got {labels.tolist()}")
        return pixels, {**target, "labels": self.rows[labels]}

    def __getattr__(self, name: str) -> Any:
        if name == "data":  # not set yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.data, name)


def parts_of(data: Any) -> list[Any]:
    """Return the datasets that a Subset, a ConcatDataset or matched classes consist of; else the dataset itself."""
    if isinstance(data, Subset):
        return parts_of(data.dataset)
    if isinstance(data, MatchedClasses):
        return parts_of(data.data)
    if isinstance(data, ConcatDataset):
        return [part for dataset in data.datasets for part in parts_of(dataset)]
    return [data]


def check_preprocessing(model: DetectionTransformer, data: SampleDataset, name: str) -> None:
    """Raise ValueError if a dataset has another ``preprocessing`` than the model; a dataset without one passes."""
    expected = model.metadata.preprocessing
    for part in parts_of(data):
        got = getattr(part, "preprocessing", None)
        if isinstance(got, type(expected)) and got != expected:
            raise ValueError(
                f"{name}: expected the preprocessing of the model, {expected}, got {got}; pass"
                " preprocessing=model.metadata.preprocessing to the dataset, or set model.metadata = data.metadata"
            )


def check_reading_ahead(data: SampleDataset) -> None:
    """Raise TypeError if a dataset that is read ahead is inside another one, which draws its images in any order."""
    if not hasattr(data, "read_ahead") and any(hasattr(part, "read_ahead") for part in parts_of(data)):
        raise TypeError(
            f"train_data: expected a dataset that reads row groups as it is, got it in a {type(data).__name__}: a row"
            " group would be read for each image"
        )


def check_images(train_data: SampleDataset, val_data: SampleDataset | None, max_bad_images: int) -> None:
    """Read the headers of all images of datasets in COCO's format, and compare their sizes with the annotations.

    Args:
        train_data: the training data.
        val_data: the validation data; all of its images must be usable.
        max_bad_images: number of training images that may be unusable; a warning has the first of them.

    Raises:
        ValueError: more images cannot be used; the message has the first of them.
    """
    for data, limit in ((train_data, max_bad_images), (val_data, 0)):
        for part in parts_of(data):
            annotations, images = getattr(part, "annotations", None), getattr(part, "images", None)
            if not isinstance(annotations, Annotations) or not isinstance(images, str | Path):
                continue
            bad = find_bad_images(annotations, Path(images))
            more = f"; and {len(bad) - _EXAMPLES} more" if len(bad) > _EXAMPLES else ""
            count = f"{len(bad)} of the {len(annotations.images)} images of {annotations.name}"
            message = f"{count} cannot be used: {'; '.join(map(str, bad[:_EXAMPLES]))}{more}"
            if len(bad) > limit:
                raise ValueError(message)
            if bad:
                warnings.warn(message, stacklevel=5)


def describe_shared_images(train_data: SampleDataset, val_data: SampleDataset | None) -> str:
    """Return how many validation images are training images, too; '' if none is, or the images have no names."""
    if val_data is None:
        return ""
    names: list[dict[str, None]] = []
    for data in (train_data, val_data):
        in_coco = [part for part in parts_of(data) if isinstance(getattr(part, "annotations", None), Annotations)]
        parts: list[Any] = [part for part in in_coco if hasattr(part, "describe")]
        of_data = [part.describe(i) for part in parts for i in range(len(part))]
        names.append({os.path.abspath(name): None for name in of_data})  # noqa: PTH100  # links stay
    if not (shared := [name for name in names[1] if name in names[0]]):
        return ""
    count = f"{len(shared)} of the {len(names[1])} validation images are training images, too, such as {shared[0]}"
    return f"{count}: AP on these measures what was trained"


def match_classes(model: DetectionTransformer, data: SampleDataset, name: str) -> SampleDataset:
    """Compare the ``class_names`` of a dataset with those of the model.

    A dataset without ``class_names`` is not compared: its labels are rows of the class head. Classes are matched by
    name if each name of the dataset is that of exactly one class of the model.

    Args:
        model: the model.
        data: the dataset.
        name: the dataset's name in messages.

    Returns:
        The dataset itself if its labels are the model's rows, else one whose labels are.

    Raises:
        TypeError: the class names are not a sequence of strings.
        ValueError: the classes cannot be matched; the message has both.
    """
    expected = model.metadata.class_names
    rows: dict[tuple[str | None, ...], list[int]] = {}
    for part in parts_of(data):
        given = getattr(part, "class_names", None)
        if given is None:
            continue
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"{name}.class_names: expected a sequence of strings, got {given!r}")
        names = tuple(given)
        rows[names] = _rows(expected, names, name)
    if len({tuple(found) for found in rows.values()}) > 1:
        both = " and ".join(_listed(names) for names in rows)
        raise ValueError(f"{name}: expected parts with the same classes in the same order, got {both}")
    found = next(iter(rows.values()), [])
    return data if found == list(range(len(found))) else MatchedClasses(data, found)


def _rows(expected: tuple[str | None, ...], names: tuple[str | None, ...], what: str) -> list[int]:
    """Return the model's row for each class of a dataset."""
    if names == expected:
        return list(range(len(names)))
    used = [name for name in names if name is not None]
    if len(set(used)) < len(used) or any(expected.count(name) != 1 for name in used):
        raise ValueError(
            f"{what}: expected the classes of the model, {_listed(expected)}, got {_listed(names)}; load the model"
            " with from_pretrained(..., class_names=data.class_names), or a new one with data.metadata"
        )
    return [0 if name is None else expected.index(name) for name in names]  # no target has a class without a name


def _listed(names: Sequence[str | None]) -> str:
    """Return class names as text."""
    return f"({', '.join('None' if name is None else repr(name) for name in names)})"


def check_modules(model: DetectionTransformer, folder: Path) -> None:
    """Check that checkpoints can store the model, and warn of modules that they restore as another class.

    Raises:
        ValueError: a parameter is missing, is none of the architecture's, has another shape or is not finite; the
            message lists them.
    """
    writers_of(model, folder)
    others = [
        f"{name or 'model'} is a {got.__name__}, {f'restored as {plain.__name__}' if plain else 'not restored'}"
        for name, (got, plain) in other_modules(model).items()
    ]
    if others:
        warnings.warn(
            f"model: checkpoints store weights, not classes of modules: {'; '.join(others[:3])}"
            + (f" and {len(others) - 3} more" if len(others) > 3 else ""),
            stacklevel=3,
        )


def check_criterion(model: DetectionTransformer, criterion: SetLoss) -> None:
    """Raise ValueError if the class loss is for other rows of the class head than the model has."""
    rows = model.scores.rows(model.config.num_classes)
    if criterion.class_loss.num_classes(rows) != model.config.num_classes:
        kind, architecture = type(criterion.class_loss).__name__, type(model).__name__
        raise ValueError(
            f"criterion: expected a class loss for {architecture}, as SetLoss.for_model(model) has, got {kind}"
        )
    weights, classes = getattr(criterion.class_loss, "class_weights", None), model.config.num_classes
    if weights is not None and len(weights) != classes:
        raise ValueError(
            f"criterion: expected class_weights of all {classes} classes of the model, got {len(weights)}"
        )
