"""The synthetic dataset: deterministic, with correct boxes, in COCO format."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from conditional_detr import Preprocessing
from conditional_detr.data import synthetic as shapes
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.report import check_data
from conditional_detr.data.synthetic import CLASS_NAMES, MIN_VISIBLE, draw_image, image_index, write_shapes
from conditional_detr.set_prediction.targets import validate_targets


def test_image_depends_on_seed_and_index_only():
    image, boxes, labels = draw_image(3, 5)
    again = draw_image(3, 5)
    assert image.tobytes() == again[0].tobytes()
    assert np.array_equal(boxes, again[1])
    assert np.array_equal(labels, again[2])
    others = [draw_image(*numbers)[0] for numbers in ((3, 6), (4, 5))]
    assert len({hashlib.sha256(drawn.tobytes()).digest() for drawn in (image, *others)}) == 3
    assert (image.mode, image.size) == ("RGB", (256, 192))
    assert draw_image(0, 0, size=(100, 80))[0].size == (80, 100)


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_boxes_are_around_what_is_visible(size, monkeypatch):
    """Without texture, shadow, noise and soft edges each shape has one colour: its pixels can be located."""
    colours = []
    soft = shapes._mask

    def plain(random, size, colour, strength, unit):
        colours.append(np.random.default_rng(len(colours)).integers(0, 256, 3).astype(float))
        return np.broadcast_to(colours[-1], (*size, 3)).copy()

    monkeypatch.setattr(shapes, "_texture", plain)
    monkeypatch.setattr(shapes, "_shadow", np.zeros_like)
    monkeypatch.setattr(shapes, "_NOISE", (0, 0))
    monkeypatch.setattr(shapes, "_mask", lambda *arguments: (soft(*arguments) > 0.5).astype(float))
    for index in range(25):
        colours.clear()
        image, boxes, labels = draw_image(1, index, size=size)
        assert len(boxes) == len(labels) == len(colours) - 1  # one is the background's
        assert 1 <= len(boxes) <= 8
        for box, colour in zip(boxes.tolist(), colours[1:], strict=True):
            pixels = (np.asarray(image) == colour).all(axis=2)
            rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_boxes_exclude_hidden_parts(monkeypatch):
    """Two squares, the second over the right 40 % of the first."""
    masks = []
    for left, right in ((10, 60), (40, 120)):
        mask = np.zeros((100, 200))
        mask[20:80, left:right] = 1
        masks.append(mask)
    drawn = iter(masks)
    monkeypatch.setattr(shapes, "MAX_SHAPES", 1)

    class Random:
        def __init__(self):
            self.random = np.random.default_rng(0)
            self.first = True

        def integers(self, *arguments):
            if self.first and arguments == (1, 2):
                self.first = False
                return 2
            return self.random.integers(*arguments)

        def __getattr__(self, name):
            return getattr(self.random, name)

    random = Random()
    monkeypatch.setattr(shapes.np.random, "default_rng", lambda seed: random)
    monkeypatch.setattr(shapes, "_mask", lambda *arguments: next(drawn))
    _, boxes, _ = draw_image(0, 0, size=(100, 200))
    assert boxes.tolist() == [[10, 20, 40, 80], [40, 20, 120, 80]]
    assert MIN_VISIBLE < 0.6


def test_classes_and_sizes_are_balanced():
    drawn = [draw_image(0, index) for index in range(120)]
    counts = np.bincount(np.concatenate([labels for _, _, labels in drawn]), minlength=len(CLASS_NAMES))
    assert counts.min() > 0.6 * counts.mean()
    boxes = np.concatenate([boxes for _, boxes, _ in drawn])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for low, high in ((0, 32**2), (32**2, 96**2), (96**2, 1e9)):
        assert ((areas >= low) & (areas < high)).mean() > 0.04
    assert np.mean([len(labels) for _, _, labels in drawn]) == pytest.approx(4, abs=0.7)


def test_written_dataset_is_in_coco_format(tmp_path):
    steps = []
    path = write_shapes(tmp_path / "new", 6, seed=1, split="train", progress=lambda *numbers: steps.append(numbers))
    assert path == tmp_path / "new" / "instances_train.json"
    assert steps[-1] == (6, 6)
    data = CocoData(path, tmp_path / "new" / "train", preprocessing=Preprocessing(192, 256))
    assert data.class_names == CLASS_NAMES
    assert len(data) == 6
    validate_targets([target for _, target in data], 6, 6)
    report = check_data(path, tmp_path / "new" / "train")
    assert report.problems == {}
    before = path.read_bytes(), (tmp_path / "new" / "train" / "000003.jpg").read_bytes()
    write_shapes(tmp_path / "new", 6, seed=1, split="train")
    assert before == (path.read_bytes(), (tmp_path / "new" / "train" / "000003.jpg").read_bytes())


def test_splits_share_no_image(tmp_path):
    for split in ("train", "val"):
        write_shapes(tmp_path, 3, seed=0, split=split, size=(64, 64))
    files = list(tmp_path.rglob("*.jpg"))
    assert len(files) == 6
    assert len({path.read_bytes() for path in files}) == 6
    train, val = (json.loads((tmp_path / f"instances_{split}.json").read_text()) for split in ("train", "val"))
    assert train["categories"] == val["categories"]
    assert train["annotations"] != val["annotations"]
    with Image.open(files[0]) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 0, (63, 80)), "expected sides of at least 64 pixels, .*, got 63 x 80, 0 and 0"),
        ((-1, 0, (64, 64)), "seed and index of at least 0, got 64 x 64, -1 and 0"),
        ((0, -1, (64, 64)), "seed and index of at least 0, got 64 x 64, 0 and -1"),
    ],
)
def test_invalid_arguments(numbers, message, tmp_path):
    seed, index, size = numbers
    with pytest.raises(ValueError, match=message):
        draw_image(seed, index, size=size)
    with pytest.raises(ValueError, match="images: expected at least 1, got 0"):
        write_shapes(tmp_path, 0, seed=0, split="train")


def test_written_images_equal_drawn_ones(tmp_path):
    write_shapes(tmp_path, 2, seed=4, split="val")
    image, boxes, _ = draw_image(4, image_index("val", 1))
    written = json.loads((tmp_path / "instances_val.json").read_text())
    mine = [entry["bbox"] for entry in written["annotations"] if entry["image_id"] == 2]
    assert mine == [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes.tolist()]
    with Image.open(tmp_path / "val" / "000001.jpg") as saved:
        assert np.abs(np.asarray(saved).astype(int) - np.asarray(image)).mean() < 8  # jpeg
    far = {image_index(split, i) for split in ("train", "val", "demo") for i in (0, 10**6)}
    assert len(far) == 6


def test_only_files_of_an_earlier_call_are_replaced(tmp_path):
    for seed in (0, 1):
        path = write_shapes(tmp_path, 2, seed=seed, split="train", size=(64, 64))
    before = path.read_bytes()
    mine = tmp_path / "val" / "000001.jpg"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(
        FileExistsError, match=r"000001\.jpg: already exists; set overwrite, or --overwrite, to replace it"
    ):
        write_shapes(tmp_path, 2, seed=0, split="val", size=(64, 64))
    assert [file.name for file in mine.parent.iterdir()] == [mine.name]
    assert mine.read_bytes() == b"mine"
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(FileExistsError, match=r"instances_train\.json: already exists"):
        write_shapes(tmp_path, 2, seed=1, split="train", size=(64, 64))
    assert write_shapes(tmp_path, 2, seed=1, split="train", size=(64, 64), overwrite=True).read_bytes() == before
