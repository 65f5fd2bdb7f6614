"""Tiles and augmentation: drawn shapes on large images, and what the tiles of an image are."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conditional_detr import Detector, Preprocessing
from conditional_detr.data.synthetic import CLASS_NAMES, SIZE, draw_image, image_index
from conditional_detr.evaluation.coco import evaluate_detections
from conditional_detr.inference import tiling
from conditional_detr.inference.tiling import make_tiling, views_of
from helpers.models import assert_same_detections


@pytest.fixture(scope="module")
def shapes() -> Detector:
    return Detector.from_pretrained("shapes")


@pytest.fixture(scope="module")
def tiny_detector(small) -> Detector:
    return Detector.from_pretrained(small)


def test_tiles_cover_the_image_evenly():
    """By hand: 1000 = 300 + 4 · 175 with steps of at most 225; 400 = 300 + 100."""
    views = views_of((400, 1000), make_tiling(300, 0.25), Preprocessing())
    assert len(views) == 1
    assert [view.box for view in views[0]] == [
        (x, y, x + 300, y + 300) for y in (0, 100) for x in (0, 175, 350, 525, 700)
    ]


@pytest.mark.parametrize("size", [(100, 100), (1023, 517), (64, 900), (10, 7)])
@pytest.mark.parametrize("tile", [(32, 32), (100, 333), (512, 64)])
@pytest.mark.parametrize("overlap", [0.01, 0.25, 0.5])
def test_every_pixel_is_on_a_tile_and_neighbours_overlap(size, tile, overlap):
    (views,) = views_of(size, make_tiling(tile, overlap), Preprocessing())
    covered = np.zeros(size, dtype=int)
    for x0, y0, x1, y1 in (view.box for view in views):
        assert (y1 - y0, x1 - x0) == (min(tile[0], size[0]), min(tile[1], size[1]))
        covered[y0:y1, x0:x1] += 1
    assert covered.min() >= 1
    for axis in (0, 1):
        starts = sorted({view.box[axis] for view in views})
        side = (tile[1], tile[0])[axis]
        assert all(b - a <= side - np.floor(overlap * side) for a, b in pairwise(starts))


def mosaic(rows: int, columns: int):
    """Return a large image of drawn images side by side, these, and their annotations in COCO format."""
    (height, width), cells, annotations = SIZE, [], []
    large = Image.new("RGB", (columns * width, rows * height))
    for i in range(rows * columns):
        image, boxes, labels = draw_image(5, image_index("mosaic", i))
        large.paste(image, (i % columns * width, i // columns * height))
        cells.append(image)
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            annotation = {"image_id": i, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **annotation})
    images = [{"id": i, "file_name": f"{i}.png", "height": height, "width": width} for i in range(len(cells))]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES)]
    return large, cells, {"images": images, "annotations": annotations, "categories": categories}


def in_cells(detections, columns: int, rows: int) -> list[dict]:
    """Return detections on the large image as results of the cells that have their centres."""
    (height, width), results = SIZE, []
    for (x0, y0, x1, y1), score, name in detections:
        row, column = min(int((y0 + y1) / 2 / height), rows - 1), min(int((x0 + x1) / 2 / width), columns - 1)
        box = [x0 - column * width, y0 - row * height, x1 - x0, y1 - y0]
        cell = {"image_id": row * columns + column, "category_id": CLASS_NAMES.index(name)}
        results.append({**cell, "bbox": box, "score": score})
    return results


def test_small_shapes_on_a_large_image_are_detected_as_on_small_images(shapes):
    """AP of at least 0.9 of that on the drawn images alone; without tiles almost nothing is left."""
    large, cells, data = mosaic(3, 3)
    alone = [
        {**result, "category_id": CLASS_NAMES.index(name)}
        for i, detections in enumerate(shapes(cells, threshold=0.05))
        for result, name in zip(detections.to_coco(i), detections.names, strict=True)
    ]
    tiled = shapes(large, threshold=0.05, top_k=1000, tile=SIZE)
    whole = shapes(large, threshold=0.05, top_k=1000)
    of_cells, of_tiles, of_whole = (
        evaluate_detections(data, results).metrics["AP"]
        for results in (alone, in_cells(tiled, 3, 3), in_cells(whole, 3, 3))
    )
    assert of_cells > 0.8
    assert of_tiles >= 0.9 * of_cells > 2 * of_whole


def test_one_tile_is_the_image(tiny_detector, photograph):
    """Up to rounding and but for the queries: the same values go through the same model."""
    whole, tiled = (tiny_detector(photograph, threshold=0.3, tile=tile) for tile in (None, 1000))
    assert len(whole) == len(tiled) > 3
    assert whole.names == tiled.names
    torch.testing.assert_close(tiled.boxes, whole.boxes, rtol=0, atol=1e-4)
    torch.testing.assert_close(tiled.scores, whole.scores, rtol=0, atol=1e-6)
    assert tiled.draw().size == whole.draw().size


def test_augmented_detections_of_a_mirrored_image_are_the_mirrored_ones(shapes):
    """Which the model alone does not have."""
    image = draw_image(0, image_index("demo", 23))[0]
    detections = shapes(image, augment=True)
    mirrored = shapes(ImageOps.mirror(image), augment=True)
    boxes = torch.stack(
        [256 - mirrored.boxes[:, 2], mirrored.boxes[:, 1], 256 - mirrored.boxes[:, 0], mirrored.boxes[:, 3]], dim=1
    )
    assert len(detections) > 3
    assert mirrored.names == detections.names
    torch.testing.assert_close(boxes, detections.boxes, rtol=0, atol=0.05)
    torch.testing.assert_close(mirrored.scores, detections.scores, rtol=0, atol=1e-3)


def test_a_threshold_for_each_class(tiny_detector, photograph):
    names = tiny_detector.model.metadata.class_names
    every = tiny_detector(photograph, threshold=0, tile=200)
    middle = {name: float(every.scores[every.labels == i].median()) for i, name in enumerate(names)}
    chosen = Detector(tiny_detector.model, thresholds=middle)(photograph, tile=200)
    expected = every[torch.tensor([score > middle[name] for _, score, name in every])]
    assert 0 < len(expected) < len(every)
    assert [*chosen] == [*expected]


def test_lists_and_iterators_give_the_same(tiny_detector, photograph):
    values = np.asarray(Image.open(photograph).resize((200, 150)))
    images = [values, str(photograph), values[:100]]
    options = {"threshold": 0.3, "tile": 100, "augment": True}
    together = tiny_detector(images, **options)
    for image, detections, streamed in zip(images, together, tiny_detector(iter(images), **options), strict=True):
        alone = tiny_detector(image, **options)
        assert_same_detections(alone, detections, 0.3)
        assert_same_detections(alone, streamed, 0.3)
    with pytest.warns(UserWarning, match=r"skipped: missing\.jpg: no such file"):
        assert tiny_detector([values, "missing.jpg"], **options, on_error="skip")[1] is None


def test_few_views_are_in_memory(tiny_detector, monkeypatch):
    """Of several hundred: those of a few batches."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most, shown = 0, 0
    original = tiling.ImageViews.prepare

    def show(*arguments, **options):
        nonlocal most, shown
        view = original(*arguments, **options)
        alive.add(view.values)
        most, shown = max(most, len(alive)), shown + 1
        return view

    monkeypatch.setattr(tiling.ImageViews, "prepare", show)
    tiny_detector(np.zeros((400, 600, 3), np.uint8), tile=40)
    assert shown > 250
    assert most < 40


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tile": 31}, ValueError, "tile: expected sides of at least 32 pixels, got 31"),
        ({"tile": (100, 0)}, ValueError, "tile: expected sides of at least 32 pixels, got"),
        ({"tile": 100.5}, TypeError, "tile: expected an int, or height and width, got 100.5"),
        ({"tile": True}, TypeError, "tile: expected an int, or height and width, got True"),
        ({"tile": (100, 100, 3)}, TypeError, "tile: expected an int, or height and width, got"),
        ({"tile": 100, "overlap": 0}, ValueError, "overlap: expected a fraction above 0 and up to 0.5, got 0"),
        ({"tile": 100, "overlap": 64}, ValueError, "overlap: expected a fraction above 0 and up to 0.5, got 64"),
        ({"tile": 100, "overlap": float("nan")}, ValueError, "overlap: expected a fraction above 0"),
        ({"tile": 100, "overlap": "x"}, TypeError, "overlap: expected a number, got 'x'"),
        ({"tile": 100, "overlap": True}, TypeError, "overlap: expected a number, got True"),
        ({"overlap": 0.2}, ValueError, "overlap: expected a tile with it, got 0.2 alone"),
    ],
)
def test_bad_options_are_errors(tiny_detector, photograph, options, error, message):
    with pytest.raises(error, match=message):
        tiny_detector(photograph, **options)


def test_merged_detections_have_no_attention_maps(tiny_detector, photograph):
    with pytest.raises(ValueError, match="expected those of one run of the model, got merged ones"):
        tiny_detector.draw_attention(tiny_detector(photograph, threshold=0.1, tile=64), 0)
