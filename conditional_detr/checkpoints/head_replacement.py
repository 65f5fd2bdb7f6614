"""Replace a model's class head and object queries, and keep the rows of classes that remain."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import HeadReplacement, Metadata


def replace_heads(
    model: DetectionTransformer,
    *,
    class_names: Sequence[str | None] | None = None,
    num_classes: int | None = None,
    num_queries: int | None = None,
) -> HeadReplacement:
    """Replace a model's classes or its number of object queries, in place.

    Args:
        model: the model.
        class_names: the new classes; rows whose names match are kept, others are initialised as in a new model.
            None means a row that belongs to no class.
        num_classes: the number of classes, if they have no names; rows are kept only if it is the current number.
        num_queries: the number of object queries; the leading ones are kept, new ones are initialised at random.

    Returns:
        The classes and queries that were kept, added and dropped.

    Raises:
        TypeError: class names are not a sequence of strings, or a count is not an int.
        ValueError: no class, a duplicate name, a count below 1, or counts that contradict each other.
    """
    old = model.metadata
    names = _new_names(old.class_names, class_names, num_classes)
    queries = _new_count("num_queries", num_queries, model.config.num_queries)
    rows: list[int | None] = list(range(len(names)))
    if names != old.class_names:
        positions = {name: i for i, name in reversed([*enumerate(old.class_names)])}  # the first of equal names
        rows = [None if name is None else positions.get(name) for name in names]
        count, device = model.scores.rows(len(names)), model.class_head.weight.device
        head = nn.Linear(model.config.width, count, device=device)
        model.scores.initialise(head)
        others = range(len(old.class_names), model.scores.rows(len(old.class_names)))  # "no object" of DETR
        _keep_rows(head.weight, model.class_head.weight, [*rows, *others])
        _keep_rows(head.bias, model.class_head.bias, [*rows, *others])
        model.class_head = head
        model.metadata = Metadata(names, preprocessing=old.preprocessing)
    kept_queries = min(queries, model.config.num_queries)
    if queries != model.config.num_queries:
        current = model.object_queries.weight
        model.object_queries = nn.Embedding(queries, model.config.width, device=current.device)
        _keep_rows(model.object_queries.weight, current, [*range(kept_queries)])
    kept_or_new = set(names)
    changes = HeadReplacement(
        kept_classes=_named(name for name, row in zip(names, rows, strict=True) if row is not None),
        new_classes=_named(name for name, row in zip(names, rows, strict=True) if row is None),
        dropped_classes=_named(name for name in old.class_names if name not in kept_or_new),
        kept_queries=kept_queries,
        new_queries=queries - kept_queries,
        dropped_queries=model.config.num_queries - kept_queries,
    )
    model.config = replace(model.config, num_classes=len(names), num_queries=queries)
    return changes


def _new_names(
    old: tuple[str | None, ...], class_names: Sequence[str | None] | None, num_classes: int | None
) -> tuple[str | None, ...]:
    """Return the class names of the model after the replacement."""
    if class_names is None:
        count = _new_count("num_classes", num_classes, len(old))
        return old if count == len(old) else Metadata.numbered(count).class_names
    strings = not isinstance(class_names, str) and all(isinstance(n, str | None) for n in class_names)
    if not strings:
        raise TypeError(f"class_names: expected a sequence of strings, got {class_names!r}")
    names = tuple(class_names)
    if not _named(names):
        raise ValueError(f"class_names: expected at least one name, got {names}")
    if duplicates := sorted(name for name, count in Counter(_named(names)).items() if count > 1):
        raise ValueError(f"class_names: expected each name once, got duplicates of {', '.join(duplicates)}")
    if num_classes not in (None, len(names)):
        raise ValueError(f"num_classes: expected {len(names)}, the length of class_names, got {num_classes}")
    return names


def _new_count(name: str, count: int | None, default: int) -> int:
    """Return a validated count."""
    if count is None:
        return default
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{name}: expected an int, got {count!r}")
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")
    return count


def _named(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(name for name in names if name is not None)


@torch.no_grad()
def _keep_rows(new: Tensor, old: Tensor, rows: Sequence[int | None]) -> None:
    """Copy ``old[rows[i]]`` to ``new[i]`` unless ``rows[i]`` is None."""
    for i, row in enumerate(rows):
        if row is not None:
            new[i] = old[row]
