"""Which of all query-class pairs of an image are objects to report."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert


class Postprocessing(NamedTuple):
    """Which of all query-class pairs are objects to report.

    Attributes:
        rows: (R,) int64, rows of the class head to choose from.
        threshold: scores must be above this.
        top_k: the most objects an image.
    """

    rows: Tensor
    threshold: float
    top_k: int


def make_postprocessing(
    names: Sequence[str | None], *, threshold: float, top_k: int, classes: Iterable[str | int] | None
) -> Postprocessing:
    """Check what is to be reported.

    Args:
        names: the model's class names; None for a row without a class, which is never reported.
        threshold: scores must be above this, in [0, 1].
        top_k: the most objects an image.
        classes: names or rows of the classes to report; None: all.

    Raises:
        TypeError: one string in place of a list of names.
        ValueError: a class that the model does not have, a number out of its range.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected 0..1, got {threshold}")
    check_count("top_k", top_k)
    return Postprocessing(_rows(names, classes), threshold, top_k)


def postprocess(
    logits: Tensor, boxes: Tensor, size: tuple[int, int], postprocessing: Postprocessing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the best query-class pairs of one image.

    Args:
        logits: (N, C).
        boxes: (N, 4) cx cy w h in [0, 1].
        size: (height, width) of the image in pixels.
        postprocessing: what to choose.

    Returns:
        boxes (K, 4) x0 y0 x1 y1 in pixels, inside the image; scores (K,); labels (K,); queries (K,); best first.
    """
    found = top_k_detections(logits[None], boxes[None], torch.tensor([size]), postprocessing.rows, postprocessing.top_k)
    corners, scores, labels, queries = (x[0] for x in found)
    kept = scores > postprocessing.threshold
    return corners[kept], scores[kept], labels[kept], queries[kept]


def top_k_detections(
    logits: Tensor, boxes: Tensor, sizes: Tensor, rows: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the query-class pairs of several images that score highest.

    Args:
        logits: (B, N, C).
        boxes: (B, N, 4) cx cy w h in [0, 1].
        sizes: (B, 2) height and width of the images in pixels.
        rows: (R,) int64, rows of the class head to choose from.
        top_k: K, how many an image, or N·R if that is less.

    Returns:
        boxes (B, K, 4) x0 y0 x1 y1 in pixels, inside the image; scores (B, K); labels (B, K); queries (B, K); best
        first.
    """
    scores = logits[..., rows].sigmoid().flatten(1)  # (B, N·R)
    scores, pairs = scores.topk(min(top_k, scores.shape[1]))
    queries, labels = pairs // rows.shape[0], rows[pairs % rows.shape[0]]
    limits = sizes.flip(-1).repeat(1, 2)[:, None].to(torch.float32)  # (B, 1, 4) w h w h
    chosen = box_convert(boxes.gather(1, queries[..., None].expand(-1, -1, 4)), "cxcywh", "xyxy") * limits
    return torch.minimum(chosen.clamp(min=0), limits), scores, labels, queries


def check_head(rows: int, names: Sequence[str | None]) -> None:
    """Raise ValueError unless a class head has as many rows as its metadata has names."""
    if rows != len(names):
        raise ValueError(
            f"model: its class head has {rows} classes, but its metadata names {len(names)};"
            " give it metadata that names them: model.metadata = Metadata(names)"
        )


def check_count(name: str, count: int) -> None:
    """Raise ValueError unless a count is a whole number of at least 1."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {count!r}")


def named_rows(names: Sequence[str | None]) -> Tensor:
    """Return the rows (R,), int64, of the class head that have a name."""
    return torch.tensor([i for i, name in enumerate(names) if name is not None], dtype=torch.int64)


def _rows(names: Sequence[str | None], classes: Iterable[str | int] | None) -> Tensor:
    """Return the rows of the class head to report: named ones, and of those the wanted ones."""
    named = named_rows(names)
    if classes is None:
        return named
    used = named.tolist()
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
