"""Detections on one image: index, filter, sort, draw and convert them."""

import numbers
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
from conditional_detr.inference.images import open_image, size_of, to_pil
from conditional_detr.inference.sources import ImageSource, ReadableSource, source_state

Detection: TypeAlias = tuple[list[float], float, str]
"""Box [x0, y0, x1, y1] in pixels, score, class name."""

_MAX_IN_REPR = 5


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
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

    def draw(self, image: ImageSource | None = None, *, font: str | Path | None = None) -> Image.Image:
        """Open the image again, draw the boxes with class names and scores, and return it.

        Args:
            image: the image to draw on; default: the source.
            font: path of a TrueType font, for scripts that PIL's built-in font does not support.

        Returns:
            An RGB image of the size of the original.

        Raises:
            OSError: the image or the font cannot be read, or the image has changed since the detection.
            ValueError: the image was not kept and none is given, or it has another size.
        """
        opened = self.open_source() if image is None else open_image(image, "image")
        if size_of(opened) != self.size:
            (height, width), expected = size_of(opened), self.size
            raise ValueError(
                f"image: expected the detected one of {expected[1]} x {expected[0]} pixels, got {width} x {height}"
            )
        image = to_pil(opened)
        return draw_boxes(
            image, self.boxes.tolist(), self.labels.tolist(), self.names, self.scores.tolist(), font=font
        )

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

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings for JSON.

        Returns:
            {"size": {"height", "width"}, "detections": K of {"box": [x0, y0, x1, y1], "score", "label", "name"}}, the
            size and boxes in pixels.
        """
        return {
            "size": {"height": self.size[0], "width": self.size[1]},
            "detections": [
                {"box": box, "score": score, "label": label, "name": name}
                for (box, score, name), label in zip(self, self.labels.tolist(), strict=True)
            ],
        }

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Return results in COCO's format, which pycocotools' ``loadRes`` reads.

        Args:
            image_id: id of the image in the dataset.

        Returns:
            K of {"image_id", "category_id", "bbox": [x, y, width, height] in pixels, "score"}.

        Raises:
            TypeError: the image id is neither an integer nor a string.
        """
        if isinstance(image_id, bool) or not isinstance(image_id, str | numbers.Integral):
            raise TypeError(f"image_id: expected an integer or a string, got {image_id!r}")
        image_id = image_id if isinstance(image_id, str) else int(image_id)  # json cannot write numpy's integers
        boxes = box_convert(self.boxes, "xyxy", "xywh").tolist()
        return [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(self.category_ids, boxes, self.scores.tolist(), strict=True)
        ]

    def to_torchvision(self) -> dict[str, Tensor]:
        """Return the dictionary that torchvision's detection models return for an image.

        transformers' ``post_process_object_detection`` returns the same.

        Returns:
            {"boxes": (K, 4) x0 y0 x1 y1 in pixels, "scores": (K,), "labels": (K,)}.
        """
        return {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}

    def to_transformers(self) -> list[dict[str, Any]]:
        """Return the list that transformers' pipeline "object-detection" returns for an image.

        Returns:
            K of {"score", "label": class name, "box": {"xmin", "ymin", "xmax", "ymax"} in pixels, not rounded}.
        """
        return [
            {"score": score, "label": name, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}
            for box, score, name in self
        ]

    def to_supervision(self) -> Any:
        """Return a ``supervision.Detections`` with the class names in ``data["class_name"]``.

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
