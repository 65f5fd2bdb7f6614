"""Images from base64, bytes and open files: their bytes, or an error that contains the name."""

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conditional_detr.inference.images import open_image
from conditional_detr.inference.sources import resolve_source, source_name

RGB = np.random.default_rng(2).integers(0, 255, (24, 32, 3), dtype=np.uint8)


def encoded(kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, kind)
    return buffer.getvalue()


PNG = encoded()


def test_base64_in_every_form():
    text = base64.b64encode(PNG).decode()
    wrapped = base64.encodebytes(PNG).decode()
    forms = [text, wrapped, text.rstrip("="), base64.urlsafe_b64encode(PNG).decode(), f"data:image/png;base64,{text}"]
    forms += [f"data:image/png;base64,{wrapped}", f"DATA:;base64,{text}"]
    for form in forms:
        assert resolve_source(form, "image") == PNG
    jpeg = encoded("JPEG")
    assert base64.b64encode(jpeg).decode().startswith("/9j/"), "which looks like a path"
    assert resolve_source(base64.b64encode(jpeg).decode(), "image") == jpeg


def test_bytes_and_open_files(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    for form in [PNG, bytearray(PNG), memoryview(PNG), io.BytesIO(PNG)]:
        assert resolve_source(form, "image") == PNG
    with path.open("rb") as file:
        assert resolve_source(file, "image") == PNG
    assert resolve_source(str(path), "image") == resolve_source(path, "image") == Path(path)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("", ValueError, r"images\[4\]: expected a path, URL or base64, got an empty string"),
        (
            "ftp://host/a.jpg",
            ValueError,
            "ftp://host/a.jpg: expected an http or https URL, got the scheme 'ftp'",
        ),
        (
            "A" * 4000,
            ValueError,
            r"images\[4\]: expected a path, URL or base64 of an image, got a string of 4000 characters",
        ),
        ("data:image/png;base64", ValueError, r"images\[4\]: expected a data URI such as"),
        (
            io.StringIO("text"),
            TypeError,
            r"images\[4\]: expected a file opened in binary mode, got .* str",
        ),
        (b"", ValueError, r"images\[4\]: expected an image, got an empty file"),
        (PNG[:200], OSError, r"images\[4\]: the image cannot be read: .*truncated"),
        (base64.b64encode(PNG[:200]).decode(), OSError, r"images\[4\]: the image cannot be read"),
        ("data:text/plain,hello", ValueError, r"images\[4\]: expected an image, got a text file"),
    ],
)
def test_unsupported_sources(image, error, message):
    with pytest.raises(error, match=message):
        open_image(image, "images[4]")


def test_unreadable_files(tmp_path):
    closed = io.BytesIO(PNG)
    closed.close()
    with pytest.raises(OSError, match="image: the open file cannot be read: I/O operation on closed file"):
        resolve_source(closed, "image")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa" * 9)
    with (tmp_path / "latin.txt").open(encoding="utf-8") as text, pytest.raises(TypeError, match="binary mode"):
        resolve_source(text, "image")


def test_a_short_path_is_not_base64():
    """The path is valid base64, but its bytes are not an image."""
    path = "photographs/of/the/summer/holidays/beach"
    assert resolve_source(path, "image") == Path(path)


def test_source_names():
    assert source_name("a.jpg", "images[0]") == source_name(Path("a.jpg"), "images[0]") == "a.jpg"
    assert source_name("http://host/a.jpg", "images[0]") == "http://host/a.jpg"
    for image in ["A" * 300, "data:,", b"", RGB, ""]:
        assert source_name(image, "images[0]") == "images[0]"


@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg: expected an image file, got a pipe or device"):
        open_image(tmp_path / "pipe.jpg", "image")
