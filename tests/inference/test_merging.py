"""Merging of detections on overlapping views: hand-worked cases, and a detector without errors as the reference."""

import tracemalloc

import numpy as np
import pytest
import torch

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.merging import merge_views
from conditional_detr.inference.tiling import make_tiling, views_of
from conditional_detr.modeling.metadata import Preprocessing

SIZE = (100, 175)
LEFT, RIGHT = (0, 0, 100, 100), (75, 0, 175, 100)


def found(*rows: tuple[list[float], float, int], size: tuple[int, int] = SIZE) -> Detections:
    """Return detections from rows of (box in pixels of the image, score, label)."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Detections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.int64),
        names=tuple("ab"[label] for label in labels),
        category_ids=tuple(10 * label for label in labels),
        queries=torch.arange(len(rows)),
        size=size,
        source=None,
    )


def merged(left: list, right: list) -> list[tuple[list[float], float, str]]:
    return [
        ([round(side, 3) for side in box], round(score, 4), name)
        for box, score, name in merge_views([found(*left), found(*right)], [LEFT, RIGHT], [0, 0], SIZE)
    ]


def test_an_object_that_no_view_shows_as_a_whole_gets_its_outermost_sides():
    left, right = ([60, 20, 100, 60], 0.7, 0), ([75, 20, 140, 60], 0.9, 0)
    assert merged([left], [right]) == [([60, 20, 140, 60], 0.9, "a")]


def test_a_piece_does_not_move_the_sides_of_a_whole_object():
    """The right view cuts the object at x = 75: only its three other sides count, weighted by the scores 1 to 3."""
    whole, piece = ([40, 20, 90, 60], 0.2, 0), ([75, 24, 94, 60], 0.6, 0)
    assert merged([whole], [piece]) == [([40, 23, 93, 60], 0.6, "a")]


def test_what_differs_stays():
    """Neighbours, another class, and two detections on one view, which the model means to be two objects."""
    left = [([40, 20, 70, 60], 0.9, 0), ([78, 20, 96, 60], 0.8, 0)]
    right = [([110, 20, 140, 60], 0.7, 0), ([78, 20, 96, 60], 0.6, 1)]
    assert merged(left, right) == [(*row[:2], "ab"[row[2]]) for row in left + right]
    twice = [([10, 20, 50, 60], 0.9, 0), ([10, 20, 50, 60], 0.8, 0)]
    assert len(merged(twice, [])) == 2


def test_the_best_agreement_counts():
    """Two overlapping objects, both on both views: each joins its own, though the others agree by over 0.5, too."""
    left = [([78, 20, 96, 60], 0.9, 0), ([80, 22, 96, 64], 0.8, 0)]
    right = [([80, 22, 96, 64], 0.7, 0), ([78, 20, 96, 60], 0.6, 0)]
    assert merged(left, right) == [([78, 20, 96, 60], 0.9, "a"), ([80, 22, 96, 64], 0.8, "a")]


def test_scores_are_averaged_over_rounds():
    """The second round has not found the second object, and the third round neither."""
    whole = (0, 0, 175, 100)
    first = found(([10, 10, 50, 50], 0.9, 0), ([100, 10, 150, 50], 0.6, 1))
    others = [found(([10, 10, 50, 50], 0.6, 0)), found(([10, 10, 50, 50], 0.3, 0))]
    result = merge_views([first, *others], [whole] * 3, [0, 1, 2], SIZE)
    torch.testing.assert_close(result.scores, torch.tensor([0.6, 0.2]))
    assert result.category_ids == (0, 10)
    assert result.queries.tolist() == [-1, -1]


def test_nothing_found_is_nothing():
    assert len(merge_views([found(), found()], [LEFT, RIGHT], [0, 0], SIZE)) == 0


@pytest.mark.parametrize("tile", [(64, 64), (50, 120), (300, 40)])
@pytest.mark.parametrize("overlap", [0.1, 0.25, 0.5])
def test_pieces_of_a_detector_without_errors_become_the_objects_again(tile, overlap):
    """Objects of all sizes, also many times larger than a tile, cut as exactly as the tiles cut them."""
    size = (400, 500)
    views = views_of(size, make_tiling(tile, overlap), Preprocessing())[0]
    random = np.random.default_rng(0)
    objects = []
    for y in range(0, 400, 100):  # one in each field of 100 x 125, or across four of them
        for x in range(0, 500, 125):
            x0, y0 = x + random.uniform(0, 40), y + random.uniform(0, 40)
            objects.append([x0, y0, x0 + random.uniform(10, 80), y0 + random.uniform(10, 55)])
    objects[-1] = [5.0, 395.0, 490.0, 399.5]
    objects[0] = [1.0, 2.0, 3.5, 380.0]
    parts = []
    for x0, y0, x1, y1 in (view.box for view in views):
        boxes = np.minimum(np.maximum(objects, (x0, y0, x0, y0)), (x1, y1, x1, y1))
        seen = [i for i, (a, b, c, d) in enumerate(boxes) if c > a and d > b]
        parts.append(found(*((boxes[i].tolist(), 1 - i / 100, i % 2) for i in seen), size=size))
    assert sum(map(len, parts)) > len(objects) + 5
    result = merge_views(parts, [view.box for view in views], [0] * len(views), size)
    assert len(result) == len(objects)
    torch.testing.assert_close(result.boxes, torch.tensor(objects), rtol=0, atol=1e-3)


def test_memory_of_many_detections_of_many_classes():
    """Two views of 3,000 detections of 300 classes each: those of one class are compared, not all with all."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3000, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 5 + 40 * torch.rand(3000, 2, generator=generator)], dim=1)
    labels = torch.arange(3000) % 300
    names = [f"class {label}" for label in labels.tolist()]
    scores = torch.rand(3000, generator=generator)
    part = Detections.from_boxes(boxes, names, scores=scores, labels=labels.tolist(), size=(100, 100))
    tracemalloc.start()
    merged = merge_views([part, part], [(0, 0, 100, 100)] * 2, [0, 1], (100, 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(merged) == 3000
    assert peak < 100e6  # a matrix of all pairs of boxes has 288 MB
