"""Check boxes from elsewhere, such as annotations, and convert them to what Detections hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchvision.ops import box_convert, clip_boxes_to_image

from conditional_detr.inference.images import open_image, size_of
from conditional_detr.inference.sources import ImageSource, resolve_source, source_state


def fields_of_boxes(
    boxes: Any,
    *,
    names: Sequence[str],
    scores: Any,
    labels: Sequence[int] | None,
    category_ids: Sequence[int] | None,
    image: ImageSource | None,
    size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return the fields of Detections; the arguments and errors are those of ``Detections.from_boxes``."""
    if (image is None) == (size is None):
        raise ValueError(f"expected either image or size, got {'neither' if image is None else 'both'}")
    source = None if image is None else resolve_source(image, "image")
    size = size_of(open_image(source, "image")) if source is not None else size
    assert size is not None  # one of both was given
    corners = torch.as_tensor(boxes, dtype=torch.float32, device="cpu").reshape(-1, 4)
    given = torch.as_tensor([1.0] * len(corners) if scores is None else scores, dtype=torch.float32, device="cpu")
    sorted_names = sorted(set(names))
    labels = [sorted_names.index(name) for name in names] if labels is None else labels
    category_ids = labels if category_ids is None else category_ids
    counts = {"boxes": len(corners), "names": len(names), "scores": len(given), "labels": len(labels)}
    counts["category_ids"] = len(category_ids)
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected equal numbers of values, got {counts}")
    for i, corner in enumerate(corners):
        if not bool(corner.isfinite().all()) or bool((corner[2:] < corner[:2]).any()):
            raise ValueError(f"boxes[{i}]: expected finite x0 y0 x1 y1, x0 <= x1 and y0 <= y1, got {corner.tolist()}")
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise ValueError(f"scores: expected 0..1, got {given.tolist()}")
    return {
        "boxes": clip_boxes_to_image(corners, size),
        "scores": given,
        "labels": torch.tensor(labels, dtype=torch.int64, device="cpu"),
        "names": tuple(names),
        "category_ids": tuple(category_ids),
        "queries": torch.full((len(corners),), -1, device="cpu"),
        "size": size,
        "source": source,
        "state": None if source is None else source_state(source),
    }


def values_of_coco(entries: Sequence[Mapping[str, Any]], categories: Mapping[int, str]) -> dict[str, Any]:
    """Return the arguments of ``Detections.from_boxes`` for entries in COCO's format.

    Raises:
        ValueError: an entry without a box, or of an unknown category.
    """
    for i, entry in enumerate(entries):
        if entry.get("category_id") not in categories or len(entry.get("bbox") or ()) != 4:
            raise ValueError(f"entries[{i}]: expected a bbox and a category_id of categories, got {dict(entry)}")
    ids, order = [entry["category_id"] for entry in entries], sorted(categories)
    boxes = torch.tensor([entry["bbox"] for entry in entries], dtype=torch.float32, device="cpu").reshape(-1, 4)
    return {
        "boxes": box_convert(boxes, "xywh", "xyxy"),
        "names": [categories[category] for category in ids],
        "scores": [entry.get("score", 1.0) for entry in entries],
        "labels": [order.index(category) for category in ids],
        "category_ids": ids,
    }
