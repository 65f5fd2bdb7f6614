"""Thresholds of single classes, as ``conditional-detr analyse`` writes them: read and check them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_thresholds(path: str | Path) -> dict[str, float]:
    """Read a JSON file with an object of class names and thresholds, each in [0, 1].

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or something else than such an object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got something else: {error}") from error
    except OSError as error:
        raise type(error)(f"{path}: cannot be read: {error.strerror or error}") from error
    return check_thresholds(content, str(path))


def check_thresholds(
    thresholds: Any, where: str = "thresholds", class_names: Sequence[str | None] | None = None
) -> dict[str, float]:
    """Return thresholds by class name.

    Args:
        thresholds: the thresholds.
        where: where they are from, for messages.
        class_names: names that the model has; None: any.

    Raises:
        TypeError: no mapping.
        ValueError: a threshold that is not a number in [0, 1], or a name that is no class of the model.
    """
    if not isinstance(thresholds, Mapping):
        raise TypeError(f"{where}: expected an object of class names and thresholds, got {type(thresholds).__name__}")
    for name, value in thresholds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"{where}: {name}: expected a threshold of 0..1, got {value!r}")
        if class_names is not None and (name is None or name not in class_names):
            known = ", ".join(known for known in class_names if known is not None)
            raise ValueError(f"{where}: expected class names of the model, got {name!r}; the names are {known}")
    return {name: float(value) for name, value in thresholds.items()}
