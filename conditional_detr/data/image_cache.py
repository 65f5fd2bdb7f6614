"""Keep the decoded images of a dataset, in shared memory or in files, so that each is decoded once.

What is kept is the image as the backend of the preprocessing decodes it, upright, before any augmentation. An image is
kept when it is first opened. One with floating point values is decoded each time.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch import Tensor

from conditional_detr.data.image_check import cache_folder
from conditional_detr.inference.sources import source_state
from conditional_detr.system.atomic_files import remove_unfinished, write_atomically
from conditional_detr.system.memory import free_memory, readable_bytes

Cache: TypeAlias = Literal["ram", "disk"]
"""Where decoded images are kept: in memory that all workers of a process share, or in the user's cache folder."""

_SHARE = 0.8  # of the free memory or disk space that a cache may take: other programs and checkpoints need some
_PIL, _TENSOR, _PLANES = 1, 2, 3  # (H, W, 3) of a PIL image, or of a tensor whose channels come last; (3, H, W)
_SHARED_MEMORY = Path("/dev/shm")


class ImageCache(ABC):
    """Decoded images of a dataset by index, the same in all processes; str() gives their number, size and place."""

    def open(self, index: int, decode: Callable[[], Image.Image | Tensor]) -> Image.Image | Tensor:
        """Return an image that is kept, or else decode and keep it."""
        state = self._state(index)  # of before: a file that changes while it is decoded is decoded again
        kept = self._read(index, state)
        if kept is not None:
            return _to_image(*kept)
        opened = decode()
        if isinstance(opened, Image.Image):
            self._write(index, _PIL, np.asarray(opened), state)
        elif opened.dtype == torch.uint8:
            last = opened.permute(1, 2, 0)
            layout, values = (_TENSOR, last) if last.is_contiguous() else (_PLANES, opened)
            self._write(index, layout, values.contiguous().numpy(), state)
        return opened

    @abstractmethod
    def _state(self, index: int) -> list[object]:
        """Return what changes when an image has to be decoded again."""

    @abstractmethod
    def _read(self, index: int, state: list[object]) -> tuple[int, np.ndarray] | None:
        """Return the layout and the values of an image, which the caller must copy; None if it is not kept."""

    @abstractmethod
    def _write(self, index: int, layout: int, values: np.ndarray, state: list[object]) -> None:
        """Keep an image; if that fails, it is decoded again the next time."""


class MemoryCache(ImageCache):
    """Images in shared memory, which is taken as a whole in the beginning.

    Args:
        sizes: the (height, width) of each image.

    Raises:
        ValueError: the images do not fit in the free memory.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        self._sizes = list(sizes)
        self._starts = np.cumsum([0, *(3 * height * width for height, width in sizes)])
        total = int(self._starts[-1])
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of torchrun: each has its own cache
        _check_space(len(sizes), total, _free_memory() / processes, "memory", "cache='disk'")
        # an index is loaded once an epoch, so one process has written its image long before another reads it
        self._layouts = torch.zeros(len(sizes), dtype=torch.uint8, device="cpu").share_memory_()
        self._values = torch.empty(total, dtype=torch.uint8, device="cpu").share_memory_()

    def __str__(self) -> str:
        return f"cache: {len(self._sizes):,} images, {readable_bytes(len(self._values))} in memory"

    def _state(self, index: int) -> list[object]:
        return []

    def _read(self, index: int, state: list[object]) -> tuple[int, np.ndarray] | None:
        layout, (height, width) = int(self._layouts[index]), self._sizes[index]
        shape = (3, height, width) if layout == _PLANES else (height, width, 3)
        values = self._values[self._starts[index] : self._starts[index + 1]].numpy()
        return (layout, values.reshape(shape)) if layout else None

    def _write(self, index: int, layout: int, values: np.ndarray, state: list[object]) -> None:
        height, width = self._sizes[index]
        if values.shape == ((3, height, width) if layout == _PLANES else (height, width, 3)):
            self._values[self._starts[index] : self._starts[index + 1]].numpy()[:] = values.reshape(-1)
            self._layouts[index] = layout


class DiskCache(ImageCache):
    """Images in files, one each, which later runs use, too.

    A file belongs to the path of the image and the backend, and is written anew if the image file's time, size or
    inode, or the version of the decoder is another one, or if the file is damaged.

    Args:
        paths: the file of each image.
        sizes: the (height, width) of each image.
        backend: the backend of the preprocessing.

    Raises:
        OSError: the folder cannot be made.
        ValueError: the images that are not kept yet do not fit in the free disk space.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[tuple[int, int]], backend: str) -> None:
        self._folder, self._paths, self._backend = cache_folder() / "images", list(paths), backend
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self._folder)
        lengths = [3 * height * width for height, width in sizes]
        self._total = sum(lengths)
        missing = [length for index, length in enumerate(lengths) if not self._file(index).exists()]
        free = shutil.disk_usage(self._folder).free
        _check_space(len(missing), sum(missing), free, f"space in {self._folder}", "no cache")
        self._versions = [PIL.__version__, *([torchvision.__version__] if backend == "torchvision" else [])]
        self._intact: set[int] = set()  # whose checksum this process has compared

    def __str__(self) -> str:
        return f"cache: {len(self._paths):,} images, {readable_bytes(self._total)} in {self._folder}"

    def _file(self, index: int) -> Path:
        name = f"{os.path.abspath(self._paths[index])}\n{self._backend}"  # noqa: PTH100  # Path keeps ".."
        return self._folder / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()

    def _state(self, index: int) -> list[object]:
        return [list(source_state(self._paths[index]) or ()), *self._versions]

    def _read(self, index: int, state: list[object]) -> tuple[int, np.ndarray] | None:
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            with self._file(index).open("rb") as file:
                header = json.loads(file.readline(1000))
                content, offset, size = header["content"], file.tell(), os.fstat(file.fileno()).st_size
            found, layout, shape = content
            if found != state or math.prod(shape) + offset != size:
                return None
            values = np.memmap(self._file(index), np.uint8, "r", offset, tuple(shape))
            if index not in self._intact and _checksum(content, values) != header["crc32"]:
                return None
            self._intact.add(index)
            return layout, values
        return None

    def _write(self, index: int, layout: int, values: np.ndarray, state: list[object]) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(values.data)

        values = np.ascontiguousarray(values)
        content = [state, layout, list(values.shape)]
        header = {"content": content, "crc32": _checksum(content, values)}
        self._intact.discard(index)
        with suppress(OSError):
            write_atomically({self._file(index): write})


def make_cache(
    cache: Cache | None, paths: Sequence[Path], sizes: Sequence[tuple[int, int]], backend: str
) -> ImageCache | None:
    """Return the cache of a dataset's images; None: without one.

    Args:
        cache: where the images are kept.
        paths: the file of each image.
        sizes: the (height, width) of each image.
        backend: the backend of the preprocessing.

    Raises:
        OSError: the folder of the files cannot be made.
        ValueError: an unknown cache, or too little space for the images.
    """
    if cache is None:
        return None
    if cache not in ("ram", "disk"):
        raise ValueError(f"cache: expected None, 'ram' or 'disk', got {cache!r}")
    return MemoryCache(sizes) if cache == "ram" else DiskCache(paths, sizes, backend)


def _checksum(content: list[object], values: np.ndarray) -> int:
    """Return the CRC-32 of the description of an image and its values."""
    return zlib.crc32(values.data, zlib.crc32(json.dumps(content).encode()))


def _to_image(layout: int, values: np.ndarray) -> Image.Image | Tensor:
    """Return a copy of kept values as the image that was decoded."""
    if layout == _PIL:
        return Image.frombytes("RGB", (values.shape[1], values.shape[0]), values)
    tensor = torch.from_numpy(np.array(values))
    return tensor.permute(2, 0, 1) if layout == _TENSOR else tensor


def _check_space(images: int, needed: int, free: float, where: str, instead: str) -> None:
    """Raise ValueError if images need more bytes than a part of those that are free."""
    if needed > _SHARE * free:
        raise ValueError(
            f"cache: expected at most {readable_bytes(_SHARE * free)}, {_SHARE:.0%} of the free {where},"
            f" got {images:,} images of {readable_bytes(needed)}; use {instead}"
        )


def _free_memory() -> float:
    """Return the bytes of shared memory that this process may take; infinity where the system does not tell it."""
    shared = math.inf
    with suppress(OSError):
        shared = shutil.disk_usage(_SHARED_MEMORY).free  # in containers often 64 MB
    return min(shared, free_memory())
