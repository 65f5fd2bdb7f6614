"""Read training samples from a dataset in any format, and collate them to batches.

Training accepts any map-style dataset of such samples: pixels (3, H, W) float32, normalised, and a target as defined
in ``set_prediction/targets.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from conditional_detr.data.annotations import (
    CheckedBoxes,
    check_boxes,
    count_unusable,
    guess_box_format,
    map_classes,
    warn_of_duplicate_images,
    warn_of_left_out_categories,
    warn_of_problems,
)
from conditional_detr.data.augmentation import Augmentation as Augmentation
from conditional_detr.data.augmentation import make_scene
from conditional_detr.data.coco import Annotations, check_size, image_paths, stated_size
from conditional_detr.data.formats.reading import DataSource, open_data
from conditional_detr.data.image_cache import Cache, make_cache
from conditional_detr.data.json_values import Id
from conditional_detr.data.rotated_boxes import ROTATED, Rotated, choose_boxes, rotated_indices
from conditional_detr.data.seeds import derive_seed
from conditional_detr.inference.images import size_of, size_of_file
from conditional_detr.inference.preprocessing import normalise_image, open_by_backend, resized_size
from conditional_detr.modeling.metadata import Metadata, Preprocessing

Sample: TypeAlias = tuple[Tensor, dict[str, Any]]
"""Pixels (3, H, W) float32, normalised; and the target: labels (T,) int64, boxes (T, 4) cx cy w h in [0, 1] of the
visible image, and any other keys, which are not used."""


class AnnotatedData(Dataset[Sample], ABC):
    """A dataset of images with annotations. Sample i is image i with its annotations.

    The augmentation of an image depends on ``(seed, epoch, index)`` alone, not on workers, order or earlier samples. A
    target depends on its image alone, and has "image_id" besides labels and boxes. It has no crowds: only evaluation
    uses them. The constructor warns of each kind of problem in the annotations, with the number and examples.

    Attributes:
        annotations: the checked annotations, crowds included.
        class_names: one per row of the class head; None for an unused row.
        category_ids: the dataset's category id of each class.
        preprocessing: image sizes without augmentation, mean and std, and the backend that opens and resizes.
        shapes: (height, width) of each sample's pixels without augmentation.
    """

    def __init__(
        self,
        annotations: Annotations,
        sizes: Sequence[tuple[int, int]],
        *,
        augmentation: Augmentation | None,
        preprocessing: Preprocessing,
        class_names: Sequence[str | None] | None,
        seed: int,
    ) -> None:
        """Check the annotations of images, in their order, of some (height, width).

        Raises:
            ValueError: as in the subclasses.
        """
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self.annotations = annotations
        self.augmentation = augmentation or Augmentation()
        self.preprocessing = preprocessing
        self.seed = seed
        self._image_ids = list(annotations.images)
        self.shapes = [resized_size(*size, preprocessing) for size in sizes]
        self.class_names, self.category_ids = map_classes(annotations, class_names)
        checked = self._check(dict(zip(self._image_ids, sizes, strict=True)))
        warn_of_problems(annotations, {**checked.problems, ROTATED: rotated_indices(annotations)})
        warn_of_duplicate_images(annotations)
        self._boxes, self._labels = self._targets(checked)
        # persistent workers see it, too
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    @property
    def metadata(self) -> Metadata:
        """The metadata of a model that trains on this dataset."""
        return Metadata(self.class_names, self.category_ids, self.preprocessing)

    @property
    def image_labels(self) -> list[Tensor]:
        """The labels (T,) of each sample."""
        return [self._labels[image_id] for image_id in self._image_ids]

    def set_epoch(self, epoch: int) -> None:
        """Use the augmentations of an epoch, also in running workers.

        Raises:
            ValueError: epoch is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch: expected at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    @abstractmethod
    def describe(self, index: int) -> str:
        """Return the name of a sample's image."""

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, index: int) -> Sample:
        """Open an image, augment it, and return its pixels and target.

        Raises:
            OSError: the image cannot be read.
            ValueError: it is not an image, or not of the size in the annotations.
        """
        image_id = self._image_ids[index]
        index %= len(self)
        image = self._open(index)
        check_size(self.annotations, image_id, size_of(image), self.describe(index))
        generator = torch.Generator(device="cpu").manual_seed(derive_seed(self.seed, int(self._epoch), index))
        scene = make_scene(image, self._boxes[image_id], self._labels[image_id])
        scene = self.augmentation(scene, self.preprocessing, generator)
        target = {"labels": scene.labels, "boxes": _relative_boxes(scene.boxes, scene.size), "image_id": image_id}
        image = scene.image.as_subclass(Tensor) if isinstance(scene.image, Tensor) else scene.image
        return normalise_image(image, self.preprocessing), target

    @abstractmethod
    def _open(self, index: int) -> Image.Image | Tensor:
        """Open an image by the backend of the preprocessing."""

    def _check(self, sizes: Mapping[Id, tuple[int, int]]) -> CheckedBoxes:
        """Return the boxes; raise ValueError if they are in another format, or none can be trained on."""
        data = self.annotations
        if other_format := guess_box_format(data, sizes):
            raise ValueError(f"{data.name}: expected every bbox as [x0, y0, w, h] in pixels; {other_format}")
        checked = check_boxes(data, sizes)
        if not checked.usable.any():
            raise ValueError(f"{data.name}: expected annotations to train or measure on, got {count_unusable(data)}")
        return checked

    def _targets(self, checked: CheckedBoxes) -> tuple[dict[Id, Tensor], dict[Id, Tensor]]:
        """Return the boxes (T, 4) x0 y0 x1 y1 in pixels and the labels (T,) to train on, by image id."""
        data = self.annotations
        label_of = {name: label for label, name in enumerate(self.class_names)}
        boxes: dict[Id, list[np.ndarray]] = {image_id: [] for image_id in self._image_ids}
        labels: dict[Id, list[int]] = {image_id: [] for image_id in self._image_ids}
        for index, box, usable in zip(checked.indices, checked.boxes, checked.usable, strict=True):
            if usable:
                annotation = data.annotations[index]
                boxes[annotation["image_id"]].append(box)
                labels[annotation["image_id"]].append(label_of[data.categories[annotation["category_id"]]])
        return (
            {i: torch.from_numpy(np.array(of_image, np.float32).reshape(-1, 4)) for i, of_image in boxes.items()},
            {i: torch.from_numpy(np.array(of_image, np.int64)) for i, of_image in labels.items()},
        )


class CocoData(AnnotatedData):
    """A dataset in any format, of image files in a folder.

    Attributes:
        images: the folder of the images.
        cache: the decoded images; None without a cache.
    """

    def __init__(
        self,
        annotations: DataSource,
        images: str | Path | None = None,
        *,
        augmentation: Augmentation | None = None,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  # frozen
        class_names: Sequence[str | None] | None = None,
        seed: int = 0,
        rotated: Rotated = "box",
        cache: Cache | None = None,
    ) -> None:
        """Read the annotations and check that the image files exist, without decoding them.

        Args:
            annotations: a file or folder in any format, of which the training split is used; the content of a COCO
                JSON file; or what :func:`open_data` returns, as the first two arguments.
            images: the folder of the images; default: where the format has them.
            augmentation: default: images are only resized, as for detection.
            preprocessing: the model's preprocessing.
            class_names: the rows of the class head, such as a model's ``metadata.class_names``. They include all
                categories of the annotations, in any order. Default: these categories, sorted by id.
            seed: another seed gives other augmentations.
            rotated: what to use of an annotation whose attributes rotate its box, as CVAT writes them: "box", its box
                before the rotation, with a warning; or "hull", the smallest upright box around the rotated one.
            cache: where each image is kept as it is decoded first, so that later epochs need not decode it: "ram",
                memory that all workers share; or "disk", files in the user's cache folder, which later runs use, too.
                Samples are the same.

        Raises:
            OSError: a file cannot be read or does not exist, or the folder of the cache cannot be made.
            ValueError: the annotations are invalid, have nothing to train on, or have boxes that seem to be in another
                format; class_names lacks a category; seed is negative; rotated or cache is unknown; the images do not
                fit in the cache.
        """
        data, self.images = open_data(annotations, images)
        warn_of_left_out_categories(data)
        data = choose_boxes(data, rotated)
        paths = image_paths(data, self.images)
        sizes = [stated_size(data, image_id) or size_of_file(path) for image_id, path in paths.items()]
        options: dict[str, Any] = {"augmentation": augmentation, "preprocessing": preprocessing}
        super().__init__(data, sizes, **options, class_names=class_names, seed=seed)
        self._paths = list(paths.values())
        self.cache = make_cache(cache, self._paths, sizes, preprocessing.backend)

    def describe(self, index: int) -> str:
        """Return the path of a sample's image."""
        return str(self._paths[index])

    def _open(self, index: int) -> Image.Image | Tensor:
        """Open an image, or take it from the cache."""
        path = self._paths[index]

        def decode() -> Image.Image | Tensor:
            return open_by_backend(path, str(path), self.preprocessing)[0]

        return decode() if self.cache is None else self.cache.open(index, decode)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None, list[dict[str, Any]]]:
    """Collate samples into a batch.

    Args:
        samples: B samples of any sizes.

    Returns:
        Pixels (B, 3, H, W), where smaller images are padded with zeros on the right and at the bottom; padding
        (B, H, W) bool, True = padded, or None if no image is padded; the targets, unchanged.

    Raises:
        TypeError: an element is not a sample, or its pixels are not float32.
        ValueError: the pixels of a sample have another shape, or there are no samples.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    for i, sample in enumerate(samples):
        if not isinstance(sample, tuple | list) or len(sample) != 2 or not isinstance(sample[0], Tensor):
            # callers may ignore the type annotation
            of = f" of {type(sample[0]).__name__}" if isinstance(sample, tuple | list) and sample else ""  # type: ignore[unreachable]
            raise TypeError(f"samples[{i}]: expected (pixels, target), got {type(sample).__name__}{of}")
        if sample[0].dim() != 3 or sample[0].shape[0] != 3:
            raise ValueError(f"samples[{i}]: expected pixels (3, H, W), got {tuple(sample[0].shape)}")
        if sample[0].dtype != torch.float32:
            raise TypeError(f"samples[{i}]: expected pixels in float32, normalised, got {sample[0].dtype}")
    shapes = [pixels.shape[1:] for pixels, _ in samples]
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    pixels = samples[0][0].new_zeros(len(samples), 3, height, width)
    padding = pixels.new_ones(len(samples), height, width, dtype=torch.bool)
    for i, ((image, _), (h, w)) in enumerate(zip(samples, shapes, strict=True)):
        pixels[i, :, :h, :w] = image
        padding[i, :h, :w] = False
    return pixels, padding if padding.any() else None, [target for _, target in samples]


def _relative_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert boxes x0 y0 x1 y1 in pixels to cx cy w h in [0, 1] of their image."""
    height, width = size
    bounds = torch.tensor([width, height, width, height], dtype=torch.float64, device="cpu")
    # rounding of a resized box may move it just outside the image
    corners = (boxes.as_subclass(Tensor) / bounds).clamp(0, 1)
    return box_convert(corners, "xyxy", "cxcywh").float()
