"""Convert logits and boxes of the model to detections: the best of its queries and classes above a threshold."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from conditional_detr.inference.thresholds import check_thresholds
from conditional_detr.modeling.scores import ClassScores, SigmoidScores

SIGMOID = SigmoidScores()


class Postprocessing(NamedTuple):
    """Post-processing options, validated for a model.

    Attributes:
        rows: (R,) int64, rows of the class head that are reported.
        threshold: only detections with a higher score are kept; or (C,) float64, one of each row of the class head.
        top_k: maximum number of detections per image.
        scores: how logits become scores of classes.
    """

    rows: Tensor
    threshold: float | Tensor
    top_k: int
    scores: ClassScores = SIGMOID

    def keeps(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return whether scores (K,) of rows of the class head (K,) are above the threshold: (K,) bool."""
        return scores > (self.threshold[labels] if isinstance(self.threshold, Tensor) else self.threshold)


def make_postprocessing(
    names: Sequence[str | None],
    *,
    threshold: float | Mapping[str, float],
    top_k: int,
    classes: Iterable[str | int] | None,
    scores: ClassScores = SIGMOID,
) -> Postprocessing:
    """Validate post-processing options and return them.

    Args:
        names: class names of the model; None for an unused row of the class head, which is never reported.
        threshold: keep only detections with a higher score, in [0, 1]; or a threshold by class name, one for each
            class that is reported.
        top_k: maximum number of detections per image.
        classes: names or class head rows of the classes to report; None: all.
        scores: how logits become scores of classes.

    Raises:
        TypeError: ``classes`` is a string instead of a list.
        ValueError: a class that the model does not have, one without threshold, or a number out of range.
    """
    check_count("top_k", top_k)
    rows = _rows(names, classes)
    if isinstance(threshold, Mapping):
        of_rows = _of_rows(names, rows, check_thresholds(threshold, class_names=names))
        return Postprocessing(rows, of_rows, top_k, scores)
    if isinstance(threshold, str):  # type: ignore[unreachable]  # callers may ignore the type annotation
        raise TypeError(f"threshold: expected a number in 0..1, or numbers by class name, got {threshold!r}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected 0..1, got {threshold}")
    return Postprocessing(rows, threshold, top_k, scores)


def postprocess(
    logits: Tensor, boxes: Tensor, size: tuple[int, int], postprocessing: Postprocessing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Convert the output for one image to detections.

    Args:
        logits: (N, C), or (N, C + 1) with a row for "no object".
        boxes: (N, 4) cx cy w h in [0, 1].
        size: (height, width) of the image in pixels.
        postprocessing: the options.

    Returns:
        boxes (K, 4) x0 y0 x1 y1 in pixels, clipped to the image; scores (K,); labels (K,); queries (K,). The highest
        score is first.
    """
    detections = top_k_detections(
        logits[None],
        boxes[None],
        torch.tensor([size], device="cpu"),
        postprocessing.rows,
        postprocessing.top_k,
        postprocessing.scores,
    )
    corners, scores, labels, queries = (x[0] for x in detections)
    kept = postprocessing.keeps(scores, labels)
    return corners[kept], scores[kept], labels[kept], queries[kept]


def top_k_detections(
    logits: Tensor, boxes: Tensor, sizes: Tensor, rows: Tensor, top_k: int, class_scores: ClassScores = SIGMOID
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the detections with the highest scores of each image.

    Args:
        logits: (B, N, C), or (B, N, C + 1) with a row for "no object".
        boxes: (B, N, 4) cx cy w h in [0, 1].
        sizes: (B, 2), height and width of each image in pixels.
        rows: (R,) int64, rows of the class head that are reported.
        top_k: maximum number of detections per image.
        class_scores: how logits become scores of classes, which decides K: at most N·R pairs of a query and a class,
            or at most N queries with their best class.

    Returns:
        boxes (B, K, 4) x0 y0 x1 y1 in pixels, clipped to the image; scores (B, K); labels (B, K); queries (B, K). The
        highest score is first. A score of 0 stands for no detection.
    """
    scores, labels, queries = class_scores.best(logits, rows, top_k)
    limits = sizes.flip(-1).repeat(1, 2)[:, None].to(torch.float32)  # (B, 1, 4) w h w h
    corners = box_convert(boxes.gather(1, queries[..., None].expand(-1, -1, 4)), "cxcywh", "xyxy") * limits
    return torch.minimum(corners.clamp(min=0), limits), scores, labels, queries


def check_head(rows: int, names: Sequence[str | None]) -> None:
    """Raise ValueError unless the metadata has a class name, or None, for each row of the class head."""
    if rows != len(names):
        raise ValueError(
            f"model.metadata: expected {rows} class names, one for each row of the class head, got {len(names)};"
            " set model.metadata = Metadata(class_names)"
        )


def check_count(name: str, count: Any) -> None:
    """Raise ValueError unless a count is an int of at least 1."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {count!r}")


def named_rows(names: Sequence[str | None]) -> Tensor:
    """Return the rows of the class head that have a class name, (R,) int64."""
    return torch.tensor([i for i, name in enumerate(names) if name is not None], dtype=torch.int64, device="cpu")


def _of_rows(names: Sequence[str | None], rows: Tensor, thresholds: Mapping[str, float]) -> Tensor:
    """Return the threshold of each row of the class head, (C,) float64; 1 for rows that are not reported."""
    if missing := [str(names[row]) for row in rows.tolist() if names[row] not in thresholds]:
        raise ValueError(
            f"thresholds: expected one for each class that is reported, got none for {', '.join(missing)}"
        )
    values = [1.0 if name is None else thresholds.get(name, 1.0) for name in names]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _rows(names: Sequence[str | None], classes: Iterable[str | int] | None) -> Tensor:
    """Return the rows of the class head to report, (R,) int64: those with a class name, limited to ``classes``."""
    named = named_rows(names)
    if classes is None:
        return named
    if isinstance(classes, str):
        raise TypeError(f"classes: expected a list of names or rows, got the string {classes!r}")
    matches: dict[Any, set[int]] = defaultdict(set)  # by name, of which several rows may have the same, and by row
    for row in named.tolist():
        matches[names[row]].add(row)
        matches[row].add(row)
    rows: set[int] = set()
    for requested in classes:
        if isinstance(requested, bool) or requested not in matches:
            raise ValueError(
                f"classes: expected names or rows of the model's classes, got {requested!r};"
                f" the names are {', '.join(str(names[i]) for i in named.tolist())}"
            )
        rows |= matches[requested]
    return torch.tensor(sorted(rows), dtype=torch.int64, device="cpu")
