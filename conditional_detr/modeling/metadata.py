"""Metadata of a checkpoint: class names, category ids, preprocessing, and the report of loading it."""

from dataclasses import dataclass, field

PUBLISHED = "microsoft/conditional-detr-resnet-50"
"""Hub id of the authors' ResNet-50 checkpoint, the default wherever weights are optional."""


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images, with the values that the weights were trained with.

    Attributes:
        shortest_edge: images are resized so that their shorter side has this many pixels, unless the longer side would
            then exceed ``longest_edge``.
        longest_edge: maximum of the longer side in pixels.
        mean: per channel (red, green, blue), of values in [0, 1].
        std: per channel, of values in [0, 1].

    Raises:
        ValueError: a size or a std is not positive, or the shortest edge exceeds the longest.
    """

    shortest_edge: int = 800
    longest_edge: int = 1333
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not 0 < self.shortest_edge <= self.longest_edge:
            raise ValueError(
                f"expected 0 < shortest_edge <= longest_edge, got {self.shortest_edge} and {self.longest_edge}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"expected mean and std of 3 channels, std above 0, got {self.mean} and {self.std}")


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
