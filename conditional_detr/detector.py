"""Pictures in, detections out."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from conditional_detr.detections import Detections
from conditional_detr.images import Picture, open_picture, size_of, to_pixels
from conditional_detr.model import ConditionalDETR, Output

PUBLISHED = "microsoft/conditional-detr-resnet-50"


class Detector:
    """A model with everything around it: from pictures of any size to named boxes.

    Args:
        model: the model; its metadata says how pictures are prepared and what the classes are called. Where it is
            and in which mode stays as it is.

    Raises:
        TypeError: not a ConditionalDETR.
    """

    def __init__(self, model: ConditionalDETR) -> None:
        if not isinstance(model, ConditionalDETR):
            raise TypeError(f"model: expected a ConditionalDETR, got {type(model).__name__}")
        self.model = model

    @classmethod
    def from_pretrained(cls, name: str | Path = PUBLISHED, **options: Any) -> "Detector":
        """Load a checkpoint: see :func:`conditional_detr.weights.from_pretrained`."""
        return cls(ConditionalDETR.from_pretrained(name, **options))

    @overload  # a string is also a sequence of strings: the first match, one picture, is meant
    def __call__(  # type: ignore[overload-overlap]
        self,
        pictures: Picture,
        *,
        threshold: float = ...,
        top_k: int = ...,
        classes: Sequence[str | int] | None = ...,
        batch_size: int = ...,
    ) -> Detections: ...

    @overload
    def __call__(
        self,
        pictures: Sequence[Picture],
        *,
        threshold: float = ...,
        top_k: int = ...,
        classes: Sequence[str | int] | None = ...,
        batch_size: int = ...,
    ) -> list[Detections]: ...

    def __call__(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        threshold: float = 0.5,
        top_k: int = 100,
        classes: Sequence[str | int] | None = None,
        batch_size: int = 8,
    ) -> Detections | list[Detections]:
        """Detect objects on one picture or on a list of them.

        Pictures that come out at the same size run together, others apart: none is ever padded, so a list gives what
        its pictures give one by one.

        Args:
            pictures: a path, PIL image, array (H, W, 3) or (H, W), or tensor (3, H, W); or a list of such.
            threshold: objects must score above this, in [0, 1].
            top_k: the most objects a picture, the best.
            classes: names or rows of the classes to report; None: all.
            batch_size: the most pictures that run together.

        Returns:
            One Detections for one picture; a list of them for a list, also of one.

        Raises:
            OSError: a file that cannot be read.
            TypeError: a picture or an argument of the wrong type.
            ValueError: a file that is no picture, a class that the model does not have, a number out of its range.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected 0..1, got {threshold}")
        for name, count in (("top_k", top_k), ("batch_size", batch_size)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {count!r}")
        rows = self._rows(classes)
        if isinstance(pictures, str | Path | Image.Image | np.ndarray | Tensor):
            return self._detect([pictures], ["picture"], rows, threshold, top_k, batch_size)[0]
        if not isinstance(pictures, Sequence):
            raise TypeError(f"pictures: expected a picture or a list of them, got {type(pictures).__name__}")
        names = [f"images[{place}]" for place in range(len(pictures))]
        return self._detect(pictures, names, rows, threshold, top_k, batch_size)

    def _detect(
        self,
        pictures: Sequence[Picture],
        names: Sequence[str],
        rows: Tensor,
        threshold: float,
        top_k: int,
        batch_size: int,
    ) -> list[Detections]:
        """Run pictures of one shape together, and put the results in the pictures' order."""
        found: dict[int, Detections] = {}
        waiting: dict[tuple[int, ...], list[tuple[int, tuple[int, int], Tensor]]] = {}

        def run(group: list[tuple[int, tuple[int, int], Tensor]]) -> None:
            output = self._forward(torch.stack([pixels for _, _, pixels in group]))
            for i, (place, size, _) in enumerate(group):
                boxes, scores, labels = select(output, i, size, rows, threshold, top_k)
                called = tuple(str(self.model.metadata.class_names[label]) for label in labels.tolist())
                found[place] = Detections(boxes, scores, labels, called, size, pictures[place])

        for place, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            opened = open_picture(picture, name)
            pixels = to_pixels(opened, self.model.metadata.preprocessing)
            group = waiting.setdefault(tuple(pixels.shape), [])
            group.append((place, size_of(opened), pixels))
            if len(group) == batch_size:
                run(waiting.pop(tuple(pixels.shape)))
        for group in waiting.values():
            run(group)
        return [found[place] for place in range(len(pictures))]

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> Output:
        """Run the model in eval mode, where it is, and leave its mode as it was."""
        weight = self.model.projection.weight
        training = self.model.training
        self.model.eval()
        try:
            output = self.model(pixels.to(weight.device, weight.dtype))
        finally:
            self.model.train(training)
        named = len(self.model.metadata.class_names)
        if output.logits.shape[-1] != named:
            raise ValueError(
                f"model: its class head has {output.logits.shape[-1]} classes, but its metadata names {named};"
                " give it metadata that names them: model.metadata = Metadata(names)"
            )
        return Output(output.logits.float().cpu(), output.boxes.float().cpu())

    def _rows(self, classes: Iterable[str | int] | None) -> Tensor:
        """Return the rows of the class head to report: named ones, and of those the wanted ones."""
        names = self.model.metadata.class_names
        used = [i for i, name in enumerate(names) if name is not None]
        if classes is None:
            return torch.tensor(used)
        if isinstance(classes, str):
            raise TypeError(f"classes: expected a list of names or rows, got the string {classes!r}")
        wanted = []
        for wish in classes:
            row = names.index(wish) if isinstance(wish, str) and wish in names else wish
            if row not in used:
                raise ValueError(
                    f"classes: got {wish!r}, expected any of {', '.join(str(names[i]) for i in used)}, or their rows"
                )
            wanted.append(row)
        return torch.tensor(sorted(set(wanted)), dtype=torch.int64)


def select(
    output: Output, picture: int, size: tuple[int, int], rows: Tensor, threshold: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the best query-class pairs of one picture.

    Args:
        output: the model's, of a batch.
        picture: which of the batch.
        size: (height, width) of the picture in pixels.
        rows: (R,) rows of the class head to choose from.
        threshold: scores must be above this.
        top_k: the most pairs.

    Returns:
        boxes (K, 4) x0 y0 x1 y1 in pixels, inside the picture; scores (K,); labels (K,); best first.
    """
    scores = output.logits[-1, picture][:, rows].sigmoid().flatten()  # (N·R,)
    scores, pairs = scores.topk(min(top_k, len(scores)))
    pairs, scores = pairs[scores > threshold], scores[scores > threshold]
    queries, labels = pairs // len(rows), rows[pairs % len(rows)]
    height, width = size
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = box_convert(output.boxes[-1, picture][queries], "cxcywh", "xyxy") * limits
    return torch.minimum(boxes.clamp(min=0), limits), scores, labels
