"""What programs hand over as images: buffers that are used again, images shared by threads, odd files and modes."""

import os
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from conditional_detr import ConditionalDETR, Detections, Detector, Metadata, Preprocessing
from conditional_detr.data.synthetic import draw_image
from conditional_detr.inference.images import open_image, size_of, size_of_file
from conditional_detr.inference.preprocessing import normalise


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.from_pretrained("shapes")


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    return [draw_image(0, index, size=(96, 128))[0] for index in range(6)]


def numbers(detections: Detections) -> tuple[list[str], list[int]]:
    return list(detections.names), detections.boxes.round().int().flatten().tolist()


def arrays(frames):
    """One array for all frames, as a video decoder with a buffer of its own gives them."""
    shared = np.empty((96, 128, 3), np.uint8)
    for frame in frames:
        shared[:] = np.asarray(frame)
        yield shared


def tensors(frames):
    shared = torch.empty(3, 96, 128, dtype=torch.uint8)
    for frame in frames:
        shared.copy_(torch.from_numpy(np.array(frame)).permute(2, 0, 1))
        yield shared


def buffers(frames):
    shared = bytearray(96 * 128 * 3 + 64)
    for frame in frames:
        header = b"P6 128 96 255\n"
        shared[:] = header + np.asarray(frame).tobytes()
        yield shared


@pytest.mark.parametrize("source", [arrays, tensors, buffers])
def test_a_buffer_that_is_used_again(detector, frames, source):
    detect = partial(detector, threshold=0.3)
    expected = [numbers(detect(frame)) for frame in frames]
    assert [numbers(found) for found in detect(source(frames), batch_size=4)] == expected
    assert len({str(one) for one in expected}) == 6


def test_a_sequence_that_reads_its_frames_when_they_are_asked_for(detector, frames):
    """As a decoder's reader: it has a length and an index, and one buffer."""

    class Reader(Sequence):
        def __init__(self):
            self.buffer = np.empty((96, 128, 3), np.uint8)

        def __len__(self):
            return len(frames)

        def __getitem__(self, index):
            if index >= len(frames):
                raise IndexError
            self.buffer[:] = np.asarray(frames[index])
            return self.buffer

    expected = [numbers(detector(frame, threshold=0.3)) for frame in frames]
    assert [numbers(found) for found in detector(Reader(), threshold=0.3, batch_size=4)] == expected


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp"])
def test_frames_of_an_animation(detector, frames, suffix, tmp_path):
    """PIL's iterator gives one image object for all frames."""
    path = tmp_path / f"animation.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as animation:
        expected = [numbers(detector(frame.copy(), threshold=0.3)) for frame in ImageSequence.Iterator(animation)]
    with Image.open(path) as animation:
        found = detector(ImageSequence.Iterator(animation), threshold=0.3)
        assert [numbers(one) for one in found] == expected
    assert len(expected) == 6


def test_one_image_that_is_not_loaded_several_times(detector, tmp_path):
    """In one list, and in several threads of the caller."""
    path = tmp_path / "noise.jpg"
    Image.effect_noise((1500, 1500), 50).convert("RGB").save(path)
    expected = numbers(detector(path, threshold=0.2))
    for _ in range(3):
        image = Image.open(path)
        assert [numbers(found) for found in detector([image] * 3, threshold=0.2)] == [expected] * 3
    image, results = Image.open(path), []
    threads = [threading.Thread(target=lambda: results.append(open_image(image, "image"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({opened.tobytes() for opened in results}) == 1
    assert len(results) == 4


def test_frames_of_an_iterator_are_not_kept_unless_asked(detector, frames, tmp_path):
    frames[0].save(tmp_path / "a.png")
    images = [np.asarray(frames[0]), frames[0], torch.from_numpy(np.array(frames[0])).permute(2, 0, 1)]
    for found in detector(iter(images)):
        assert found.source is None
        with pytest.raises(ValueError, match="image: expected one to draw on, got none; images of an iterator"):
            found.draw()
        assert found.draw(frames[0]).size == (128, 96)
    assert [found.draw().size for found in detector(iter(images), keep_images=True)] == [(128, 96)] * 3
    assert [found.source is image for found, image in zip(detector(images), images, strict=True)] == [True] * 3
    assert next(detector(iter([tmp_path / "a.png"]))).draw().size == (128, 96)


def test_boxes_are_not_drawn_on_another_image(detector, frames, tmp_path):
    path = tmp_path / "a.png"
    frames[0].save(path)
    found = detector(path)
    with pytest.raises(ValueError, match="image: expected the detected one of 128 x 96 pixels, got 64 x 48"):
        found.draw(frames[0].resize((64, 48)))
    frames[1].save(path)
    for work in (found.draw, partial(detector.draw_attention, found)):
        with pytest.raises(OSError, match=r"a\.png: the file has changed since the detection"):
            work()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png: no such file"):
        found.draw()


def test_a_file_replaced_by_one_of_equal_size_and_time_is_noticed(detector, frames, tmp_path):
    path = tmp_path / "a.bmp"
    frames[0].save(path)
    found, before = detector(path), path.stat()
    frames[1].save(tmp_path / "b.bmp")
    os.utime(tmp_path / "b.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "b.bmp").replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(OSError, match=r"a\.bmp: the file has changed since the detection"):
        found.draw()


@pytest.mark.parametrize("kind", ["PIL", "array", "strided", "tensor", "bfloat16"])
@pytest.mark.parametrize("many", [False, True])
def test_an_image_overwritten_in_memory_is_noticed(detector, frames, kind, many):
    """A buffer that a camera reuses: boxes of one frame are not drawn on the next."""
    image = frames[0].copy()
    if kind in ("array", "strided"):
        image = np.array(image)[:, ::-1] if kind == "strided" else np.array(image)
    elif kind != "PIL":
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        image = (image / 255).to(torch.bfloat16) if kind == "bfloat16" else image
    found = detector([image])[0] if many else detector(image)
    assert found.draw().size == (128, 96)
    assert replace(found, state=None).draw().size == (128, 96)  # as a program makes it
    if kind == "PIL":
        image.putpixel((3, 4), tuple(255 - value for value in image.getpixel((3, 4))))
    else:
        image[0, 3, 2] = 1 - image[0, 3, 2] if kind == "bfloat16" else 255 - image[0, 3, 2]
    for work in (found.draw, partial(detector.draw_attention, found)):
        with pytest.raises(OSError, match="image: it has changed since the detection; pass the detected image"):
            work()


# Where the stored image's upper left corner is shown: row and column (EXIF 2.3, tag 274).
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
def test_the_size_of_a_file_is_that_of_the_opened_image(tmp_path, suffix, orientation):
    """EXIF 5 to 8 swap the sides, and a TIFF's are swapped by some versions of PIL before its pixels are read."""
    path = tmp_path / f"a.{suffix}"
    image = Image.new("RGB", (60, 20), "white")
    image.paste("black", (0, 0, 30, 10))  # the upper left quarter
    if suffix == "tif":
        image.save(path, tiffinfo={274: orientation})
    else:
        exif = Image.Exif()
        exif[274] = orientation
        image.save(path, exif=exif, quality=95)
    opened = open_image(path, "a")
    assert size_of_file(path) == size_of(opened) == ((20, 60) if orientation < 5 else (60, 20))
    dark = np.asarray(opened.convert("L")) < 128
    assert dark[CORNERS[orientation]]
    assert dark.mean() == pytest.approx(0.25, abs=0.03)


INTEGERS = np.arange(24 * 32, dtype=np.int32).reshape(24, 32) % 256


@pytest.mark.parametrize("make", [lambda: Image.fromarray(INTEGERS), lambda: Image.fromarray(INTEGERS).convert("I")])
def test_integers_that_may_be_8_bits_or_16(make):
    with pytest.raises(
        ValueError, match=r"x: expected 8-bit or 16-bit values, got 32-bit integers 0\.\.255 \(mode I\)"
    ):
        open_image(make(), "x")


def test_integers_that_can_only_be_16_bits():
    opened = open_image(Image.fromarray(INTEGERS * 257), "x")
    assert np.array_equal(np.asarray(opened)[..., 0], INTEGERS)


def test_dark_files_of_16_bits_are_read_as_such(tmp_path):
    for suffix in ("png", "tif"):
        Image.fromarray(INTEGERS.astype(np.uint16)).save(tmp_path / f"dark.{suffix}")
        assert np.asarray(open_image(tmp_path / f"dark.{suffix}", "x")).max() == 1


def test_all_rows_of_a_name_are_detected_and_filtered(detector, frames):
    model = ConditionalDETR.from_pretrained("shapes")
    model.metadata = Metadata(("a", "a", "a", "b", "c", "a"), preprocessing=model.metadata.preprocessing)
    twice = Detector(model)
    for frame in frames:
        found = twice(frame, threshold=0.3)
        wanted = twice(frame, threshold=0.3, classes=["a"])
        assert numbers(wanted) == numbers(found.filter(classes=["a"]))
        assert len(wanted) == sum(name == "a" for name in found.names)
        assert numbers(twice(frame, threshold=0.3, classes=[np.int64(1)])) == numbers(found.filter(classes=[1]))
    with pytest.raises(ValueError, match="classes: expected names or rows of the model's classes, got True"):
        twice(frames[0], classes=[True])


def test_default_dtype_and_device_change_nothing(detector, frames):
    expected = numbers(detector(frames[0]))
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    torch.set_default_dtype(torch.float64)
    try:
        assert normalise(pixels, Preprocessing()).dtype == torch.float32
        assert numbers(detector(frames[0])) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        found = detector(frames[0])
        assert numbers(found) == expected
        assert len(found[[0]].filter(threshold=0.1).sort("area")) == 1
        assert len(detector([frames[0], np.asarray(frames[0])], classes=["disc", 0])) == 2
    finally:
        torch.set_default_device(None)


def test_a_bad_item_of_an_iterator_is_that_items_failure(detector, frames, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    frames[0].save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    broken = Image.open(tmp_path / "whole.png")
    broken.fp = None
    broken.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        items = iter([frames[0], 3.5, broken, np.zeros((2, 2)), whole])
        results = list(detector(items, on_error="skip"))
    assert [result is None for result in results] == [False, True, True, False, False]
    assert [str(one.message)[:18] for one in caught] == ["skipped: images[1]", "skipped: images[2]"]
