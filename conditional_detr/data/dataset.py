"""Data to train on: images and targets from COCO's json, batches of images alike, and their collating.

Any map-style data set trains that gives samples: pixels (3, H, W) float32, normalised, and a target as ``targets.py``
has it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from conditional_detr.data.annotations import clip_objects, misread, name_rows, warn_of, warn_of_names
from conditional_detr.data.augmentation import Augmentation as Augmentation
from conditional_detr.data.augmentation import scene_of
from conditional_detr.data.coco import Id, check_size, image_paths, read_annotations, said_size
from conditional_detr.data.seeds import derive_seed
from conditional_detr.inference.images import normalise, open_image, resized_size, size_of, size_of_file
from conditional_detr.modeling.metadata import Metadata, Preprocessing

Sample: TypeAlias = tuple[Tensor, dict[str, Any]]
"""Pixels (3, H, W) float32, normalised; and the target: labels (T,) int64, boxes (T, 4) cx cy w h in [0, 1] of the
visible image, and whatever else, which is left alone."""


class Sized(Protocol):
    """What has a length."""

    def __len__(self) -> int: ...


class CocoData(Dataset[Sample]):
    """A data set in COCO's form. Sample i is the i-th image of the json, with its objects.

    What becomes of an image depends on ``(seed, epoch, index)`` alone: not on workers, order or what ran before. A
    target depends on its image alone, and has "image_id" besides labels and boxes. Crowds are left to evaluation.
    Whatever is odd about the objects is counted and named in warnings when the data set is made.

    Attributes:
        annotations: what the json says, crowds included.
        images: the folder of the images.
        class_names: one a row of the class head; None for a row without a class.
        category_ids: the data set's id of each class.
        preprocessing: the sizes without augmentation, mean and std.
        shapes: (height, width) of each sample's pixels, as they are without augmentation.
    """

    def __init__(
        self,
        annotations: str | Path | Mapping[str, Any],
        images: str | Path,
        *,
        augmentation: Augmentation | None = None,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  # frozen
        class_names: Sequence[str | None] | None = None,
        seed: int = 0,
    ) -> None:
        """Read the json and look that the images are there, without opening them.

        Args:
            annotations: the json, or what it holds.
            images: the folder of the images.
            augmentation: what is done to images; None: they are resized only, as for detection.
            preprocessing: the numbers of the model.
            class_names: the rows of the class head, such as a model's ``metadata.class_names``: at least all classes
                of the annotations, in any order. Default: these, by their ids.
            seed: another one, another augmentation.

        Raises:
            OSError: a file that cannot be read or is not there.
            ValueError: annotations that are none, without any object, or whose boxes look like another format; classes
                without a row; a negative seed.
        """
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}")
        self.annotations = read_annotations(annotations)
        self.images = Path(images)
        self.augmentation = augmentation or Augmentation()
        self.preprocessing = preprocessing
        self.seed = seed
        self._paths = image_paths(self.annotations, self.images)
        self._ids = list(self._paths)
        sizes = {
            image: said_size(self.annotations, image) or size_of_file(path) for image, path in self._paths.items()
        }
        self.shapes = [resized_size(*sizes[image], preprocessing) for image in self._ids]
        self.class_names, self.category_ids = name_rows(self.annotations, class_names)
        self._boxes, self._labels = self._targets(sizes)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # so that workers that live on see it, too

    @property
    def metadata(self) -> Metadata:
        """What a model that trains on this data set is to know."""
        return Metadata(self.class_names, self.category_ids, self.preprocessing)

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on; workers notice at the next sample.

        Raises:
            ValueError: a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch: expected at least 0, got {epoch}")
        self._epoch.fill_(epoch)

    def describe(self, index: int) -> str:
        """Return the file of a sample's image."""
        return str(self._paths[self._ids[index]])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        """Open an image.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no image, or not of the size that the annotations say.
        """
        image_id = self._ids[index]
        path = self._paths[image_id]
        image = open_image(path, str(path))
        check_size(self.annotations.images[image_id], size_of(image), path, self.annotations.name)
        seed = derive_seed(self.seed, int(self._epoch), index % len(self))
        generator = torch.Generator().manual_seed(seed)
        scene = scene_of(image, self._boxes[image_id], self._labels[image_id])
        scene = self.augmentation(scene, self.preprocessing, generator)
        target = {"labels": scene.labels, "boxes": _fractions(scene.boxes, scene.size), "image_id": image_id}
        return normalise(_values(scene.image), self.preprocessing), target

    def _targets(self, sizes: Mapping[Id, tuple[int, int]]) -> tuple[dict[Id, Tensor], dict[Id, Tensor]]:
        """Return by image the boxes (T, 4) x0 y0 x1 y1 in pixels and the labels (T,) that can be trained on."""
        data = self.annotations
        if looks := misread(data, sizes):
            raise ValueError(f"{data.name}: expected every bbox as [x0, y0, w, h] in pixels; {looks}")
        found = clip_objects(data, sizes)
        if not found.usable.any():
            raise ValueError(f"{data.name}: expected objects to train on, got {len(data.objects)}, none of use")
        warn_of(data, found.findings)
        warn_of_names(data)
        rows = {name: row for row, name in enumerate(self.class_names)}
        boxes: dict[Id, list[np.ndarray]] = {image: [] for image in self._ids}
        labels: dict[Id, list[int]] = {image: [] for image in self._ids}
        for place, box, usable in zip(found.places, found.boxes, found.usable, strict=True):
            if usable:
                entry = data.objects[place]
                boxes[entry["image_id"]].append(box)
                labels[entry["image_id"]].append(rows[data.categories[entry["category_id"]]])
        return (
            {image: torch.tensor(np.array(b), dtype=torch.float32).reshape(-1, 4) for image, b in boxes.items()},
            {image: torch.tensor(of_image, dtype=torch.int64) for image, of_image in labels.items()},
        )


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None, list[dict[str, Any]]]:
    """Make a batch of samples.

    Args:
        samples: B of them, of any sizes.

    Returns:
        Pixels (B, 3, H, W), the smaller images padded with zeros on the right and at the bottom; padding (B, H, W)
        bool, True = padded, or None if no image is; the targets, as they are.

    Raises:
        TypeError: no samples, or pixels of another dtype.
        ValueError: pixels of another shape, or no sample at all.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    for i, sample in enumerate(samples):
        if not isinstance(sample, tuple | list) or len(sample) != 2 or not isinstance(sample[0], Tensor):
            # the annotation asks, this checks
            of = f" of {type(sample[0]).__name__}" if isinstance(sample, tuple | list) and sample else ""  # type: ignore[unreachable]
            raise TypeError(f"samples[{i}]: expected (pixels, target), got {type(sample).__name__}{of}")
        if sample[0].dim() != 3 or sample[0].shape[0] != 3:
            raise ValueError(f"samples[{i}]: expected pixels (3, H, W), got {tuple(sample[0].shape)}")
        if sample[0].dtype != torch.float32:
            raise TypeError(f"samples[{i}]: expected pixels in float32, normalised, got {sample[0].dtype}")
    shapes = [pixels.shape[1:] for pixels, _ in samples]
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    pixels = samples[0][0].new_zeros(len(samples), 3, height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for i, ((image, _), (h, w)) in enumerate(zip(samples, shapes, strict=True)):
        pixels[i, :, :h, :w] = image
        padding[i, :h, :w] = False
    return pixels, padding if padding.any() else None, [target for _, target in samples]


def batches(
    data: Sized,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    rank: int = 0,
    processes: int = 1,
) -> list[list[int]]:
    """Return the samples of each step of an epoch, for one process.

    All processes together take in a step what one process would with ``processes`` times the batch size. Every sample
    comes once, every process has as many batches, and the last may be smaller.

    Args:
        data: the data set. If it has ``shapes``, (height, width) of each sample, those of one shape come together,
            and what is left over by their sides' ratio.
        batch_size: the most samples of a process in a step.
        seed: another one, another order; so epoch.
        epoch: see seed.
        shuffle: False: in the data set's order.
        rank: the number of the process.
        processes: how many there are.

    Raises:
        ValueError: a batch size or rank that is none, or fewer samples than processes.
    """
    if batch_size < 1 or not 0 <= rank < processes:
        raise ValueError(
            f"expected batch_size >= 1 and 0 <= rank < processes, got {batch_size}, {rank} and {processes}"
        )
    if len(data) < processes:
        raise ValueError(f"data: expected at least a sample a process, {processes}, got {len(data)}")
    generator = np.random.default_rng((seed, epoch))
    size = batch_size * processes
    order = generator.permutation(len(data)).tolist() if shuffle else list(range(len(data)))
    shapes = getattr(data, "shapes", None) if shuffle else None
    steps = _steps(order, shapes, size)
    if shuffle:
        steps = [steps[i] for i in generator.permutation(len(steps))]
    return [step[rank::processes] for step in _with_samples_for_all(steps, processes)]


def _steps(order: list[int], shapes: Sequence[tuple[int, int]] | None, size: int) -> list[list[int]]:
    """Cut an order of samples into steps: full ones of one shape, then of what is left over, by the sides' ratio."""
    steps: list[list[int]] = []
    if shapes is not None:
        groups: dict[tuple[int, int], list[int]] = {}
        for i in order:
            groups.setdefault(shapes[i], []).append(i)
        order = []
        for group in groups.values():
            full = len(group) // size * size
            steps += [group[i : i + size] for i in range(0, full, size)]
            order += group[full:]
        order.sort(key=lambda i: shapes[i][0] / shapes[i][1])
    return steps + [order[i : i + size] for i in range(0, len(order), size)]


def _with_samples_for_all(steps: list[list[int]], processes: int) -> list[list[int]]:
    """Give a step that has fewer samples than there are processes some of a full one."""
    for place, step in enumerate(steps):
        if len(step) < processes:
            donor = (place + 1) % len(steps)
            both = step + steps[donor]
            if len(both) >= 2 * processes:
                steps[place], steps[donor] = both[: len(both) // 2], both[len(both) // 2 :]
            else:  # one sample a process: some come twice, so that all processes have as many batches
                steps[place] = both[:processes]
            break
    return steps


def _fractions(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn boxes x0 y0 x1 y1 in pixels into cx cy w h in [0, 1] of their image."""
    height, width = size
    bounds = torch.tensor([width, height, width, height], dtype=torch.float64)
    # resizing may have rounded a box that ends where its image does to just beyond it
    corners = (boxes.as_subclass(Tensor) / bounds).clamp(0, 1)
    return box_convert(corners, "xyxy", "cxcywh").float()


def _values(image: Image.Image | Tensor) -> Tensor:
    """Return an image as (3, H, W), uint8, or float in [0, 1] if it was a tensor."""
    if isinstance(image, Tensor):
        return image.as_subclass(Tensor)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
