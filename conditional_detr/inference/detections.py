"""What was found on one image: read it, go through it, draw it, write it."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area, box_convert

from conditional_detr.inference.drawing import draw_boxes
from conditional_detr.inference.images import open_image, to_pil
from conditional_detr.inference.sources import ReadableSource

Detection: TypeAlias = tuple[list[float], float, str]
"""Box [x0, y0, x1, y1] in pixels, score, class name."""

_SHOWN = 5  # how many objects repr spells out


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The objects found on one image, best first.

    ``found[0]`` is one (box, score, name), as iterating gives them; ``found[:5]``, ``found[found.scores > 0.9]`` and
    ``found[[0, 2]]`` are Detections again.

    Attributes:
        boxes: (K, 4) float32, x0 y0 x1 y1 in pixels of the image as it was given, inside it.
        scores: (K,) float32, in [0, 1].
        labels: (K,) int64, rows of the class head.
        names: K class names.
        category_ids: K ids of the classes in the data set the model was trained on.
        queries: (K,) int64, the object query that found it.
        size: (height, width) of the image in pixels.
        source: the image itself: a path, or the object that was given; of an address, base64 or an open file, the
            bytes that were read.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    queries: Tensor
    size: tuple[int, int]
    source: ReadableSource

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Detection]:
        """Give box [x0, y0, x1, y1], score and name of each object."""
        return iter(zip(self.boxes.tolist(), self.scores.tolist(), self.names, strict=True))

    @overload
    def __getitem__(self, which: int) -> Detection: ...

    @overload
    def __getitem__(self, which: slice | Sequence[int] | Tensor | np.ndarray) -> "Detections": ...

    def __getitem__(self, which: int | slice | Sequence[int] | Tensor | np.ndarray) -> "Detection | Detections":
        if isinstance(which, slice):
            return self._take(range(len(self))[which])
        scalar = isinstance(which, Tensor | np.ndarray) and which.ndim == 0
        if scalar or not isinstance(which, Tensor | np.ndarray | Sequence):
            place = operator.index(which.item() if scalar else which)  # type: ignore[union-attr, arg-type]
            return self.boxes[place].tolist(), self.scores[place].item(), self.names[place]
        if isinstance(which, str):  # type: ignore[unreachable]  # the annotation asks, this checks
            raise TypeError(f"expected a place, a slice or several places, got {which!r}; filter() takes names")
        chosen = torch.as_tensor(which)
        if chosen.dtype == torch.bool and chosen.shape == (len(self),):
            return self._take(chosen.nonzero().flatten().tolist())
        if chosen.dim() == 1 and (not len(chosen) or not (chosen.dtype == torch.bool or chosen.is_floating_point())):
            return self._take(chosen.tolist())
        raise IndexError(f"expected {len(self)} bools or some whole numbers, got {chosen.dtype} {tuple(chosen.shape)}")

    def __repr__(self) -> str:
        found = [f"{name} {score:.2f}" for _, score, name in self[:_SHOWN]]
        rest = [f"and {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return f"Detections({len(self)} on {self.size[0]}x{self.size[1]}: {', '.join(found + rest)})"

    def filter(self, *, threshold: float = 0.0, classes: Iterable[str | int] | None = None) -> "Detections":
        """Keep some of the objects.

        Args:
            threshold: keep those that score above this.
            classes: keep those of these names or rows; None: all.

        Raises:
            TypeError: one string in place of a list of names.
        """
        if isinstance(classes, str):
            raise TypeError(f"classes: expected a list of names or rows, got the string {classes!r}")
        wanted = None if classes is None else set(classes)
        return self._take(
            [
                place
                for place, (score, label, name) in enumerate(
                    zip(self.scores.tolist(), self.labels.tolist(), self.names, strict=True)
                )
                if score > threshold and (wanted is None or name in wanted or label in wanted)
            ]
        )

    def sort(self, by: Literal["score", "area", "name", "x", "y"] = "score") -> "Detections":
        """Order the objects: the best, the largest, or the first by name, from the left or from the top, first.

        Raises:
            ValueError: another ``by``.
        """
        keys: dict[str, Sequence[Any]] = {
            "score": (-self.scores).tolist(),
            "area": (-box_area(self.boxes)).tolist(),
            "name": self.names,
            "x": self.boxes[:, 0].tolist(),
            "y": self.boxes[:, 1].tolist(),
        }
        if by not in keys:
            raise ValueError(f"by: expected any of {', '.join(keys)}, got {by!r}")
        return self._take(sorted(range(len(self)), key=keys[by].__getitem__))

    def draw(self, *, font: str | Path | None = None) -> Image.Image:
        """Return the image with its boxes, names and scores drawn; the image is opened anew.

        Args:
            font: a TrueType file, for names in a script that PIL's own font does not have.

        Raises:
            OSError: the image's file is gone, or the font cannot be read.
        """
        image = to_pil(open_image(self.source, "image"))
        return draw_boxes(
            image, self.boxes.tolist(), self.labels.tolist(), self.names, self.scores.tolist(), font=font
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the image as plain numbers and strings, for json."""
        return {
            "size": {"height": self.size[0], "width": self.size[1]},
            "detections": [
                {"box": box, "score": score, "label": label, "name": name}
                for (box, score, name), label in zip(self, self.labels.tolist(), strict=True)
            ],
        }

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """Return COCO's list of results, as pycocotools' ``loadRes`` reads it.

        Args:
            image_id: the image's id in the data set.

        Returns:
            K of {"image_id", "category_id", "bbox": [x, y, width, height] in pixels, "score"}.
        """
        boxes = box_convert(self.boxes, "xyxy", "xywh").tolist()
        return [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(self.category_ids, boxes, self.scores.tolist(), strict=True)
        ]

    def to_torchvision(self) -> dict[str, Tensor]:
        """Return "boxes" (K, 4) x0 y0 x1 y1, "scores" (K,) and "labels" (K,).

        What torchvision's detection models return for an image, and transformers'
        ``post_process_object_detection``.
        """
        return {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}

    def to_transformers(self) -> list[dict[str, Any]]:
        """Return what transformers' pipeline "object-detection" returns for an image, boxes not rounded.

        Returns:
            K of {"score", "label": the name, "box": {"xmin", "ymin", "xmax", "ymax"} in pixels}.
        """
        return [
            {"score": score, "label": name, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}
            for box, score, name in self
        ]

    def to_supervision(self) -> Any:
        """Return a ``supervision.Detections``, the names under ``data["class_name"]``.

        Raises:
            ImportError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs the package supervision: pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def _take(self, places: Sequence[int]) -> "Detections":
        """Return the objects at some places, in that order."""
        rows = torch.tensor(places, dtype=torch.int64)
        return replace(
            self,
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            names=tuple(self.names[place] for place in places),
            category_ids=tuple(self.category_ids[place] for place in places),
            queries=self.queries[rows],
        )
