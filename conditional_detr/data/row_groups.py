"""Read the encoded images of a dataset in Parquet files, row group by row group."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from conditional_detr.data.coco import Annotations
from conditional_detr.data.json_values import Id
from conditional_detr.system.parquet_files import image_bytes, image_column, open_parquet

Contents: TypeAlias = dict[int, bytes | Exception]
"""The bytes of images by the index of the sample, or why they cannot be read."""


class RowGroup(NamedTuple):
    """Rows of a Parquet file that are read together.

    Attributes:
        file: the path or URI of the file.
        position: of the row group in the file.
        first: row of the file, the first of the group.
        samples: indices in the dataset.
        footer: the footer of the file, as it was when the dataset was opened.
    """

    file: str
    position: int
    first: int
    samples: range
    footer: Any

    @property
    def size(self) -> int:
        """Bytes of its columns."""
        return int(self.footer.row_group(self.position).total_byte_size)

    def name(self, sample: int) -> str:
        """Return the name of a sample's image: ``FILE#ROW``."""
        return f"{self.file}#{self.first + sample - self.samples.start}"

    def read(self) -> Contents:
        """Return the encoded images; each has the error if the row group cannot be read."""
        try:
            with open_parquet(self.file, self.footer) as file:
                column = image_column(self.file, file.schema_arrow)
                chunks = file.read_row_group(self.position, columns=[column], use_threads=False).column(0).chunks
                images = [image for chunk in chunks for image in image_bytes(chunk)]
            if len(images) != len(self.samples):
                raise ValueError(f"expected {len(self.samples)} rows, got {len(images)}")
        except Exception as error:  # the type of the error of a damaged file depends on the damage
            message = f"{self.file}: row group {self.position} cannot be read, or the file has changed: {error}"
            return {sample: OSError(message) for sample in self.samples}
        missing = "expected the bytes of an image, got null"
        return {
            sample: ValueError(f"{self.name(sample)}: {missing}") if image is None else image
            for sample, image in zip(self.samples, images, strict=True)
        }


class Shards(NamedTuple):
    """A split of a dataset in Parquet files.

    Attributes:
        annotations: the checked annotations; the images' file_names are ``FILE#ROW``, relative to the folder.
        row_groups: where the images are, in the order of the annotations.
    """

    annotations: Annotations
    row_groups: tuple[RowGroup, ...]


class ShardImages(Mapping[Id, bytes]):
    """The encoded images of a dataset in Parquet files, by image id; the last row group is in memory.

    Args:
        shards: the dataset.
    """

    def __init__(self, shards: Shards) -> None:
        self.row_groups = shards.row_groups
        self._indices = {image_id: index for index, image_id in enumerate(shards.annotations.images)}
        self._starts = [group.samples.start for group in shards.row_groups]
        self._last: tuple[int, Contents] = (-1, {})

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Id]:
        return iter(self._indices)

    def __getitem__(self, image_id: Id) -> bytes:
        """Return an encoded image.

        Raises:
            OSError: it cannot be read.
            ValueError: there is none.
        """
        content = self.content(self._indices[image_id])
        if isinstance(content, Exception):
            raise content
        return content

    def content(self, index: int) -> bytes | Exception:
        """Return the encoded image of a sample, or why it cannot be read."""
        position = self.group_of(index)
        if position != self._last[0]:
            self._last = position, self.row_groups[position].read()
        return self._last[1][index]

    def name(self, index: int) -> str:
        """Return the name of a sample's image: ``FILE#ROW``."""
        return self.row_groups[self.group_of(index)].name(index)

    def group_of(self, index: int) -> int:
        """Return the position of the row group of a sample."""
        return bisect_right(self._starts, index) - 1
