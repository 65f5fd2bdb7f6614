"""Convert detections to the formats of other programs."""

import numbers
from typing import Any

import numpy as np
from torch import Tensor
from torchvision.ops import box_convert


class Conversions:
    """What :class:`~conditional_detr.Detections` can be converted to; see there for the attributes."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    size: tuple[int, int]

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
                for box, score, label, name in zip(
                    self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names, strict=True
                )
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
            for box, score, name in zip(self.boxes.tolist(), self.scores.tolist(), self.names, strict=True)
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

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with a row per detection.

        The columns are x0, y0, x1, y1 in pixels, score, label, name and category_id.

        Raises:
            ImportError: the package pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs the package pandas: pip install pandas") from error
        columns = dict(zip(("x0", "y0", "x1", "y1"), self.boxes.numpy().T, strict=True))
        columns |= {"score": self.scores.numpy(), "label": self.labels.numpy()}
        return pandas.DataFrame({**columns, "name": list(self.names), "category_id": list(self.category_ids)})
