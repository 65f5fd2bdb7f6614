"""Detections on one image: index, filter, sort, draw and convert them."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area

from conditional_detr.inference.conversions import Conversions
from conditional_detr.inference.drawing import draw_boxes, side_by_side
from conditional_detr.inference.given_boxes import fields_of_boxes, values_of_coco
from conditional_detr.inference.images import open_image, size_of, to_pil
from conditional_detr.inference.sources import ImageSource, ReadableSource, source_state

Detection: TypeAlias = tuple[list[float], float, str]
"""Box [x0, y0, x1, y1] in pixels, score, class name."""

_MAX_IN_REPR = 5


@dataclass(frozen=True, eq=False, repr=False)
class Detections(Conversions):
    """Detections on one image, as :class:`~conditional_detr.Detector` returns them: the highest score is first.

    K is the number of detections, ``len(detections)``; it may be 0. All tensors are on the CPU.

    Example::

        detections = detector("street.jpg", threshold=0.5)
        for box, score, name in detections:       # [x0, y0, x1, y1] in pixels, float, str
            print(name, score, box)
        detections[0]                             # one (box, score, name)
        detections[:5]                            # a slice, a mask or a list of indices gives Detections
        detections[detections.scores > 0.9]
        detections.filter(classes=["person", "car"]).sort("area").draw().save("out.png")

    Attributes:
        boxes: (K, 4) float32, corners x0 y0 x1 y1 in pixels of the original image, clipped to the image:
            0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height.
        scores: (K,) float32, in [0, 1].
        labels: (K,) int64, row of the class head, in [0, C).
        names: K class names.
        category_ids: K category ids of the dataset that the model was trained on, such as COCO's 1..90.
        queries: (K,) int64, object query of each detection, in [0, N). One query may have several detections.
            -1 for detections that are merged from tiles or augmented images.
        size: (height, width) of the original image in pixels.
        source: the image, for :meth:`draw`: a path, the given object, or the bytes of a URL, base64 or open file;
            None if it was not kept, as for images from an iterator.
        state: state of the source when it was opened, to notice that a file was replaced or an array overwritten;
            None if the source cannot change, or is not to be compared.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    queries: Tensor
    size: tuple[int, int]
    source: ReadableSource | None
    state: tuple[int, ...] | None = None

    @classmethod
    def from_boxes(
        cls,
        boxes: Any,
        names: Sequence[str],
        *,
        image: ImageSource | None = None,
        size: tuple[int, int] | None = None,
        scores: Any = None,
        labels: Sequence[int] | None = None,
        category_ids: Sequence[int] | None = None,
    ) -> "Detections":
        """Make detections of boxes from elsewhere, such as annotations, to draw, filter, compare and convert them.

        Args:
            boxes: (K, 4) x0 y0 x1 y1 in pixels, as a list, array or tensor; they are clipped to the image.
            names: K class names.
            image: the image, kept to draw on it.
            size: (height, width) of the image, without ``image``.
            scores: K scores in [0, 1]; None: all 1. The order stays.
            labels: K class indices; None: indices into the sorted class names.
            category_ids: K category ids; None: the labels.

        Raises:
            OSError: the image cannot be read.
            ValueError: different numbers of values, a box that is not four finite numbers or ends before it begins, a
                score outside of [0, 1], or both or neither of ``image`` and ``size``.
        """
        values = {"names": names, "scores": scores, "labels": labels, "category_ids": category_ids}
        return cls(**fields_of_boxes(boxes, image=image, size=size, **values))

    @classmethod
    def from_coco(
        cls,
        entries: Sequence[Mapping[str, Any]],
        categories: Mapping[int, str],
        *,
        image: ImageSource | None = None,
        size: tuple[int, int] | None = None,
    ) -> "Detections":
        """Make detections of one image's annotations or results in COCO's format.

        Args:
            entries: of {"category_id", "bbox": [x, y, width, height] in pixels}, and "score" for results; annotations
                have the score 1.
            categories: class names by category id; labels are indices into the sorted ids.
            image: as in :meth:`from_boxes`.
            size: as in :meth:`from_boxes`.

        Raises:
            OSError, ValueError: as :meth:`from_boxes`; an entry without a box, or of an unknown category.
        """
        return cls.from_boxes(**values_of_coco(entries, categories), image=image, size=size)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Detection]:
        """Yield (box, score, name) of each detection, with the box as [x0, y0, x1, y1] in pixels."""
        return iter(zip(self.boxes.tolist(), self.scores.tolist(), self.names, strict=True))

    @overload
    def __getitem__(self, index: int) -> Detection: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | Tensor | np.ndarray) -> "Detections": ...

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor | np.ndarray) -> "Detection | Detections":
        """Return one (box, score, name) for an int; Detections for a slice, a mask (K,) of bools or several indices.

        Raises:
            IndexError: an index out of range, or a mask or indices of another shape or dtype.
            TypeError: neither of these, such as a class name.
        """
        if isinstance(index, slice):
            return self._take(range(len(self))[index])
        scalar = isinstance(index, Tensor | np.ndarray) and index.ndim == 0
        if scalar or not isinstance(index, Tensor | np.ndarray | Sequence):
            i = operator.index(index.item() if scalar else index)  # type: ignore[union-attr, arg-type]
            return self.boxes[i].tolist(), self.scores[i].item(), self.names[i]
        if isinstance(index, str):  # type: ignore[unreachable]  # callers may ignore the annotation
            raise TypeError(
                f"expected an index, a slice, a mask or indices, got {index!r}; for class names use filter()"
            )
        indices = torch.as_tensor(index, device="cpu")
        if indices.dtype == torch.bool and indices.shape == (len(self),):
            return self._take(indices.nonzero().flatten().tolist())
        if indices.dim() == 1 and (
            not len(indices) or not (indices.dtype == torch.bool or indices.is_floating_point())
        ):
            return self._take(indices.tolist())
        raise IndexError(
            f"expected a mask of {len(self)} bools or a list of integers, got {indices.dtype} {tuple(indices.shape)}"
        )

    def __repr__(self) -> str:
        shown = [f"{name} {score:.2f}" for _, score, name in self[:_MAX_IN_REPR]]
        rest = [f"and {len(self) - _MAX_IN_REPR} more"] if len(self) > _MAX_IN_REPR else []
        return f"Detections({len(self)} on {self.size[0]}x{self.size[1]}: {', '.join(shown + rest)})"

    def filter(self, *, threshold: float = 0.0, classes: Iterable[str | int] | None = None) -> "Detections":
        """Return the detections above a threshold and of some classes.

        Args:
            threshold: keep detections with a higher score, in [0, 1].
            classes: keep detections of these class names or labels; None: of all classes.

        Returns:
            New Detections, in the same order.

        Raises:
            TypeError: ``classes`` is a string instead of a list.
        """
        if isinstance(classes, str):
            raise TypeError(f"classes: expected a list of names or rows, got the string {classes!r}")
        wanted = None if classes is None else set(classes)
        return self._take(
            [
                i
                for i, (score, label, name) in enumerate(
                    zip(self.scores.tolist(), self.labels.tolist(), self.names, strict=True)
                )
                if score > threshold and (wanted is None or name in wanted or label in wanted)
            ]
        )

    def sort(self, by: Literal["score", "area", "name", "x", "y"] = "score") -> "Detections":
        """Return the detections in another order. The sort is stable.

        Args:
            by: "score" or "area": the largest first. "name": in alphabetical order. "x" or "y": the leftmost x0 or the
                topmost y0 first.

        Raises:
            ValueError: an unsupported ``by``.
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

    def draw(
        self,
        image: ImageSource | None = None,
        *,
        labels: bool | Sequence[str] = True,
        scores: bool = True,
        line_width: int | None = None,
        font: str | Path | None = None,
    ) -> Image.Image:
        """Open the image again, draw the boxes with class names and scores, and return it.

        Args:
            image: the image to draw on; default: the source.
            labels: whether to write the class names; or K texts to write instead.
            scores: whether to write the scores.
            line_width: of the boxes in pixels; default: by the size of the image.
            font: path of a TrueType font, for scripts that PIL's built-in font does not support.

        Returns:
            An RGB image of the size of the original.

        Raises:
            OSError: the image or the font cannot be read, or the image has changed since the detection.
            ValueError: the image was not kept and none is given, or it has another size; another number of labels than
                of detections, or a line width under 1.
        """
        opened = self.open_source() if image is None else open_image(image, "image")
        if size_of(opened) != self.size:
            (height, width), expected = size_of(opened), self.size
            raise ValueError(
                f"image: expected the detected one of {expected[1]} x {expected[0]} pixels, got {width} x {height}"
            )
        texts = self.names if labels is True else [""] * len(self) if labels is False else labels
        numbers = self.scores.tolist() if scores else None
        colours, boxes = self.labels.tolist(), self.boxes.tolist()
        return draw_boxes(to_pil(opened), boxes, colours, texts, numbers, line_width=line_width, font=font)

    def draw_beside(
        self, expected: "Detections", *, titles: tuple[str, str] = ("ground truth", "detections"), **options: Any
    ) -> Image.Image:
        """Draw the expected boxes and, on the right of them, these detections.

        Args:
            expected: such as the annotations of the image, from :meth:`from_coco` or :meth:`from_boxes`; drawn without
                scores.
            titles: of the left and the right half.
            options: those of :meth:`draw`.

        Raises:
            OSError, ValueError: as :meth:`draw`.
        """
        drawn = self.draw(**options)
        options.setdefault("image", self.source)
        left = expected.draw(**{**options, "scores": False})
        return side_by_side([left, drawn], titles, font=options.get("font"))

    def open_source(self) -> Image.Image | Tensor:
        """Open the image again and return it in RGB, upright, as in the detection.

        Raises:
            OSError: the image cannot be read, or it has changed since the detection.
            ValueError: the image was not kept.
        """
        if self.source is None:
            raise ValueError(
                "image: expected one to draw on, got none; images of an iterator are not kept: pass the image to"
                " draw(), or keep_images=True to the detector"
            )
        opened = open_image(self.source, "image")
        if self.state not in (None, source_state(self.source)):
            name = f"{self.source}: the file" if isinstance(self.source, Path) else "image: it"
            raise OSError(f"{name} has changed since the detection; pass the detected image to draw()")
        return opened

    def _take(self, indices: Sequence[int]) -> "Detections":
        """Return the detections at some indices, in that order."""
        rows = torch.tensor(indices, dtype=torch.int64, device="cpu")
        return replace(
            self,
            boxes=self.boxes[rows],
            scores=self.scores[rows],
            labels=self.labels[rows],
            names=tuple(self.names[i] for i in indices),
            category_ids=tuple(self.category_ids[i] for i in indices),
            queries=self.queries[rows],
        )
