"""What was found on one picture: read it, go through it, draw it, write it."""

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from conditional_detr.images import Picture, open_picture, to_pil


@dataclass(frozen=True, eq=False)
class Detections:
    """The objects found on one picture, best first.

    Attributes:
        boxes: (K, 4) float32, x0 y0 x1 y1 in pixels of the picture as it was given, inside it.
        scores: (K,) float32, in [0, 1].
        labels: (K,) int64, rows of the class head.
        names: K class names.
        size: (height, width) of the picture in pixels.
        source: the picture itself, as it was given: a path, or the object.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    size: tuple[int, int]
    source: Picture

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[list[float], float, str]]:
        """Give box [x0, y0, x1, y1], score and name of each object."""
        return iter(zip(self.boxes.tolist(), self.scores.tolist(), self.names, strict=True))

    def __repr__(self) -> str:
        found = ", ".join(f"{name} {score:.2f}" for _, score, name in self)
        return f"Detections({len(self)} on {self.size[0]}x{self.size[1]}: {found})"

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the picture as plain numbers and strings, for json."""
        return {
            "size": {"height": self.size[0], "width": self.size[1]},
            "detections": [
                {"box": box, "score": score, "label": label, "name": name}
                for (box, score, name), label in zip(self, self.labels.tolist(), strict=True)
            ],
        }

    def draw(self) -> Image.Image:
        """Return the picture with its boxes, names and scores drawn; the picture is opened anew.

        Raises:
            OSError: the picture's file is gone.
        """
        image = to_pil(open_picture(self.source, "picture")).copy()
        canvas = ImageDraw.Draw(image)
        unit = max(min(image.size) / 200, 1)  # line width: it grows with the picture
        font = ImageFont.load_default(size=max(6 * unit, 11))
        for (box, score, name), label in reversed(list(zip(self, self.labels.tolist(), strict=True))):
            colour = _colour(label)
            x0, y0, x1, y1 = (round(min(v, end - 1)) for v, end in zip(box, 2 * image.size, strict=True))
            canvas.rectangle((x0, y0, x1, y1), outline=colour, width=round(unit))
            text = f"{name} {score:.2f}"
            _, _, width, height = canvas.textbbox((0, 0), text, font=font)
            left = min(x0, max(image.width - width - 2 * unit, 0))
            top = y0 - height - unit if y0 > height + unit else y0
            canvas.rectangle((left, top, left + width + 2 * unit, top + height + unit), fill=colour)
            canvas.text((left + unit, top), text, fill=_ink(colour), font=font)
        return image


def _colour(label: int) -> tuple[int, int, int]:
    """Return a class's colour: always the same, and far from its neighbours' (golden ratio around the wheel)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


def _ink(colour: tuple[int, int, int]) -> str:
    """Return black or white, whichever reads better on a colour."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
