"""The cache of decoded images: the same samples, each image decoded once, nothing stale or damaged used."""

import json
import multiprocessing
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from conditional_detr import Preprocessing
from conditional_detr.data import dataset, image_cache
from conditional_detr.data.augmentation import Augmentation
from conditional_detr.data.dataset import CocoData
from conditional_detr.inference.images import open_fast, open_image
from conditional_detr.system import memory

NAMES = ("rgb.jpg", "turned.jpg", "grey.jpg", "small.png", "sixteen.png", "float.tiff")


def images_in(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    values = generator.integers(0, 256, (5, 5, 3), np.uint8)
    image = Image.fromarray(values).resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rgb.jpg")
    image.save(folder / "turned.jpg", exif=exif)
    image.convert("L").save(folder / "grey.jpg")
    image.resize((7, 6)).save(folder / "small.png")
    Image.fromarray(generator.integers(0, 65536, (40, 60), np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(generator.random((40, 60), np.float32)).save(folder / "float.tiff")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images_in(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Return the names of the images that are decoded from now on."""
    names: list[str] = []
    plain = dataset.open_by_backend
    monkeypatch.setattr(
        dataset, "open_by_backend", lambda path, *options: (names.append(path.name), plain(path, *options))[1]
    )
    return names


def data_of(folder: Path, cache: str | None = None, backend: str = "pil", names=NAMES) -> CocoData:
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
            for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "x"}],
    }
    preprocessing = Preprocessing(48, 64, backend=backend)
    return CocoData(content, folder, augmentation=Augmentation.small(), preprocessing=preprocessing, cache=cache)


def assert_same(some, others) -> None:
    assert len(some) == len(others)
    for i in range(len(some)):
        (pixels, target), (expected, expected_target) = some[i], others[i]
        assert torch.equal(pixels, expected)
        assert all(torch.equal(target[key], expected_target[key]) for key in ("boxes", "labels"))


def files_of(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "conditional_detr" / "images").iterdir())


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_samples_are_the_same_and_decoded_once(folder, decoded, cache, backend):
    """Floating point values are decoded each time; everything else once, for all epochs."""
    data, plain = data_of(folder, cache, backend), data_of(folder, backend=backend)
    for epoch in range(3):
        data.set_epoch(epoch)
        plain.set_epoch(epoch)
        decoded.clear()
        samples = [data[i] for i in range(len(data))]
        assert decoded == (list(NAMES) if epoch == 0 else ["float.tiff"])
        assert_same(samples, plain)
    decoded.clear()
    plain.set_epoch(0)
    assert_same(data_of(folder, cache, backend), plain)
    mine = Counter(decoded) - Counter(NAMES)
    assert mine == Counter(["float.tiff"] if cache == "disk" else NAMES)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_a_kept_image_is_the_decoded_one(folder, cache):
    """Also in memory layout, on which kernels depend; and changing it changes no later one."""
    for backend, decode in (
        ("pil", lambda path: open_image(path, "")),
        ("torchvision", lambda p: open_fast(p, "")[0]),
    ):
        data = data_of(folder, cache, backend)
        for index, name in enumerate(NAMES[:-1]):
            expected = decode(folder / name)
            for _ in range(3):
                image = data.cache.open(index, lambda expected=expected: expected)
                if isinstance(expected, Image.Image):
                    assert (image.mode, image.size, image.tobytes()) == ("RGB", expected.size, expected.tobytes())
                    image = image.copy() if image is expected else image
                    image.paste((1, 2, 3), (0, 0, 2, 2))
                else:
                    assert torch.equal(image, expected)
                    assert image.stride() == expected.stride()
                    image = image.clone() if image is expected else image
                    image.zero_()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_workers_share_what_one_of_them_decoded(folder, decoded, cache, method):
    data = data_of(folder, cache, names=NAMES[:-1])
    context = multiprocessing.get_context(method)
    loaded = list(DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context))
    assert_same(loaded, data_of(folder, names=NAMES[:-1]))
    decoded.clear()
    assert_same(data, loaded)
    assert decoded == []


def test_a_changed_file_is_decoded_again(folder, decoded):
    assert_same(data_of(folder, "disk"), data_of(folder))
    state = (folder / "rgb.jpg").stat()
    image = Image.new("RGB", (60, 40), "red")
    image.save(folder / "new.jpg")
    (folder / "new.jpg").replace(folder / "rgb.jpg")
    os.utime(folder / "rgb.jpg", ns=(state.st_atime_ns, state.st_mtime_ns))
    decoded.clear()
    assert_same(data_of(folder, "disk"), data_of(folder))
    assert Counter(decoded) - Counter(NAMES) == Counter(["rgb.jpg", "float.tiff"])
    assert len(files_of(folder)) == 5
    (folder / "rgb.jpg").unlink()
    with pytest.raises(OSError, match=r"rgb\.jpg"):
        data_of(folder, "disk", names=["rgb.jpg"])[0]


def test_a_decoder_of_another_version_decodes_again(folder, decoded, monkeypatch):
    assert_same(data_of(folder, "disk"), data_of(folder))
    monkeypatch.setattr(image_cache.PIL, "__version__", "0.1")
    decoded.clear()
    [data_of(folder, "disk")[i] for i in range(6)]
    assert decoded == list(NAMES)


def with_shape(content: bytes, value: object) -> bytes:
    """Return a file whose header has another shape."""
    header, values = content.split(b"\n", 1)
    fields = json.loads(header)
    fields["content"][2] = value
    return json.dumps(fields).encode() + b"\n" + values


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"[]\n",
        lambda content: b"[" * 10**5,
        lambda content: content[:-1],
        lambda content: content + b"\x00",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:-600] + bytes(600),
        lambda content: with_shape(content, [60, 40, 3]),
        lambda content: with_shape(content, [40, 10**30, 3]),
        lambda content: with_shape(content, None),
    ],
)
def test_a_damaged_file_is_written_anew(folder, decoded, damage):
    names = ["rgb.jpg"]
    plain = data_of(folder, names=names)
    assert_same(data_of(folder, "disk", names=names), plain)
    (file,) = files_of(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    decoded.clear()
    assert_same(data_of(folder, "disk", names=names), plain)
    assert decoded == names * 2
    assert file.read_bytes() == whole
    decoded.clear()
    assert_same(data_of(folder, "disk", names=names), plain)
    assert decoded == names  # of the dataset without a cache


def test_a_full_disk_only_costs_time(folder, decoded, monkeypatch):
    def fail(writers):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache, "write_atomically", fail)
    data = data_of(folder, "disk")
    assert_same(data, data_of(folder))
    assert_same(data, data_of(folder))
    assert Counter(decoded) == Counter(NAMES * 4)
    assert files_of(folder) == []


def test_size_and_place_are_told(folder):
    assert str(data_of(folder, "ram").cache) == "cache: 6 images, 0.0 MB in memory"
    place = folder.parent / "cache" / "conditional_detr" / "images"
    assert str(data_of(folder, "disk").cache) == f"cache: 6 images, 0.0 MB in {place}"
    paths = [Path("a.jpg")] * 1234
    assert str(image_cache.DiskCache(paths, [(600, 548)] * 1234, "pil")) == f"cache: 1,234 images, 1.2 GB in {place}"


def test_images_that_do_not_fit_are_refused(folder, monkeypatch):
    """80 % of what is free may be taken, in memory by all processes of a machine together."""
    needed = sum(3 * h * w for h, w in ((40, 60), (60, 40), (40, 60), (6, 7), (40, 60), (40, 60)))
    assert needed == 36126
    monkeypatch.setattr(image_cache, "_free_memory", lambda: needed / 0.8 + 2)
    data_of(folder, "ram")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    message = r"^cache: expected at most 0\.0 MB, 80% of the free memory, got 6 images of 0\.0 MB; use cache='disk'$"
    with pytest.raises(ValueError, match=message):
        data_of(folder, "ram")
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    with pytest.raises(ValueError, match=r"80% of the free space in .*images, got 6 images of 0\.0 MB; use no cache$"):
        data_of(folder, "disk")
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: usage)
    data = data_of(folder, "disk")
    [data[i] for i in range(6)]
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: usage._replace(free=3 * 40 * 60 / 0.8 + 2))
    data_of(folder, "disk")  # all but the one that cannot be kept are there


@pytest.mark.parametrize("group", ["/", "/job/step"])
def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch, group):
    """1,000 of 4,000 bytes are used, 300 of them by files that the system can drop."""
    (tmp_path / "job" / "step").mkdir(parents=True)
    for folder, limit in ((tmp_path, "4000" if group == "/" else "5000"), (tmp_path / "job", "4000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("1000\n")
        (folder / "memory.stat").write_text("anon 700\ninactive_file 200\nactive_file 100\n")
    for name, value in (("max", "max"), ("current", "900")):
        (tmp_path / "job" / "step" / f"memory.{name}").write_text(value)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    plain = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **o: f"0::{group}\n" if str(self) == "/proc/self/cgroup" else plain(self, **o)
    )
    assert image_cache._free_memory() == 3300


def test_another_cache_is_refused(folder):
    with pytest.raises(ValueError, match=r"^cache: expected None, 'ram' or 'disk', got 'gpu'$"):
        data_of(folder, "gpu")
