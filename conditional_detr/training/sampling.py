"""Class-balanced sampling: how often each image is drawn, from the classes of its targets."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from conditional_detr.training.consistency import MatchedClasses


def balanced_probabilities(data: Any) -> np.ndarray:
    """Return the probability of each image, when first a class is drawn and then one of its images.

    p(image) = (1 - e) / C · Σ 1 / n_c over the classes c of the image, where n_c is the number of images with class c,
    C the number of classes with images, and e the share of images without targets, each of which has p = 1 / images.

    Args:
        data: a dataset with ``image_labels``, the labels of each image, as CocoData has, or parts of such datasets.

    Returns:
        (images,), which add up to 1.

    Raises:
        TypeError: the dataset, or a part of it, has no ``image_labels``.
        ValueError: it is empty.
    """
    if not len(data):
        raise ValueError("data: expected at least one sample, got 0")
    classes = [set(map(int, labels)) for labels in _labels(data)]
    images_of = Counter(label for of_image in classes for label in of_image)
    empty = sum(not of_image for of_image in classes) / len(classes)
    share = (1 - empty) / max(len(images_of), 1)
    found = [
        share * sum(1 / images_of[label] for label in of_image) if of_image else 1 / len(classes)
        for of_image in classes
    ]
    return np.array(found) / np.sum(found)


def _labels(data: Any) -> Sequence[Any]:
    """Return the labels of each image; of matched classes the dataset's own, which group images in the same way."""
    if isinstance(data, MatchedClasses):
        return _labels(data.data)
    if isinstance(data, Subset):
        labels = _labels(data.dataset)
        return [labels[index] for index in data.indices]
    if isinstance(data, ConcatDataset):
        return [of_image for part in data.datasets for of_image in _labels(part)]
    found: Any = getattr(data, "image_labels", None)
    if found is None or len(found) != len(data):
        raise TypeError(
            f"balanced: expected a dataset with image_labels, the labels of each image, got {type(data).__name__}"
            + ("" if found is None else f" with those of {len(found)} of {len(data)} images")
        )
    return found
