"""Augmentation: an image and its boxes are changed together, by numbers drawn from one generator.

torchvision's ``transforms.v2`` does the changing, its functions, not its random classes: those draw from the global
generator, so what an image becomes would depend on workers and on what ran before.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from conditional_detr.inference.images import resized_size
from conditional_detr.modeling.metadata import Preprocessing

Boxes: TypeAlias = Any  # tv_tensors.BoundingBoxes; torchvision has no types
_ANY_LENGTH = 2**31 - 1
_TRIES = 10  # windows that are drawn in search of one with an object


class Scene(NamedTuple):
    """An image with its objects.

    Attributes:
        image: a PIL image in RGB, or a tensor (3, H, W) in [0, 1].
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
    """What may be done to an image, in this order; as it stands, nothing but the resizing that every image gets.

    Attributes:
        horizontal_flip: the probability of left becoming right.
        vertical_flip: the probability of top becoming bottom.
        quarter_turn: the probability of a turn by 90 degrees to the left. The image keeps its size: what then is too
            long is cut off at a random place, what is too short filled up with the mean colour. An object remains if
            its centre does. If there are objects, at least one remains.
        crop: the probability of the authors' crop: the image is resized to one of ``crop_edges`` and a rectangle cut
            out; what remains of an object remains, however little.
        crop_edges: lengths of the shorter side, of which one is drawn before cropping.
        crop_sides: the least and the most pixels of a side of the rectangle.
        zoom: the least and the greatest magnification; below 1 the image shrinks, on a ground of the mean colour.
            The size of the pixels is as if there were no zoom. An object remains if its centre does. If there are
            objects, at least one remains.
        stretch: the most that one side is magnified over the other by the zoom, such as 1.2; either may be.
        shortest_edges: lengths of the shorter side, of which one is drawn; none: the preprocessing's.
        longest_edge: the most pixels of the longer side with ``shortest_edges``; None: the preprocessing's.
        brightness: the most that it changes, as a share of it; so contrast and saturation.
        contrast: see brightness.
        saturation: see brightness.
        hue: the most that it turns, in full turns, up to 0.5.

    Raises:
        ValueError: a probability or share outside [0, 1], sizes that are not positive or in the wrong order.
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
                raise ValueError(f"{name}: expected the least and the greatest, above 0, got {pair}")
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
    def paper(cls) -> "Augmentation":
        """What the authors train with, as DETR: flip, crop, the shorter side 480 to 800, the longer at most 1333."""
        return cls(horizontal_flip=0.5, crop=0.5, shortest_edges=tuple(range(480, 801, 32)), longest_edge=1333)

    @classmethod
    def small(cls, *, vertical_flip: bool = False, quarter_turn: bool = False) -> "Augmentation":
        """For hundreds of images rather than a hundred thousand: flip, zoom, stretch and colour, sizes as they are.

        Pixels have the size that the preprocessing says, so batches of a data set of one size are never padded.

        Args:
            vertical_flip: whether upside down is as likely as upright, as under a microscope or from above.
            quarter_turn: whether turned by 90 degrees is.
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

    def __call__(self, scene: Scene, preprocessing: Preprocessing, generator: torch.Generator) -> Scene:
        """Change an image and its objects, and resize it.

        Args:
            scene: the image as it is in its file.
            preprocessing: the size, where this says none; the mean colour.
            generator: all that decides what becomes of the image.

        Returns:
            The image at its size for the model; the objects that remain, their boxes clipped to the image.
        """
        if _chance(self.horizontal_flip, generator):
            scene = Scene(F.horizontal_flip(scene.image), F.horizontal_flip(scene.boxes), scene.labels)
        if _chance(self.vertical_flip, generator):
            scene = Scene(F.vertical_flip(scene.image), F.vertical_flip(scene.boxes), scene.labels)
        if _chance(self.crop, generator):
            scene = self._cropped(scene, generator)
        size = resized_size(*scene.size, self._sizes(preprocessing, generator))
        window = scene.size
        if turned := _chance(self.quarter_turn, generator):
            scene = _turned(scene)
        if turned or any(value != 1 for value in (*self.zoom, self.stretch)):
            scene = self._zoomed(scene, window, preprocessing, generator)
        scene = _resize(scene, size)
        return Scene(self._coloured(scene.image, generator), scene.boxes, scene.labels)

    def _sizes(self, preprocessing: Preprocessing, generator: torch.Generator) -> Preprocessing:
        """Return the lengths of sides that hold for one image."""
        if not self.shortest_edges:
            return preprocessing
        shortest = _one_of(self.shortest_edges, generator)
        return Preprocessing(shortest, max(self.longest_edge or preprocessing.longest_edge, shortest))

    def _cropped(self, scene: Scene, generator: torch.Generator) -> Scene:
        """Cut a rectangle of random size and place out of the image, at a random scale."""
        edge = _one_of(self.crop_edges, generator)
        scene = _resize(scene, resized_size(*scene.size, Preprocessing(edge, _ANY_LENGTH)))
        least, most = self.crop_sides
        height, width = (_whole(least, min(side, most), generator) for side in scene.size)
        top, left = (
            _whole(0, whole - part, generator) for whole, part in zip(scene.size, (height, width), strict=True)
        )
        return _cut_out(scene, top, left, height, width)

    def _zoomed(
        self, scene: Scene, size: tuple[int, int], preprocessing: Preprocessing, generator: torch.Generator
    ) -> Scene:
        """Cut out a window around a random place; one that is larger than the image is filled up.

        Args:
            scene: the image.
            size: height and width of the window where nothing is magnified.
            preprocessing: for the mean colour.
            generator: decides.
        """
        height, width = size
        centres = (scene.boxes[:, :2] + scene.boxes[:, 2:]).as_subclass(Tensor) / 2
        for _ in range(_TRIES):
            zoom = _log_uniform(*self.zoom, generator)
            stretch = math.sqrt(_log_uniform(1 / self.stretch, self.stretch, generator))
            window = max(round(height / zoom * stretch), 1), max(round(width / zoom / stretch), 1)
            # inside the image, or around it
            top, left = (
                _whole(min(0, whole - part), max(0, whole - part), generator)
                for whole, part in zip(scene.size, window, strict=True)
            )
            corner = torch.tensor([left, top])
            inside = ((centres >= corner) & (centres <= corner + torch.tensor(window[::-1]))).all(dim=1)
            if inside.any() or not len(centres):
                break
        else:
            return scene
        scene = Scene(scene.image, _boxes(scene.boxes[inside], scene.size), scene.labels[inside])
        return _cut_out(scene, top, left, *window, ground=preprocessing.mean)

    def _coloured(self, image: Image.Image | Tensor, generator: torch.Generator) -> Image.Image | Tensor:
        """Change the colours of an image."""
        changes = (
            (self.brightness, F.adjust_brightness),
            (self.contrast, F.adjust_contrast),
            (self.saturation, F.adjust_saturation),
        )
        for share, change in changes:
            if share:
                image = change(image, _uniform(1 - share, 1 + share, generator))
        if self.hue:
            image = F.adjust_hue(image, _uniform(-self.hue, self.hue, generator))
        return image


def scene_of(image: Image.Image | Tensor, boxes: Tensor, labels: Tensor) -> Scene:
    """Put an image together with its objects.

    Args:
        image: what ``images.open_image`` returned.
        boxes: (T, 4) x0 y0 x1 y1 in its pixels.
        labels: (T,) int64.
    """
    if isinstance(image, Tensor):
        image = tv_tensors.Image(image)
    height, width = F.get_size(image)
    return Scene(image, _boxes(boxes, (height, width)), labels)


def _boxes(boxes: Tensor, size: tuple[int, int]) -> Boxes:
    """Return boxes (T, 4) that know the size (height, width) of their image."""
    return tv_tensors.BoundingBoxes(boxes.as_subclass(Tensor), format="XYXY", canvas_size=size)


def _turned(scene: Scene) -> Scene:
    """Turn by 90 degrees to the left: what was right is at the top."""
    image = scene.image
    image = image.transpose(Image.Transpose.ROTATE_90) if isinstance(image, Image.Image) else image.rot90(1, (-2, -1))
    x0, y0, x1, y1 = scene.boxes.as_subclass(Tensor).unbind(dim=1)
    width = scene.size[1]
    boxes = torch.stack((y0, width - x1, y1, width - x0), dim=1)
    return scene_of(image, boxes, scene.labels)


def _resize(scene: Scene, size: tuple[int, int]) -> Scene:
    """Resize to (height, width), as ``images.resize`` does."""
    if scene.size == size:
        return scene
    image, boxes = (F.resize(part, list(size), antialias=True) for part in (scene.image, scene.boxes))
    return Scene(image, boxes, scene.labels)


def _cut_out(
    scene: Scene, top: int, left: int, height: int, width: int, ground: tuple[float, float, float] = (0, 0, 0)
) -> Scene:
    """Cut out a window; where it reaches beyond the image it gets the ground's colour, in [0, 1].

    Boxes are clipped to the window and to what was the image; those of which nothing remains are left out.
    """
    image, boxes = scene.image, scene.boxes
    low = max(-left, 0), max(-top, 0)
    high = max(left + width - scene.size[1], 0), max(top + height - scene.size[0], 0)
    if any((*low, *high)):
        colour = [value * (1 if isinstance(image, Tensor) else 255) for value in ground]
        fill = colour if isinstance(image, Tensor) else tuple(round(value) for value in colour)
        image, boxes = (F.pad(part, [*low, *high], fill=fill) for part in (image, boxes))
        left, top = left + low[0], top + low[1]
    image, boxes = (F.crop(part, top, left, height, width) for part in (image, boxes))
    boxes = F.clamp_bounding_boxes(boxes)
    remains = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).as_subclass(Tensor)
    return Scene(image, _boxes(boxes[remains], (height, width)), scene.labels[remains])


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _log_uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draw so that doubling is as likely as halving."""
    return math.exp(_uniform(math.log(low), math.log(high), generator))


def _whole(low: int, high: int, generator: torch.Generator) -> int:
    """Draw a whole number, either end included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def _one_of(values: tuple[int, ...], generator: torch.Generator) -> int:
    return values[_whole(0, len(values) - 1, generator)]


def _chance(probability: float, generator: torch.Generator) -> bool:
    return probability > 0 and _uniform(0, 1, generator) < probability
