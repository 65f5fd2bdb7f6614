"""Images and boxes are augmented together: by hand, by torchvision's own transforms, and by locating the boxes."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from conditional_detr import Preprocessing
from conditional_detr.data.augmentation import Augmentation, make_scene
from conditional_detr.inference.preprocessing import resize, resized_size

SIZES = Preprocessing(48, 64)
AUTHORS_SMALL = Augmentation(
    horizontal_flip=0.5, crop=0.7, crop_edges=(60, 80), crop_sides=(40, 70), shortest_edges=(64, 80, 96)
)
ANY_SIDE_UP = Augmentation.small(vertical_flip=True, quarter_turn=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient(height=48, width=64):
    """An image in which each pixel's red and green are its position: x / width, y / height of its centre."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)])


def augment(augmentation, image, boxes, seed=0, preprocessing=SIZES):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    scene = make_scene(image, boxes, torch.arange(len(boxes)))
    return augmentation(scene, preprocessing, generator(seed))


def window_of(image, height, width):
    """Return the position of an augmented image's edges in the original gradient, in pixels: x0 y0 x1 y1."""
    image = torch.as_tensor(image)
    rows, columns = image.shape[1:]
    x, y = image[0, rows // 2] * width, image[1, :, columns // 2] * height
    # from the middle of the first quarter to that of the last: edges are blurred by the resizing
    ax, bx, ay, by = columns // 4, 3 * columns // 4, rows // 4, 3 * rows // 4
    step_x, step_y = (x[bx] - x[ax]) / (bx - ax), (y[by] - y[ay]) / (by - ay)
    x0, y0 = x[ax] - step_x * (ax + 0.5), y[ay] - step_y * (ay + 0.5)
    return [float(value) for value in (x0, y0, x0 + step_x * columns, y0 + step_y * rows)]


# ---- by hand


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        (Augmentation(), [[4, 6, 24, 16], [60, 0, 64, 48]]),
        (Augmentation(horizontal_flip=1), [[40, 6, 60, 16], [0, 0, 4, 48]]),
        (Augmentation(vertical_flip=1), [[4, 32, 24, 42], [60, 0, 64, 48]]),
        (Augmentation(horizontal_flip=1, vertical_flip=1), [[40, 32, 60, 42], [0, 0, 4, 48]]),
        (Augmentation(shortest_edges=(96,), longest_edge=128), [[8, 12, 48, 32], [120, 0, 128, 96]]),
        (Augmentation(shortest_edges=(24,), horizontal_flip=1), [[20, 3, 30, 8], [0, 0, 2, 24]]),
    ],
)
def test_boxes_by_hand(augmentation, expected):
    scene = augment(augmentation, gradient(), [[4.0, 6.0, 24.0, 16.0], [60.0, 0.0, 64.0, 48.0]])
    assert scene.boxes.tolist() == expected
    assert scene.labels.tolist() == [0, 1]
    assert tuple(scene.boxes.canvas_size) == scene.size


@pytest.mark.parametrize("seed", range(40))
def test_authors_crop_by_hand(seed):
    """Boxes are shifted and clipped to the window, which the pixels show; any remaining part is kept."""
    boxes = [[0.0, 0.0, 30.0, 20.0], [28.0, 18.0, 36.0, 30.0], [50.0, 40.0, 64.0, 48.0]]
    augmentation = Augmentation(crop=1, crop_edges=(48,), crop_sides=(24, 40), shortest_edges=(48,), longest_edge=999)
    scene = augment(augmentation, gradient(), boxes, seed)
    window = [round(side) for side in window_of(scene.image, 48, 64)]
    x0, y0, x1, y1 = window
    assert 24 <= x1 - x0 <= 40
    assert 24 <= y1 - y0 <= 40
    expected, labels = [], []
    for label, (a, b, c, d) in enumerate(boxes):
        part = [max(a, x0), max(b, y0), min(c, x1), min(d, y1)]
        if part[2] > part[0] and part[3] > part[1]:
            height, width = scene.size
            moved = [part[0] - x0, part[1] - y0, part[2] - x0, part[3] - y0]
            expected.append([v * s for v, s in zip(moved, [width / (x1 - x0), height / (y1 - y0)] * 2, strict=True)])
            labels.append(label)
    assert scene.labels.tolist() == labels
    torch.testing.assert_close(torch.as_tensor(scene.boxes), torch.tensor(expected).reshape(-1, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_zoom_keeps_boxes_whose_centre_is_inside(seed):
    boxes = [[0.0, 0.0, 30.0, 20.0], [28.0, 18.0, 36.0, 30.0], [50.0, 40.0, 64.0, 48.0]]
    scene = augment(Augmentation(zoom=(1.2, 3.0), stretch=1.3), gradient(), boxes, seed)
    assert scene.size == (48, 64)
    x0, y0, x1, y1 = window_of(scene.image, 48, 64)
    kept = [i for i, (a, b, c, d) in enumerate(boxes) if x0 <= (a + c) / 2 <= x1 and y0 <= (b + d) / 2 <= y1]
    assert scene.labels.tolist() == kept != []
    for box, label in zip(scene.boxes.tolist(), kept, strict=True):
        a, b, c, d = boxes[label]
        corners = [max(a, x0), max(b, y0), min(c, x1), min(d, y1)]
        scale = 64 / (x1 - x0), 48 / (y1 - y0)
        moved = [(corners[i] - (x0, y0)[i % 2]) * scale[i % 2] for i in range(4)]
        assert box == pytest.approx(moved, abs=0.1)


def test_a_quarter_turn_by_hand():
    """A square is only rotated; a wide image keeps its size, so it is cropped at the top and bottom and padded."""
    red = Image.new("RGB", (48, 48))
    red.paste((255, 0, 0), (30, 5, 40, 25))
    rotation = Augmentation(quarter_turn=1)
    scene = augment(rotation, red, [[30.0, 5.0, 40.0, 25.0]], preprocessing=Preprocessing(48, 48))
    assert scene.boxes.tolist() == [[5, 8, 25, 18]]  # x0 = y0, y0 = 48 - x1
    assert scene.image.getbbox() == (5, 8, 25, 18)
    for seed in range(10):
        scene = augment(rotation, gradient(), [[30.0, 20.0, 34.0, 28.0]], seed)
        assert scene.size == (48, 64)
        x, y = scene.image[0], scene.image[1]
        inside = x != SIZES.mean[0]
        columns = inside.any(dim=0).nonzero().flatten()
        assert len(columns) == 48  # the original height
        x0, y0, x1, y1 = scene.boxes[0].int().tolist()
        assert x[y0:y1, x0:x1].min() > 30 / 64
        assert x[y0:y1, x0:x1].max() < 34 / 64
        assert y[y0:y1, x0:x1].min() > 20 / 48
        assert y[y0:y1, x0:x1].max() < 28 / 48
        assert (x1 - x0, y1 - y0) == (8, 4)


def test_shrunk_image_has_a_background_of_the_mean_colour():
    image = Image.new("RGB", (64, 48), (255, 255, 255))
    scene = augment(Augmentation(zoom=(0.5, 0.5)), image, [[0.0, 0.0, 64.0, 48.0]])
    pixels = np.asarray(scene.image)
    x0, y0, x1, y1 = scene.boxes[0].tolist()
    assert (x1 - x0, y1 - y0) == pytest.approx((32, 24))
    white = (pixels > 185).all(axis=2)
    assert white.sum() == pytest.approx(32 * 24, rel=0.05)  # edges may lie on half pixels
    outside = pixels[0, 0] if y0 > 2 or x0 > 2 else pixels[-1, -1]
    assert outside.tolist() == [round(255 * value) for value in (0.485, 0.456, 0.406)]


# ---- boxes are located in the pixels


def rectangle(height, width, box):
    image = np.full((height, width, 3), 40, dtype=np.uint8)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = 255, 255, 40
    return Image.fromarray(image)


def locate_box(image):
    """Return the box around pixels above half of the rectangle's brightness."""
    values = np.asarray(image, dtype=np.float64).max(axis=2)
    bright = values > (40 + 255) / 2
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else None


@pytest.mark.parametrize("name", ["authors", "zoom", "colour", "rotated", "small"])
def test_boxes_match_their_pixels(name):
    augmentation = {
        "authors": AUTHORS_SMALL,
        "zoom": Augmentation(horizontal_flip=0.5, vertical_flip=0.5, zoom=(0.6, 2.5), stretch=1.4),
        "colour": Augmentation(brightness=0.1, contrast=0.1),
        "rotated": Augmentation(quarter_turn=0.5),
        "small": replace(
            Augmentation.small(vertical_flip=True, quarter_turn=True), brightness=0, contrast=0, saturation=0, hue=0
        ),
    }[name]
    kept = 0
    for seed in range(40):
        rng = random.Random(seed)
        height, width = rng.randint(60, 120), rng.randint(60, 120)
        x0, y0 = rng.randint(0, width - 20), rng.randint(0, height - 20)
        box = [x0, y0, rng.randint(x0 + 10, width), rng.randint(y0 + 10, height)]
        scene = augment(
            augmentation, rectangle(height, width, box), [list(map(float, box))], seed, Preprocessing(80, 160)
        )
        located = locate_box(scene.image)
        if len(scene.boxes):
            kept += 1
            if np.ptp(scene.boxes.numpy().reshape(2, 2), axis=0).min() > 2:  # in thinner ones, all pixels are blurred
                assert located == pytest.approx(scene.boxes[0].tolist(), abs=1.0)
        elif name == "authors":
            assert located is None  # the crop excludes it
    assert kept > 20


# ---- torchvision's own transforms as the reference


def test_equals_torchvisions_transforms():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    boxes = torch.tensor([[4.0, 6.0, 24.0, 16.0], [60.5, 0.0, 130.0, 90.0]])
    theirs = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomVerticalFlip(1.0), v2.Resize(60, max_size=100)])
    their_image, their_boxes = theirs(image, tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(90, 130)))
    augmentation = Augmentation(horizontal_flip=1, vertical_flip=1)
    scene = augment(augmentation, image, boxes.tolist(), preprocessing=Preprocessing(60, 100))
    assert np.array_equal(np.asarray(scene.image), np.asarray(their_image))
    torch.testing.assert_close(torch.as_tensor(scene.boxes), torch.as_tensor(their_boxes), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["image", "tensor"])
@pytest.mark.parametrize("size", [(48, 64), (100, 37), (33, 200), (480, 640)])
def test_without_augmentation_pixels_are_those_of_detection(kind, size):
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(values) if kind == "image" else torch.from_numpy(values).permute(2, 0, 1) / 255
    scene = augment(Augmentation(), image, [])
    ours = torch.as_tensor(np.array(scene.image)) if kind == "image" else torch.as_tensor(scene.image)
    ours = ours.permute(2, 0, 1) if kind == "image" else ours
    assert torch.equal(ours, resize(image, SIZES))
    assert scene.boxes.shape == (0, 4)


# ---- the presets


def test_authors_sizes():
    preset = Augmentation.paper()
    assert (preset.shortest_edges, preset.longest_edge) == (
        (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        1333,
    )
    assert (preset.crop_edges, preset.crop_sides) == ((400, 500, 600), (384, 600))
    assert (preset.horizontal_flip, preset.crop) == (0.5, 0.5)
    allowed = {resized_size(60, 80, Preprocessing(edge, 1333)) for edge in preset.shortest_edges}
    sizes = [augment(replace(preset, crop=0.0), gradient(60, 80), [], seed).size for seed in range(60)]
    assert set(sizes) <= allowed
    assert len(set(sizes)) >= 9
    long = augment(replace(preset, crop=0.0), gradient(20, 100), []).size
    assert long == (267, 1333)


def test_probabilities():
    flipped = [augment(Augmentation(horizontal_flip=0.3), gradient(), [], seed) for seed in range(400)]
    share = np.mean([float(torch.as_tensor(scene.image)[0, 0, 0]) > 0.5 for scene in flipped])
    assert share == pytest.approx(0.3, abs=0.07)  # three standard deviations


def test_small_keeps_the_size_and_at_least_one_box():
    preset = Augmentation.small()
    for seed in range(60):
        scene = augment(preset, gradient(96, 130), [[0.0, 0.0, 5.0, 5.0]], seed)
        assert scene.size == resized_size(96, 130, SIZES)
        assert len(scene.boxes) == 1


def test_randomness_comes_from_the_generator_alone():
    """Equal seeds give equal results; global generators do not change."""
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    everything = replace(
        Augmentation.small(vertical_flip=True, quarter_turn=True), crop=0.5, crop_edges=(50,), crop_sides=(30, 50)
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    one, other, third = (augment(everything, image, [[1.0, 2.0, 60.0, 50.0]], seed) for seed in (4, 4, 5))
    assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    assert torch.equal(one.boxes, other.boxes)
    assert not np.array_equal(np.asarray(one.image), np.asarray(third.image))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert np.array_equal(state[2], np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal_flip": 1.5}, r"horizontal_flip: expected a number in \[0, 1\], got 1.5"),
        ({"crop": -1}, r"crop: expected a number in \[0, 1\], got -1"),
        ({"hue": 0.6}, r"hue: expected a number in \[0, 0.5\], got 0.6"),
        ({"zoom": (2, 1)}, r"zoom: expected a minimum and a maximum above 0, got \(2, 1\)"),
        ({"crop_sides": (0, 5)}, r"crop_sides: expected a minimum and a maximum above 0, got \(0, 5\)"),
        ({"stretch": 0.5}, "stretch: expected at least 1, got 0.5"),
        ({"shortest_edges": (0, 5)}, r"shortest_edges: expected lengths of at least 1 pixel, got \(0, 5\)"),
        ({"crop_edges": (300,)}, r"crop_edges: expected lengths of at least the 384 of crop_sides, got \(300,\)"),
        ({"crop_edges": ()}, r"crop_edges: expected lengths of at least the 384 of crop_sides, got \(\)"),
        (
            {"shortest_edges": (900,), "longest_edge": 800},
            r"longest_edge: expected at least the longest of shortest_edges \(900,\), got 800",
        ),
    ],
)
def test_invalid_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
