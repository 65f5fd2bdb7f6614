"""Pixels of images of every kind equal those of transformers' processor."""

import numpy as np
import pytest
import torch
from PIL import Image

from conditional_detr import Preprocessing
from conditional_detr.inference.images import open_image, size_of
from conditional_detr.inference.preprocessing import resized_size, to_pixels


def transformers_pixels(image: Image.Image, **options) -> torch.Tensor:
    from transformers import ConditionalDetrImageProcessorPil

    processor = ConditionalDetrImageProcessorPil(**options)
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def ours(image, preprocessing=None) -> torch.Tensor:
    return to_pixels(open_image(image, "image"), preprocessing or Preprocessing())


def test_the_cats(shared):
    pixels = ours(shared / "data/cats/000000039769.png")
    assert pixels.shape == (3, 800, 1066)
    torch.testing.assert_close(pixels[0, 0, :3], torch.tensor([0.2796, 0.3138, 0.3481]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", range(6))
def test_pixels_equal_transformers_on_photographs(shared, number):
    path = sorted((shared / "data/coco/val2017").glob("*.jpg"))[11 * number]
    expected = transformers_pixels(Image.open(path).convert("RGB"))
    torch.testing.assert_close(ours(path), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 500), (500, 3), (640, 200), (200, 640), (801, 799), (97, 97), (1400, 30)]
)
def test_sizes_equal_transformers(size):
    """Small edges, which are fast, test the same rounding as 800 and 1333."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    preprocessing = Preprocessing(shortest_edge=97, longest_edge=161, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    expected = transformers_pixels(
        image,
        size={"shortest_edge": 97, "longest_edge": 161},
        image_mean=preprocessing.mean,
        image_std=preprocessing.std,
    )
    torch.testing.assert_close(ours(image, preprocessing), expected, rtol=0, atol=1e-6)


def test_a_sliver_keeps_at_least_one_pixel():
    assert resized_size(5000, 1, Preprocessing()) == (1333, 1)


RGB = np.random.default_rng(1).integers(0, 255, (24, 32, 3), dtype=np.uint8)
SMALL = Preprocessing(shortest_edge=16, longest_edge=64)


def test_every_form_of_one_image_gives_the_same_pixels(tmp_path):
    opened = Image.fromarray(RGB)
    path = tmp_path / "image.png"
    opened.save(path)
    expected = ours(path, SMALL)
    sixteen_bits = RGB.astype(np.uint16) * 257
    for image in [
        str(path),
        opened,
        RGB,
        RGB[:, ::-1][:, ::-1],
        torch.from_numpy(RGB).permute(2, 0, 1),
        sixteen_bits,
    ]:
        torch.testing.assert_close(ours(image, SMALL), expected, rtol=0, atol=0)
    for image in [RGB / 255, torch.from_numpy(RGB / 255).permute(2, 0, 1).half()]:
        torch.testing.assert_close(ours(image, SMALL), expected, rtol=0, atol=0.02)


MODES = ["L", "LA", "P", "1", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16", "PA", "RGBa", "La", "RGBX"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pil(mode):
    grey = Image.fromarray(RGB[..., 0])
    if mode == "I;16":
        image = Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(RGB[..., 0].astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(RGB[..., 0].astype(np.float32) / 255)
    elif mode in ("PA", "RGBa", "La"):
        before = {"PA": "P", "RGBa": "RGBA", "La": "LA"}[mode]
        image = (grey if mode == "La" else Image.fromarray(RGB)).convert(before).convert(mode)
    else:
        image = Image.fromarray(RGB).convert(mode) if mode not in ("L", "LA", "1") else grey.convert(mode)
    assert image.mode == mode
    pixels = ours(image, SMALL)
    assert pixels.isfinite().all()
    assert pixels.shape == (3, 16, 21)
    if mode in ("L", "LA", "I", "F", "I;16"):
        tolerance = 0.02 if mode == "F" else 0
        torch.testing.assert_close(pixels, ours(grey, SMALL), rtol=0, atol=tolerance)


def test_a_palette_with_transparency():
    image = Image.fromarray(RGB).quantize(8)
    image.info["transparency"] = bytes([0, 128] + [255] * 6)
    expected = np.asarray(image.convert("RGBA"))[..., :3]
    assert np.array_equal(np.asarray(open_image(image, "image")), expected)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: rows run from right to left
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png", "image")
    assert size_of(opened) == (32, 24)
    assert np.array_equal(np.asarray(opened), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("no.jpg", FileNotFoundError, r"no\.jpg: no such file"),
        (".", IsADirectoryError, "expected an image file, got a folder"),
        (3, TypeError, r"images\[0\]: expected a path, URL, base64, bytes, open file, PIL image, .*, got int"),
        (b"x", ValueError, r"images\[0\]: expected an image, got a text file"),
        (None, TypeError, "got NoneType"),
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"expected an array \(H, W, 3\), .* or \(H, W\), got \(4, 4, 5\)"),
        (np.zeros((3, 4, 5), np.uint8), ValueError, r"channels come last in an array: \.transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"got \(2, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"got \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "expected uint8, uint16 or floating point values, got int64"),
        (np.full((4, 4, 3), 255.0), ValueError, r"expected floating point values in \[0, 1\], got 255\.0\.\.255\.0"),
        (np.full((4, 4, 3), np.nan), ValueError, r"in \[0, 1\], got nan"),
        (np.full((4, 4), -0.5), ValueError, r"got -0\.5"),
        (
            torch.zeros(5, 4, 3),
            ValueError,
            r"got \(5, 4, 3\); channels come first in a tensor",
        ),
        (torch.zeros(1, 3, 4, 4), ValueError, r"got \(1, 3, 4, 4\); for a batch, pass a list of images"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), TypeError, "got int32"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), ValueError, r"expected 16-bit values 0\.\.65535"),
    ],
)
def test_unsupported_images(image, error, message):
    with pytest.raises(error, match=message):
        open_image(image, "images[0]")


def test_a_truncated_file(tmp_path):
    Image.fromarray(np.tile(RGB, (9, 9, 1))).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"half\.jpg: the image cannot be read: .*truncated"):
        open_image(tmp_path / "half.jpg", "image")


def test_a_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"bomb\.png: .*decompression bomb"):
        open_image(tmp_path / "bomb.png", "image")
