"""The check of image headers, and its cache: the same findings, without reading unchanged files again."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from conditional_detr.data import image_check
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.image_check import find_bad_images

SIZES = {"a.png": (6, 4), "b.jpg": (8, 8), "c.bmp": (3, 9)}  # width, height


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size).save(folder / name)
    return folder


@pytest.fixture
def data():
    images = [{"id": n, "file_name": name, "width": w, "height": h} for n, (name, (w, h)) in enumerate(SIZES.items())]
    return read_annotations({"images": images, "annotations": [], "categories": [{"id": 1, "name": "x"}]})


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Return the names of the files whose headers are read from now on."""
    names: list[str] = []
    size_of_file = image_check.size_of_file
    monkeypatch.setattr(image_check, "size_of_file", lambda path: (names.append(path.name), size_of_file(path))[1])
    return names


def cache_of(folder: Path) -> Path:
    (cache,) = (folder.parent / "cache" / "conditional_detr").iterdir()
    return cache


def test_only_changed_files_are_read_again(folder, data, read):
    assert find_bad_images(data, folder) == []
    assert sorted(read) == sorted(SIZES)
    read.clear()
    assert find_bad_images(data, folder) == []
    assert read == []
    state = (folder / "a.png").stat()
    Image.new("RGB", (5, 4)).save(folder / "new.png")
    (folder / "new.png").replace(folder / "a.png")
    os.utime(folder / "a.png", ns=(state.st_atime_ns, state.st_mtime_ns))  # as copies that keep times have it
    (error,) = find_bad_images(data, folder)
    assert "a.png" in str(error)
    assert read == ["a.png"]


def test_bad_files_are_read_each_time(folder, data, read):
    (folder / "b.jpg").write_bytes(b"no image")
    (folder / "c.bmp").unlink()
    messages = [str(error) for error in find_bad_images(data, folder)]
    assert [Path(message.split(":")[0]).name for message in messages] == ["b.jpg", "c.bmp"]
    read.clear()
    assert [str(error) for error in find_bad_images(data, folder)] == messages
    assert sorted(read) == ["b.jpg", "c.bmp"]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 3}', '{"a": ["x", 1]}', "[" * 10**5, "\x00"])
def test_a_damaged_cache_is_replaced(folder, data, read, content):
    find_bad_images(data, folder)
    cache = cache_of(folder)
    whole = json.loads(cache.read_text())
    cache.write_text(content)
    read.clear()
    assert find_bad_images(data, folder) == []
    assert sorted(read) == sorted(SIZES)
    assert json.loads(cache.read_text()) == whole


def test_without_a_place_for_the_cache(folder, data, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert find_bad_images(data, folder) == []
    assert (tmp_path / "cache").read_text() == "a file where the folder would be"
