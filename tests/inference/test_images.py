"""Pixels of images of every kind equal those of transformers' processor."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from conditional_detr import Preprocessing
from conditional_detr.inference.images import open_image, size_of
from conditional_detr.inference.preprocessing import normalise, normalise_image, open_resized, resized_size, to_pixels


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


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (96, 128), (301, 777)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_block_by_block(size, channels_last, dtype):
    """The formula on the whole image, in float32, to the last bit: blocks, layouts and batches change nothing."""
    preprocessing = Preprocessing(mean=(0.485, 0.1, -3.0), std=(0.229, 7.0, 0.3))
    values = torch.randint(0, 256, (2, *size, 3) if channels_last else (2, 3, *size), dtype=torch.uint8)
    values = values.permute(0, 3, 1, 2) if channels_last else values
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
    expected = ((values.float() / 255 - mean) / std).to(dtype)
    out = torch.full((2, 3, *size), torch.nan, dtype=dtype)
    assert normalise(values, preprocessing, out) is out
    assert torch.equal(out, expected)
    if dtype == torch.float32:
        assert torch.equal(normalise(values, preprocessing), expected)
        assert torch.equal(normalise(values[1], preprocessing), expected[1])
        image = Image.fromarray(values[0].permute(1, 2, 0).contiguous().numpy())
        assert torch.equal(normalise_image(image, preprocessing), expected[0])


FAST = Preprocessing(backend="torchvision")


@pytest.mark.parametrize("number", range(6))
def test_the_fast_backend_differs_by_rounding(shared, number):
    """One level of 255 in less than one value of a thousand, and sizes and floating point exactly."""
    path = sorted((shared / "data/coco/val2017").glob("*.jpg"))[11 * number]
    exact, size = open_resized(path, "", Preprocessing())
    fast, fast_size = open_resized(path, "", FAST)
    assert fast_size == size
    assert fast.dtype == exact.dtype == torch.uint8
    different = (fast.int() - exact.int()).abs()
    assert different.max() <= 1
    assert different.float().mean() < 1e-3
    pixels, expected = normalise(exact, FAST), normalise(exact, Preprocessing())
    torch.testing.assert_close(pixels, expected, rtol=0, atol=2e-6)
    array = np.asarray(open_image(path, "")) / 255.0
    assert torch.equal(open_resized(array, "", FAST)[0], open_resized(array, "", Preprocessing())[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_fast_backend_turns_and_reduces_photographs(tmp_path, orientation):
    """A photograph four times as large as needed, in each orientation: the size and, nearly, the values."""
    y, x = np.mgrid[0:600, 0:840] / 100
    waves = np.stack([np.sin(3 * x + y), np.cos(2 * y - x), np.sin(x * y / 2)], axis=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray((127 + 100 * waves).astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    edges = {"shortest_edge": 150, "longest_edge": 300}
    exact, size = open_resized(tmp_path / "a.jpg", "", Preprocessing(**edges))
    fast, fast_size = open_resized(tmp_path / "a.jpg", "", Preprocessing(**edges, backend="torchvision"))
    assert fast_size == size == ((600, 840) if orientation < 5 else (840, 600))
    assert fast.shape == exact.shape
    different = (fast.int() - exact.int()).abs().float()
    assert 0 < different.mean() < 1.5  # 0: it would not have been reduced
    assert different.max() <= 12


@pytest.mark.parametrize("kind", ["grey", "CMYK", "PNG", "truncated", "text", "missing", "pipe"])
def test_the_fast_backend_takes_and_refuses_the_same(tmp_path, kind):
    path = tmp_path / "a.jpg"
    image = Image.fromarray(RGB)
    if kind in ("grey", "CMYK"):
        image.convert("L" if kind == "grey" else kind).save(path)
    elif kind == "PNG":
        image.save(path, "PNG")
    elif kind == "text":
        path.write_text("no image")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "truncated":
        image.resize((300, 200)).save(path)
        path.write_bytes(path.read_bytes()[:-2000])
    if kind in ("text", "truncated", "missing", "pipe"):
        with pytest.raises((OSError, ValueError)) as expected:
            open_resized(path, "a", SMALL)
        with pytest.raises(expected.type) as got:
            open_resized(path, "a", replace(SMALL, backend="torchvision"))
        assert str(got.value) == str(expected.value)
        return
    exact, fast = (open_resized(path, "a", replace(SMALL, backend=backend))[0] for backend in ("pil", "torchvision"))
    assert (fast.int() - exact.int()).abs().max() <= 1


def test_opening_shares_no_pixels_with_the_callers_image():
    image = Image.fromarray(RGB)
    opened = open_image(image, "")
    opened.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(image), RGB)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected pil or torchvision, got 'cv2'"):
        Preprocessing(backend="cv2")
