"""Train on datasets that do not fit on a machine: images in Parquet files, which are read as they are needed."""

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from conditional_detr.data.annotations import warn_of_left_out_categories
from conditional_detr.data.augmentation import Augmentation
from conditional_detr.data.coco import stated_size
from conditional_detr.data.dataset import AnnotatedData
from conditional_detr.data.formats.parquet import open_shards
from conditional_detr.data.row_groups import Contents, RowGroup, ShardImages, Shards
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.inference.preprocessing import open_by_backend
from conditional_detr.modeling.metadata import Preprocessing

_BUFFER_IMAGES, _BUFFER_BYTES = 5000, 500_000_000
_AHEAD = 2  # row groups that are read before they are needed


class Sharding(NamedTuple):
    """What the order of an epoch depends on, besides the seed.

    Attributes:
        row_groups: their number.
        shuffle_buffer: number of images that are shuffled together.
        sizes: CRC-32 of the numbers of images in the row groups.
    """

    row_groups: int
    shuffle_buffer: int
    sizes: int


class ParquetData(AnnotatedData):
    """A dataset in Parquet files, on this machine or in an object store, as Hugging Face's datasets are.

    Annotations are read and checked in the beginning, and stay in memory; images are read when they are needed, row
    group by row group, in one process of the training for each device.
    :func:`~conditional_detr.data.batching.batches` draws the row groups of an epoch in a random order, each process
    its own, and shuffles the images of those that follow each other.

    Attributes:
        images: the encoded images by image id.
        row_groups: the indices of the samples in each row group.
        shuffle_buffer: number of images that are shuffled together.
        sharding: what a resumed run compares of them.
    """

    def __init__(
        self,
        source: str | Path | Shards,
        *,
        augmentation: Augmentation | None = None,
        preprocessing: Preprocessing = Preprocessing(),  # noqa: B008  # frozen
        class_names: Sequence[str | None] | None = None,
        seed: int = 0,
        shuffle_buffer: int | None = None,
    ) -> None:
        """Read the annotations.

        Args:
            source: the path or URI of a folder of Parquet files, of which the training split is used, or of one file;
                or what :func:`~conditional_detr.data.formats.parquet.open_shards` returns. URIs are those of bulk
                detection: ``s3://``, ``gs://``, ``hf://datasets/owner/name``, ``fsspec+PROTOCOL://``.
            augmentation: as in :class:`~conditional_detr.data.dataset.CocoData`, and so are the next three.
            preprocessing: see augmentation.
            class_names: see augmentation.
            seed: see augmentation.
            shuffle_buffer: number of images that are shuffled together. Up to twice as many encoded images are in the
                memory of each process, and some row groups. Default: as many as have 500 MB, at most 5,000.

        Raises:
            ImportError: pyarrow, or the package of the file system is not installed.
            OSError: a file cannot be read.
            ValueError: a file lacks a column; the annotations are invalid, as in CocoData; class_names lacks a
                category; or seed or shuffle_buffer is out of range.
        """
        if shuffle_buffer is not None and shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer: expected at least 1, got {shuffle_buffer}")
        shards = source if isinstance(source, Shards) else open_shards(source)
        annotations = shards.annotations
        warn_of_left_out_categories(annotations)
        mean = sum(group.size for group in shards.row_groups) / len(annotations.images)
        self.shuffle_buffer = shuffle_buffer or min(_BUFFER_IMAGES, math.ceil(_BUFFER_BYTES / mean))
        self.images = ShardImages(shards)
        self.row_groups = [group.samples for group in shards.row_groups]
        lengths = [len(group) for group in self.row_groups]
        self.sharding = Sharding(len(lengths), self.shuffle_buffer, zlib.crc32(repr(lengths).encode()))
        self._contents: Contents = {}
        sizes = [size for image_id in annotations.images if (size := stated_size(annotations, image_id))]
        if len(sizes) < len(annotations.images):
            missing = len(annotations.images) - len(sizes)
            raise ValueError(f"{annotations.name}: expected width and height of each image, got null {missing} times")
        super().__init__(
            annotations,
            sizes,
            augmentation=augmentation,
            preprocessing=preprocessing,
            class_names=class_names,
            seed=seed,
        )

    def describe(self, index: int) -> str:
        """Return the file and the row of a sample's image."""
        return self.images.name(index)

    def read_ahead(self, batches: Sequence[Sequence[int]]) -> Iterator[Contents]:
        """Yield the encoded images of batches, which :meth:`put` takes in the process that decodes them.

        Row groups are read in threads, each once if the batches are those of an epoch, and an image is forgotten
        after the last batch that has it.
        """
        groups = [sorted({self.images.group_of(index) for index in batch}) for batch in batches]
        order = [self.images.row_groups[i] for i in dict.fromkeys(i for of_batch in groups for i in of_batch)]
        uses = Counter(index for batch in batches for index in batch)
        kept: Contents = {}
        seen: set[int] = set()
        with closing(map_in_threads(RowGroup.read, order, workers=_AHEAD, depth=_AHEAD)) as read:
            for batch, needed in zip(batches, groups, strict=True):
                for group in needed:
                    if group not in seen:
                        seen.add(group)
                        kept |= {index: content for index, content in next(read).items() if index in uses}
                yield {index: kept[index] for index in batch}
                uses.subtract(batch)
                for index in batch:
                    if not uses[index]:
                        kept.pop(index, None)

    def put(self, contents: Contents) -> None:
        """Take the encoded images of the samples that are asked for next."""
        self._contents = contents

    def _open(self, index: int) -> Image.Image | Tensor:
        """Open an image that was put, or else read its row group."""
        content = self._contents[index] if index in self._contents else self.images.content(index)
        if isinstance(content, Exception):
            raise content
        return open_by_backend(content, self.describe(index), self.preprocessing)[0]
