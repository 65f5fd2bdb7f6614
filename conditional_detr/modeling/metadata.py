"""Metadata of a checkpoint: class names, category ids, preprocessing, and the report of loading it."""

from dataclasses import dataclass, field, replace
from typing import Literal

PUBLISHED = "microsoft/conditional-detr-resnet-50"
"""Hub id of the authors' ResNet-50 checkpoint, the default wherever weights are optional."""

MAX_EDGE = 16_384
"""Largest side of a resized image in pixels."""

MAX_PIXELS = 8192 * 8192
"""Largest area of a resized image in pixels: more would need over 16 GB."""

_MAX_VALUE = 1e6  # of mean and std


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images, with the values that the weights were trained with.

    Attributes:
        shortest_edge: with the resizing "edges", images are resized so that their shorter side has this many pixels,
            unless the longer side would then exceed ``longest_edge``.
        longest_edge: maximum of the longer side in pixels.
        mean: per channel (red, green, blue), of values in [0, 1].
        std: per channel, of values in [0, 1].
        resizing: "edges"; "fit", which enlarges or reduces images to the largest ``size`` of their aspect ratio;
            "stretch", which resizes images to exactly ``size``; or "none", which keeps the size of images.
        size: height and width in pixels for "fit" and "stretch"; None otherwise.
        backend: "pil", which has the pixels of the authors' code to the last bit; or "torchvision", which is faster
            and differs by rounding. Neither checkpoints nor exported models store it.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a size, mean or std is out of its range, or ``size`` does not belong to the resizing.
    """

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    resizing: Literal["edges", "fit", "stretch", "none"] = "edges"
    size: tuple[int, int] | None = None
    backend: Literal["pil", "torchvision"] = "pil"

    def __post_init__(self) -> None:
        if self.resizing not in ("edges", "fit", "stretch", "none"):
            raise ValueError(f"resizing: expected edges, fit, stretch or none, got {self.resizing!r}")
        if self.backend not in ("pil", "torchvision"):
            raise ValueError(f"backend: expected pil or torchvision, got {self.backend!r}")
        if (self.size is not None) != (self.resizing in ("fit", "stretch")):
            raise ValueError(f"size: expected one with the resizings fit and stretch only, got {self.size!r}")
        if self.size is not None and (not isinstance(self.size, tuple) or len(self.size) != 2):
            raise TypeError(f"size: expected a tuple (height, width), got {self.size!r}")
        edges = {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}
        for name, edge in (*edges.items(), *(("size", edge) for edge in self.size or ())):
            if not isinstance(edge, int) or isinstance(edge, bool):
                raise TypeError(f"{name}: expected an int, got {edge!r}")
            if not 0 < edge <= MAX_EDGE:
                raise ValueError(f"{name}: expected 1 to {MAX_EDGE} pixels, got {edge}")
        height, width = self.largest_size
        if height * width > MAX_PIXELS:
            name = "shortest_edge and longest_edge" if self.size is None else "size"
            raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels, got {height} x {width}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple) or not all(_is_number(value) for value in values):
                raise TypeError(f"{name}: expected a tuple of 3 numbers, got {values!r}")
            if len(values) != 3 or not all(abs(value) <= _MAX_VALUE for value in values):  # NaN fails, too
                raise ValueError(f"{name}: expected 3 numbers of at most {_MAX_VALUE:g}, got {values}")
        if min(self.std) < 1 / _MAX_VALUE:
            raise ValueError(f"std: expected 3 numbers above 0, got {self.std}")

    @property
    def largest_size(self) -> tuple[int, int]:
        """Height and width of the largest landscape image after resizing; for "none", of the default's."""
        if self.resizing == "none":
            return Preprocessing().largest_size
        return self.size or (min(self.shortest_edge, self.longest_edge), self.longest_edge)

    def with_shortest_edge(self, edge: int) -> "Preprocessing":
        """Return the preprocessing to another size, whose longest edge is in proportion.

        Raises:
            ValueError: the resizing is not "edges", or a size out of range.
        """
        if self.resizing != "edges":
            raise ValueError(f"expected weights whose images keep their aspect ratio, got resizing {self.resizing!r}")
        return replace(self, shortest_edge=edge, longest_edge=round(edge * self.longest_edge / self.shortest_edge))

    def halved(self) -> "Preprocessing":
        """Return the preprocessing to about half the size; for "none", to half the default's size."""
        if self.resizing == "none":
            return Preprocessing(mean=self.mean, std=self.std, backend=self.backend).halved()
        short, long = self.shortest_edge // 2 + 1, self.longest_edge // 2 + 1
        size = self.size and (self.size[0] // 2 + 1, self.size[1] // 2 + 1)
        return replace(self, shortest_edge=short, longest_edge=long, size=size)


def _is_number(value: object) -> bool:
    """Return whether a value is a Python int or float; numpy's float64 is a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Metadata:
    """Class names, category ids and preprocessing of a model.

    Attributes:
        class_names: one per class; None marks a row that belongs to no class (COCO's gaps) and is never detected.
        category_ids: the dataset's category id of each class; default 0, 1, 2, ...
        preprocessing: size and normalisation of images.

    Raises:
        TypeError: class names are a single string.
        ValueError: a category id is duplicate, or there is not one category id per class.
    """

    class_names: tuple[str | None, ...]
    category_ids: tuple[int, ...] = ()
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        if isinstance(self.class_names, str):  # type: ignore[unreachable]  # not every caller is type-checked
            raise TypeError(f"class_names: expected a sequence of strings, got {self.class_names!r}")
        names = tuple(self.class_names)
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "category_ids", tuple(self.category_ids) or tuple(range(len(names))))
        if len(self.category_ids) != len(self.class_names):
            raise ValueError(
                f"expected one category id per class, got {len(self.category_ids)} ids"
                f" for {len(self.class_names)} classes"
            )
        if len(set(self.category_ids)) != len(self.category_ids):
            raise ValueError(f"expected each category id once, got {self.category_ids}")

    @classmethod
    def numbered(cls, num_classes: int) -> "Metadata":
        """Return metadata with the class names "class 0", "class 1", ..."""
        return cls(tuple(f"class {i}" for i in range(num_classes)))


@dataclass(frozen=True)
class HeadReplacement:
    """Classes and object queries that were kept, added and dropped when heads were replaced.

    Attributes:
        kept_classes: names whose row of the class head comes from the checkpoint.
        new_classes: names with a new row.
        dropped_classes: names of the checkpoint that the model does not have.
        kept_queries: number of leading object queries that come from the checkpoint.
        new_queries: number of new object queries.
        dropped_queries: number of the checkpoint's object queries that the model does not have.
    """

    kept_classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    dropped_classes: tuple[str, ...]
    kept_queries: int
    new_queries: int
    dropped_queries: int

    @property
    def changed(self) -> bool:
        """Whether any class or query is new or dropped."""
        return any((self.new_classes, self.dropped_classes, self.new_queries, self.dropped_queries))

    def __str__(self) -> str:
        classes = (self.kept_classes, self.new_classes, self.dropped_classes)
        queries = (self.kept_queries, self.new_queries, self.dropped_queries)
        lines = []
        for change, names, count in zip(("kept", "new", "dropped"), classes, queries, strict=True):
            listed = f" ({', '.join(names)})" if names else ""
            lines.append(f"{change}: {count} queries, {len(names)} classes{listed}")
        return "\n".join(lines)


@dataclass(frozen=True)
class LoadReport:
    """Result of loading a checkpoint, in ``model.load_report``; printing it gives a summary.

    Attributes:
        source: path of the weight file.
        name_format: the file's parameter names: "published", "transformers5" or "original", with a note if the
            backbone is transformers' own ResNet.
        dtype: precision of the file's tensors, such as "float16"; comma-separated if there are several.
        size: size of the file in bytes.
        heads: which classes and queries come from the checkpoint.
    """

    source: str
    name_format: str
    dtype: str
    size: int
    heads: HeadReplacement

    def __str__(self) -> str:
        return f"{self.source} ({self.name_format} names)\n{self.heads}"
