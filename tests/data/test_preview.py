"""The preview of an augmentation: each image as training sees it."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from conditional_detr.cli import app
from conditional_detr.data.augmentation import Augmentation
from conditional_detr.data.contact_sheet import _draw_sample, draw_augmented
from conditional_detr.data.dataset import CocoData
from conditional_detr.modeling.metadata import Preprocessing


@pytest.fixture
def content(tmp_path):
    """An image that is red on the left and blue on the right, with a box in its left half."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, :40, 0] = pixels[:, 40:, 2] = 200
    Image.fromarray(pixels).save(tmp_path / "one.png")
    return {
        "images": [{"id": 1, "file_name": "one.png", "height": 60, "width": 80}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 20, 20], "area": 400, "iscrowd": 0}
        ],
    }


def data_of(content, folder, **changes):
    preprocessing = Preprocessing(60, 80)
    return CocoData(content, folder, augmentation=Augmentation(**changes), preprocessing=preprocessing)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_flipped_image_is_drawn_flipped_with_its_box(content, tmp_path, flip):
    """In corners without lines: the colours; the frame of the box is at a mirrored position."""
    drawn = np.asarray(_draw_sample(data_of(content, tmp_path, horizontal_flip=flip), 0)).astype(int)
    height, width = drawn.shape[:2]
    assert (width, height) == (400, 300)
    left, right = drawn[5, 5], drawn[5, -5]
    if flip:
        left, right = right, left
    assert np.abs(left - [200, 0, 0]).max() <= 3
    assert np.abs(right - [0, 0, 200]).max() <= 3
    plain = np.zeros_like(drawn)
    plain[:, : width // 2], plain[:, width // 2 :] = ([0, 0, 200], [200, 0, 0]) if flip else ([200, 0, 0], [0, 0, 200])
    columns = np.nonzero((np.abs(drawn - plain).max(-1) > 60).any(0))[0]
    columns = columns[np.abs(columns - width // 2) > 8]  # the edge between the colours is blurred by resizing
    assert len(columns)
    assert (columns > width // 2).all() if flip else (columns < width // 2).all()


def test_a_sheet_has_a_row_of_four_an_image(content, tmp_path):
    sheet = draw_augmented(data_of(content, tmp_path, zoom=(0.5, 2.0)), count=3)
    assert sheet.width == 4 * 408 + 8
    assert sheet.height < 2 * 320


def test_the_command_writes_it(tmp_path):
    from helpers import coco

    coco.write(tmp_path)
    target = tmp_path / "preview.png"
    options = ["--data", tmp_path / "data.json", "--images", tmp_path / "images", "--augmentation", "strong"]
    CliRunner().invoke(app, ["check-data", *map(str, options), "--preview-augmentation", str(target)])
    with Image.open(target) as image:
        assert image.width == 4 * 408 + 8
    refused = CliRunner().invoke(app, ["check-data", *map(str, options), "--preview-augmentation", "preview.txt"])
    assert refused.exit_code == 2
    assert "expected the suffix of an image" in refused.stderr
