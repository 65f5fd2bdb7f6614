"""Augment an image and its boxes together, with random numbers from one generator.

This uses the functions of torchvision's ``transforms.v2``, not its random classes. Those use the global generator, so
that the result would depend on workers and on earlier calls.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from conditional_detr.inference.preprocessing import edges_size, resized_size
from conditional_detr.modeling.metadata import Preprocessing

Boxes: TypeAlias = Any  # tv_tensors.BoundingBoxes; torchvision has no types
_MAX_ATTEMPTS = 10  # random windows, until one contains a box


class Scene(NamedTuple):
    """An image with its boxes and labels.

    Attributes:
        image: a PIL image in RGB, or a tensor (3, H, W), uint8 or in [0, 1].
        boxes: (T, 4) x0 y0 x1 y1 in the image's pixels, as torchvision's ``BoundingBoxes``.
        labels: (T,) int64.
    """

    image: Image.Image | Tensor
    boxes: Boxes
    labels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = F.get_size(self.image)
        return height, width


@dataclass(frozen=True)
class Augmentation:
    """Random changes of an image, applied in this order. The defaults change nothing: images are only resized.

    Attributes:
        horizontal_flip: the probability of a flip from left to right.
        vertical_flip: the probability of a flip from top to bottom.
        quarter_turn: the probability of a rotation by 90 degrees counterclockwise. The image keeps its size: the side
            that is then too long is cropped at a random position, the side that is too short is filled with the mean
            colour. A box is kept if its centre remains inside. If the image has boxes, at least one is kept.
        crop: the probability of the authors' crop: the image is resized to one of ``crop_edges``, then a random
            rectangle is cropped. A box is kept if any part of it remains.
        crop_edges: lengths of the shorter side before cropping, of which one is chosen at random.
        crop_sides: the minimum and maximum side of the rectangle in pixels.
        zoom: the minimum and maximum magnification. Below 1, the image shrinks, on a background of the mean colour.
            The number of pixels is the same as without zoom. A box is kept if its centre remains inside. If the image
            has boxes, at least one is kept.
        stretch: the maximum ratio of the two sides' magnifications by the zoom, such as 1.2. Either may be larger.
        shortest_edges: lengths of the shorter side, of which one is chosen at random; empty: the preprocessing's.
        longest_edge: the maximum length of the longer side with ``shortest_edges``; None: the preprocessing's.
        brightness: the maximum relative change, in [0, 1].
        contrast: the maximum relative change, in [0, 1].
        saturation: the maximum relative change, in [0, 1].
        hue: the maximum rotation of the hue, in full turns, in [0, 0.5].

    Raises:
        ValueError: a value is outside its range, or a minimum exceeds its maximum.
    """

    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    quarter_turn: float = 0.0
    crop: float = 0.0
    crop_edges: tuple[int, ...] = (400, 500, 600)
    crop_sides: tuple[int, int] = (384, 600)
    zoom: tuple[float, float] = (1.0, 1.0)
    stretch: float = 1.0
    shortest_edges: tuple[int, ...] = ()
    longest_edge: int | None = None
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        changes = ("brightness", "contrast", "saturation", "hue")
        for name in ("horizontal_flip", "vertical_flip", "quarter_turn", "crop", *changes):
            most = 0.5 if name == "hue" else 1
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}: expected a number in [0, {most}], got {getattr(self, name)}")
        for name in ("crop_sides", "zoom"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name}: expected a minimum and a maximum above 0, got {pair}")
        for name in ("crop_edges", "shortest_edges"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name}: expected lengths of at least 1 pixel, got {getattr(self, name)}")
        if not self.crop_edges or min(self.crop_edges) < self.crop_sides[0]:
            raise ValueError(
                f"crop_edges: expected lengths of at least the {self.crop_sides[0]} of crop_sides,"
                f" got {self.crop_edges}"
            )
        if self.stretch < 1:
            raise ValueError(f"stretch: expected at least 1, got {self.stretch}")
        if self.longest_edge is not None and self.longest_edge < max(self.shortest_edges, default=1):
            raise ValueError(
                f"longest_edge: expected at least the longest of shortest_edges {self.shortest_edges},"
                f" got {self.longest_edge}"
            )

    @classmethod
    def paper(cls, shortest_edge: int = 800) -> "Augmentation":
        """Return the authors' augmentation: flip, crop, shorter side 480 to 800, longer side at most 1333.

        Args:
            shortest_edge: the shorter side that the model is to detect at, at least 8. The authors' is 800; with
                another one, all lengths are in proportion.
        """
        if shortest_edge < 8:
            raise ValueError(f"shortest_edge: expected at least 8, got {shortest_edge}")

        def scaled(length: int) -> int:
            return round(length * shortest_edge / 800)

        plain = cls()
        return cls(
            horizontal_flip=0.5,
            crop=0.5,
            crop_edges=tuple(scaled(length) for length in plain.crop_edges),
            crop_sides=(scaled(plain.crop_sides[0]), scaled(plain.crop_sides[1])),
            shortest_edges=tuple(scaled(length) for length in range(480, 801, 32)),
            longest_edge=scaled(1333),
        )

    @classmethod
    def small(cls, *, vertical_flip: bool = False, quarter_turn: bool = False) -> "Augmentation":
        """Return an augmentation for small datasets of hundreds of images: flip, zoom, stretch and colour.

        Images are resized as in detection, so batches of a dataset with one image size need no padding.

        Args:
            vertical_flip: flip half of the images from top to bottom, for example for microscopy or aerial images.
            quarter_turn: rotate half of the images by 90 degrees.
        """
        return cls(
            horizontal_flip=0.5,
            vertical_flip=0.5 if vertical_flip else 0.0,
            quarter_turn=0.5 if quarter_turn else 0.0,
            zoom=(0.8, 1.8),
            stretch=1.2,
            brightness=0.2,
            contrast=0.2,
            saturation=0.2,
            hue=0.02,
        )

    @classmethod
    def strong(cls) -> "Augmentation":
        """Return a strong augmentation for long training on few images: each image stays one scene, without mosaics.

        As ``small``, with zoom down to half and up to twice the size, more stretch and more change of colour.
        """
        return cls(
            horizontal_flip=0.5,
            zoom=(0.5, 2.0),
            stretch=1.5,
            brightness=0.4,
            contrast=0.4,
            saturation=0.5,
            hue=0.05,
        )

    def __call__(self, scene: Scene, preprocessing: Preprocessing, generator: torch.Generator) -> Scene:
        """Augment and resize an image with its boxes.

        Args:
            scene: the original image, its boxes and labels.
            preprocessing: the image size, unless ``shortest_edges`` is given; the mean colour.
            generator: the only source of random numbers.

        Returns:
            The image at its size for the model; the boxes that are kept, clipped to the image, and their labels.
        """
        if _random_bool(self.horizontal_flip, generator):
            scene = Scene(F.horizontal_flip(scene.image), F.horizontal_flip(scene.boxes), scene.labels)
        if _random_bool(self.vertical_flip, generator):
            scene = Scene(F.vertical_flip(scene.image), F.vertical_flip(scene.boxes), scene.labels)
        if _random_bool(self.crop, generator):
            scene = self._random_crop(scene, generator)
        size = resized_size(*scene.size, self._choose_sizes(preprocessing, generator))
        window = scene.size
        if rotated := _random_bool(self.quarter_turn, generator):
            scene = _rotate_90(scene)
        if rotated or any(value != 1 for value in (*self.zoom, self.stretch)):
            scene = self._random_zoom(scene, window, preprocessing, generator)
        scene = _resize(scene, size)
        return Scene(self._adjust_colours(scene.image, generator), scene.boxes, scene.labels)

    def _choose_sizes(self, preprocessing: Preprocessing, generator: torch.Generator) -> Preprocessing:
        """Return the preprocessing with the side lengths chosen for one image."""
        if not self.shortest_edges:
            return preprocessing
        shortest = _random_choice(self.shortest_edges, generator)
        return Preprocessing(shortest, max(self.longest_edge or preprocessing.longest_edge, shortest))

    def _random_crop(self, scene: Scene, generator: torch.Generator) -> Scene:
        """Resize the image to a random scale and crop a rectangle of random size and position."""
        edge = _random_choice(self.crop_edges, generator)
        scene = _resize(scene, edges_size(*scene.size, edge, math.inf))
        low, high = self.crop_sides
        height, width = (_random_integer(low, min(side, high), generator) for side in scene.size)
        top, left = (
            _random_integer(0, side - part, generator) for side, part in zip(scene.size, (height, width), strict=True)
        )
        return _crop_and_pad(scene, top, left, height, width)

    def _random_zoom(
        self, scene: Scene, size: tuple[int, int], preprocessing: Preprocessing, generator: torch.Generator
    ) -> Scene:
        """Crop a random window. Where it extends beyond the image, it is filled with the mean colour.

        Args:
            scene: the image.
            size: height and width of the window at a magnification of 1.
            preprocessing: for the mean colour.
            generator: the source of random numbers.
        """
        height, width = size
        centres = (scene.boxes[:, :2] + scene.boxes[:, 2:]).as_subclass(Tensor) / 2
        for _ in range(_MAX_ATTEMPTS):
            zoom = _random_log_uniform(*self.zoom, generator)
            stretch = math.sqrt(_random_log_uniform(1 / self.stretch, self.stretch, generator))
            window = max(round(height / zoom * stretch), 1), max(round(width / zoom / stretch), 1)
            # a smaller window lies inside the image, a larger one contains it
            top, left = (
                _random_integer(min(0, side - part), max(0, side - part), generator)
                for side, part in zip(scene.size, window, strict=True)
            )
            low, high = (centres.new_tensor(corner) for corner in ((left, top), (left + window[1], top + window[0])))
            inside = ((centres >= low) & (centres <= high)).all(dim=1)
            if inside.any() or not len(centres):
                break
        else:
            return scene
        scene = Scene(scene.image, _boxes(scene.boxes[inside], scene.size), scene.labels[inside])
        red, green, blue = (min(max(value, 0.0), 1.0) for value in preprocessing.mean)
        return _crop_and_pad(scene, top, left, *window, background=(red, green, blue))

    def _adjust_colours(self, image: Image.Image | Tensor, generator: torch.Generator) -> Image.Image | Tensor:
        """Change brightness, contrast, saturation and hue."""
        changes = (
            (self.brightness, F.adjust_brightness),
            (self.contrast, F.adjust_contrast),
            (self.saturation, F.adjust_saturation),
        )
        for amount, change in changes:
            if amount:
                image = change(image, _random_uniform(1 - amount, 1 + amount, generator))
        if self.hue:
            image = F.adjust_hue(image, _random_uniform(-self.hue, self.hue, generator))
        return image


def make_scene(image: Image.Image | Tensor, boxes: Tensor, labels: Tensor) -> Scene:
    """Combine an image with its boxes and labels.

    Args:
        image: the result of ``images.open_image``.
        boxes: (T, 4) x0 y0 x1 y1 in its pixels.
        labels: (T,) int64.
    """
    if isinstance(image, Tensor):
        image = tv_tensors.Image(image, device=image.device)
    height, width = F.get_size(image)
    return Scene(image, _boxes(boxes, (height, width)), labels)


def _boxes(boxes: Tensor, size: tuple[int, int]) -> Boxes:
    """Return boxes (T, 4) as torchvision's type, which includes the size (height, width) of their image."""
    return tv_tensors.BoundingBoxes(boxes.as_subclass(Tensor), format="XYXY", canvas_size=size, device=boxes.device)


def _rotate_90(scene: Scene) -> Scene:
    """Rotate by 90 degrees counterclockwise: the right side becomes the top."""
    image = scene.image
    image = image.transpose(Image.Transpose.ROTATE_90) if isinstance(image, Image.Image) else image.rot90(1, (-2, -1))
    x0, y0, x1, y1 = scene.boxes.as_subclass(Tensor).unbind(dim=1)
    width = scene.size[1]
    boxes = torch.stack((y0, width - x1, y1, width - x0), dim=1)
    return make_scene(image, boxes, scene.labels)


def _resize(scene: Scene, size: tuple[int, int]) -> Scene:
    """Resize to (height, width) in the same way as ``images.resize``."""
    if scene.size == size:
        return scene
    image, boxes = (F.resize(part, list(size), antialias=True) for part in (scene.image, scene.boxes))
    return Scene(image, boxes, scene.labels)


def _crop_and_pad(
    scene: Scene, top: int, left: int, height: int, width: int, background: tuple[float, float, float] = (0, 0, 0)
) -> Scene:
    """Crop a window. Where it extends beyond the image, it is filled with the background colour, in [0, 1].

    Boxes are clipped to the window and to the original image; boxes that become empty are removed.
    """
    image, boxes = scene.image, scene.boxes
    low = max(-left, 0), max(-top, 0)
    high = max(left + width - scene.size[1], 0), max(top + height - scene.size[0], 0)
    if any((*low, *high)):
        relative = isinstance(image, Tensor) and image.is_floating_point()
        colour = list(background) if relative else [round(value * 255) for value in background]
        fill = colour if isinstance(image, Tensor) else tuple(colour)
        image, boxes = (F.pad(part, [*low, *high], fill=fill) for part in (image, boxes))
        left, top = left + low[0], top + low[1]
    image, boxes = (F.crop(part, top, left, height, width) for part in (image, boxes))
    boxes = F.clamp_bounding_boxes(boxes)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).as_subclass(Tensor)
    return Scene(image, _boxes(boxes[kept], (height, width)), scene.labels[kept])


def _random_uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float32, device="cpu"))


def _random_log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Return a number whose logarithm is uniformly distributed: doubling is as likely as halving."""
    return math.exp(_random_uniform(math.log(low), math.log(high), generator))


def _random_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Return a random integer in [low, high], both included."""
    return int(torch.randint(low, high + 1, (), generator=generator, device="cpu"))


def _random_choice(values: tuple[int, ...], generator: torch.Generator) -> int:
    return values[_random_integer(0, len(values) - 1, generator)]


def _random_bool(probability: float, generator: torch.Generator) -> bool:
    return probability > 0 and _random_uniform(0, 1, generator) < probability
