"""Merge detections on overlapping views of an image: those of one object become one detection."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from conditional_detr.inference.detections import Detections

AGREEMENT = 0.5
"""IoU, inside of the part that both views show, from which on two detections are of one object."""

_AT_BORDER = 0.02  # of a view's side: a box that ends this near to a border inside the image may be cut there


def merge_views(
    parts: Sequence[Detections],
    boxes: Sequence[tuple[int, int, int, int]],
    rounds: Sequence[int],
    size: tuple[int, int],
) -> Detections:
    """Merge the detections on views of one image.

    Two detections of one class are of one object if they agree inside of the part of the image that both views show:
    there, the visible parts of their boxes have an IoU of at least 0.5. This holds also for an object that a border
    cuts, and for one that no view shows as a whole. Two detections on one view are never of one object, since the
    model reports each once.

    Args:
        parts: the detections on each view, with boxes in pixels of the image.
        boxes: the view of each, x0 y0 x1 y1 in pixels of the image.
        rounds: index of the round of each, from 0; the views of a round cover the image once.
        size: (height, width) of the image in pixels.

    Returns:
        Detections with the highest score first. A side of a box is the mean of those sides that no border cuts,
        weighted by the scores. A score is the highest of each round, averaged over the rounds; a round without the
        object counts as 0. The queries are -1, and no image is kept.
    """
    owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    corners = np.concatenate([part.boxes.numpy() for part in parts]).astype(np.float64)
    scores = np.concatenate([part.scores.numpy() for part in parts]).astype(np.float64)
    labels = np.concatenate([part.labels.numpy() for part in parts])
    views = np.array(boxes, dtype=np.float64)
    groups = _group(corners, labels, owner, views)
    cut = _cut_sides(corners, views[owner], size)
    merged = np.zeros((len(groups), 4))
    means = np.zeros(len(groups))
    for i, group in enumerate(groups):
        merged[i] = _merged_box(corners[group], scores[group], cut[group])
        best = np.zeros(max(rounds) + 1)
        np.maximum.at(best, np.array(rounds)[owner[group]], scores[group])
        means[i] = best.mean()
    order = np.argsort(-means, kind="stable")
    first = [groups[i][0] for i in order]
    names = [name for part in parts for name in part.names]
    category_ids = [category for part in parts for category in part.category_ids]
    return Detections(
        boxes=torch.from_numpy(merged[order].astype(np.float32)),
        scores=torch.from_numpy(means[order].astype(np.float32)),
        labels=torch.from_numpy(labels[first]),
        names=tuple(names[i] for i in first),
        category_ids=tuple(category_ids[i] for i in first),
        queries=torch.full((len(groups),), -1, device="cpu"),
        size=size,
        source=None,
    )


def _group(corners: np.ndarray, labels: np.ndarray, owner: np.ndarray, views: np.ndarray) -> list[list[int]]:
    """Return the indices of the detections of each object: pairs join in the order of their agreement."""
    members = {i: [i] for i in range(len(corners))}
    root = list(range(len(corners)))
    for _, i, j in sorted(_agreeing_pairs(corners, labels, owner, views), key=lambda pair: -pair[0]):
        a, b = members[root[i]], members[root[j]]
        if root[i] == root[j] or {owner[k] for k in a} & {owner[k] for k in b}:
            continue
        del members[root[j]]
        for k in b:
            root[k] = root[i]
        a.extend(b)
    return list(members.values())


def _agreeing_pairs(
    corners: np.ndarray, labels: np.ndarray, owner: np.ndarray, views: np.ndarray
) -> Iterator[tuple[float, int, int]]:
    """Yield the agreement and the indices of the pairs of detections of two views that may be of one object.

    Views are compared two by two, class by class: all pairs of detections at once would need much memory.
    """
    by_view = defaultdict(list)
    for i, view in enumerate(owner.tolist()):
        by_view[view].append(i)
    occupied = sorted(by_view)
    for position, first in enumerate(occupied):
        others = np.array(occupied[position + 1 :], dtype=np.int64)
        shared = _intersection(views[first][None], views[others])
        overlapping = (shared[:, 2:] > shared[:, :2]).all(axis=1)
        for second, part in zip(others[overlapping].tolist(), shared[overlapping], strict=True):
            both = [np.array(by_view[view]) for view in (first, second)]
            for label in np.intersect1d(*(labels[rows] for rows in both)):
                a, b = (rows[labels[rows] == label] for rows in both)
                agreement = _iou(_intersection(corners[a], part), _intersection(corners[b], part))
                for i, j in np.argwhere(agreement >= AGREEMENT).tolist():
                    yield float(agreement[i, j]), int(a[i]), int(b[j])


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the intersections (..., 4) of boxes; an empty one has x1 <= x0 or y1 <= y0."""
    return np.concatenate(
        [np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])], axis=-1, dtype=np.float64
    )


def _area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas (...) of boxes (..., 4), 0 of empty ones."""
    sides: np.ndarray = (boxes[..., 2:] - boxes[..., :2]).clip(min=0)
    return sides.prod(axis=-1)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the IoU (I, J) of boxes (I, 4) and (J, 4), 0 where both are empty."""
    common = _area(_intersection(a[:, None], b[None]))
    union = _area(a)[:, None] + _area(b)[None] - common
    return common / np.maximum(union, np.finfo(np.float64).tiny)


def _cut_sides(corners: np.ndarray, views: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return which sides (K, 4) of boxes a border of their view inside of the image may cut."""
    height, width = size
    margin = np.tile(_AT_BORDER * (views[:, 2:] - views[:, :2]), 2)
    inside = np.concatenate([views[:, :2] > 0, views[:, 2:] < (width, height)], axis=1)
    return inside & (np.abs(corners - views) <= margin)


def _merged_box(corners: np.ndarray, scores: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Return the box (4,) of one object: each side from the boxes that are not cut there, else the outermost."""
    weights = np.maximum(scores, np.finfo(np.float64).tiny)[:, None] * ~cut
    outermost = np.concatenate([corners[:, :2].min(axis=0), corners[:, 2:].max(axis=0)])
    mean = (weights * corners).sum(axis=0) / np.maximum(weights.sum(axis=0), np.finfo(np.float64).tiny)
    return np.where(weights.sum(axis=0) > 0, mean, outermost)
