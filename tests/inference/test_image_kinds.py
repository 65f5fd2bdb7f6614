"""Images of every kind give detections; everything else raises one error that contains its name."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing

RGB = np.random.default_rng(3).integers(0, 255, (48, 64, 3), dtype=np.uint8)
IMAGE = Image.fromarray(RGB)
GREY = Image.fromarray(RGB[..., 0])


@pytest.fixture(scope="module")
def detector(tiny) -> Detector:
    model = ConditionalDETR.from_pretrained(tiny.folder)
    model.metadata = Metadata(model.metadata.class_names, preprocessing=Preprocessing(64, 128))
    return Detector(model)


def encoded(image=IMAGE, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    exif = IMAGE.getexif()
    exif[0x0112] = 8
    return encoded(kind="JPEG", exif=exif)


def broken_exif() -> bytes:
    """Return a rotated JPEG with an EXIF pointer to before the start of the file."""
    turned = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"
    pointer = b"\x87\x69\x00\x09\x00\x00\x00\x01\xdd\x00\x00\x32"
    return encoded(kind="JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x02" + turned + pointer + bytes(4))


def animation() -> bytes:
    return encoded(kind="GIF", save_all=True, append_images=[GREY.convert("RGB")])


GOOD = {
    "jpeg": encoded(kind="JPEG"),
    "progressive jpeg": encoded(kind="JPEG", progressive=True),
    "grey jpeg": encoded(GREY, "JPEG"),
    "CMYK jpeg": encoded(IMAGE.convert("CMYK"), "JPEG"),
    "turned jpeg": turned(),
    "jpeg with broken EXIF": broken_exif(),
    "png": encoded(),
    "png with transparency": encoded(IMAGE.convert("RGBA")),
    "png with a palette": encoded(IMAGE.quantize(16)),
    "png of 16 bits": encoded(Image.fromarray(RGB[..., 0].astype(np.uint16) * 257)),
    "png of 1 bit": encoded(GREY.convert("1")),
    "webp": encoded(kind="WEBP"),
    "avif": encoded(kind="AVIF"),
    "gif": encoded(kind="GIF"),
    "animated gif": animation(),
    "bmp": encoded(kind="BMP"),
    "tiff": encoded(kind="TIFF"),
    "tiff of 32 bits": encoded(Image.fromarray(RGB[..., 0].astype(np.float32) / 255), "TIFF"),
    "ppm": encoded(kind="PPM"),
    "jpeg 2000": encoded(kind="JPEG2000"),
    "bytearray": bytearray(encoded()),
    "base64": base64.b64encode(encoded(kind="JPEG")).decode(),
    "data URI": "data:image/png;base64," + base64.b64encode(encoded()).decode(),
    "PIL": IMAGE,
    "PIL CMYK": IMAGE.convert("CMYK"),
    "PIL LAB": IMAGE.convert("LAB"),
    "array": RGB,
    "array of floats": RGB / 255,
    "grey array": RGB[..., 0],
    "array with one channel": RGB[..., :1],
    "array with transparency": np.dstack([RGB, RGB[..., 0]]),
    "array of 16 bits": RGB.astype(np.uint16) * 257,
    "array of half floats": (RGB / 255).astype(np.float16),
    "array, flipped view": RGB[::-1, ::-1],
    "tensor": torch.from_numpy(RGB).permute(2, 0, 1),
    "tensor of floats": torch.rand(3, 48, 64),
    "tensor of bfloat16": torch.rand(3, 48, 64, dtype=torch.bfloat16),
    "grey tensor with gradient": torch.rand(1, 48, 64, requires_grad=True),
    "one pixel": RGB[:1, :1],
    "a sliver": RGB[:1],
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.filterwarnings("ignore:.*EXIF", "ignore:.*MaxImagePixels")
def test_good(detector, kind):
    detections = detector(GOOD[kind], threshold=0.0, top_k=5)
    assert len(detections) == 5
    assert detections.boxes.isfinite().all()
    assert detections.scores.isfinite().all()
    height, width = detections.size
    assert (detections.boxes <= torch.tensor([width, height, width, height])).all()
    assert detections.draw().size == (width, height)
    if kind == "turned jpeg":
        assert detections.size == (64, 48)


def test_good_files_and_open_files(detector, tmp_path):
    path = tmp_path / "ein Bild ü.jpg"
    path.write_bytes(GOOD["jpeg"])
    with path.open("rb") as file:
        detections = detector([path, str(path), file, io.BytesIO(GOOD["jpeg"])], threshold=0, top_k=3)
    for other in detections[1:]:
        torch.testing.assert_close(detections[0].boxes, other.boxes, rtol=0, atol=1e-2)
        assert other.draw().size == (64, 48)
    assert detections[0].source == detections[1].source == path


def test_broken_exif_warns(detector):
    with pytest.warns(UserWarning, match=r"image: the EXIF data cannot be read .*; the image is not rotated"):
        detector(GOOD["jpeg with broken EXIF"])


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def swollen() -> bytes:
    """Return a PNG with a comment that would fill the memory when it is decompressed."""
    comment = chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(10**8)))
    return GOOD["png"][:33] + comment + GOOD["png"][33:]


def bomb() -> bytes:
    """Return a small PNG file whose header declares 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def corrupt(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(40) + data[len(data) // 2 + 40 :]


FILES = {
    "missing": (None, FileNotFoundError, "no such file"),
    "empty": (b"", ValueError, r"got an empty file \(0 bytes\)"),
    "text": (b"hello, this is no image", ValueError, "got a text file"),
    "web page": (b"<!DOCTYPE html><html></html>", ValueError, "got a web page"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', ValueError, "got an SVG drawing"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", ValueError, "got a PDF document"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", ValueError, "PostScript"),
    "mp4": (b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00", ValueError, r"got a video \(MP4"),
    "mkv": (b"\x1a\x45\xdf\xa3\x93\x42\x82", ValueError, r"got a video \(Matroska"),
    "avi": (b"RIFF\x00\x00\x00\x00AVI LIST", ValueError, r"got a video \(AVI"),
    "mpeg": (b"\x00\x00\x01\xb3\x16\x00\xf0\x15\xff" + bytes(40), ValueError, r"got a video \(MPEG"),
    "heic": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", ValueError, "got a HEIC image, which PIL opens once"),
    "zip": (b"PK\x03\x04\x14\x00", ValueError, "got a zip archive"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ValueError, "got a Git LFS pointer"),
    "noise": (np.random.default_rng(0).bytes(500), ValueError, "got a file in a format that PIL does not support"),
    "half a jpeg": (GOOD["jpeg"][: len(GOOD["jpeg"]) // 2], OSError, "cannot be read: .*truncated"),
    "half a png": (GOOD["png"][: len(GOOD["png"]) // 2], OSError, "cannot be read: .*"),
    "corrupt png": (corrupt(GOOD["png"]), OSError, "cannot be read: .*"),
    "half a gif": (GOOD["gif"][:100], (OSError, ValueError), "cannot be read|expected an image"),
    "half a webp": (GOOD["webp"][:100], (OSError, ValueError), "cannot be read|expected an image"),
    "half a qoi": (b"qoif" + struct.pack(">IIBB", 64, 48, 3, 0) + bytes(20), OSError, "cannot be read"),
    "half an avif": (GOOD["avif"][: len(GOOD["avif"]) // 2], ValueError, "got an AVIF image that is truncated"),
    "swollen png": (swollen(), OSError, "cannot be read: Decompressed data too large"),
    "bomb": (bomb(), ValueError, "decompression bomb.*; PIL.Image.MAX_IMAGE_PIXELS sets the limit"),
}


@pytest.mark.parametrize("kind", FILES)
def test_bad_files(detector, tmp_path, kind):
    content, error, message = FILES[kind]
    path = tmp_path / f"{kind}.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        detector([IMAGE, path])
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).count(str(path)) == 1
    if content is not None:
        with pytest.raises(error, match=rf"images\[1\]: .*({message})"):
            detector([IMAGE, content])


BAD = {
    "nothing": (None, TypeError, "got NoneType"),
    "a number": (3, TypeError, "got int"),
    "a list in the list": ([IMAGE], TypeError, "got list"),
    "empty string": ("", ValueError, "got an empty string"),
    "base64 of text": (
        base64.b64encode(b"no image at all" * 30).decode(),
        ValueError,
        r"got a string of \d+ characters",
    ),
    "text": (io.StringIO("x"), TypeError, "binary mode"),
    "empty PIL": (Image.new("RGB", (0, 5)), ValueError, "expected an image with pixels, got 0 x 5"),
    "truncated PIL": (Image.open(io.BytesIO(GOOD["jpeg"][:900])), OSError, "truncated"),
    "empty array": (RGB[:0], ValueError, r"got \(0, 64, 3\)"),
    "two channels": (RGB[..., :2], ValueError, r"got \(48, 64, 2\)"),
    "a batch": (RGB[None], ValueError, "for a batch, pass a list of images"),
    "NaN": (np.full((4, 4, 3), np.nan), ValueError, r"expected floating point values in \[0, 1\], got nan"),
    "infinity": (np.full((4, 4, 3), np.inf), ValueError, r"expected floating point values in \[0, 1\], got inf"),
    "floats to 255": (RGB.astype(np.float32), ValueError, "use uint8 for 0..255"),
    "normalised": (torch.randn(3, 9, 9), ValueError, r"expected floating point values in \[0, 1\]"),
    "int64": (RGB.astype(np.int64), TypeError, "expected uint8, uint16 or floating point values, got int64"),
    "bool tensor": (torch.ones(3, 4, 4, dtype=torch.bool), TypeError, "got bool"),
    "text array": (np.array([["a"]]), TypeError, "got <U1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_objects(detector, kind):
    image, error, message = BAD[kind]
    with pytest.raises(error, match=rf"^images\[2\]: .*{message}") as caught:
        detector([IMAGE, RGB, image])
    assert "\n" not in str(caught.value)


def test_skipping(detector, tmp_path):
    """A skipped image gives None at its position and one warning."""
    (tmp_path / "text.jpg").write_text("hello")
    images = [IMAGE, tmp_path / "text.jpg", RGB[:20], None, RGB]
    with pytest.warns(UserWarning, match="skipped: ") as warned:
        detections = detector(images, threshold=0, top_k=2, on_error="skip")
    assert [d is None for d in detections] == [False, True, False, True, False]
    assert detections[2].size == (20, 64)
    messages = [str(warning.message) for warning in warned]
    assert [m.split(":")[:2] for m in messages] == [["skipped", f" {images[1]}"], ["skipped", " images[3]"]]
    with pytest.warns(UserWarning, match="skipped: image: expected a file opened in binary mode"):
        assert detector(io.StringIO(), on_error="skip") is None
