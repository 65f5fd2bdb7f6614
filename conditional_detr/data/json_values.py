"""Check single values of annotations and results, and describe them in messages."""

import math
import numbers
import reprlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Id: TypeAlias = int | str

_REPR = reprlib.Repr()  # the value may be long or deeply nested
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 10
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlevel = 3


def to_plain(value: Any) -> Any:
    """Return scalars and arrays of numpy, pandas and torch as Python values, and any other value unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def to_id(value: Any) -> Id | None:
    """Return an integer of any size, or a string; None for any other value."""
    if type(value) is int or type(value) is str:  # nearly every id: the general test is slow
        return value
    value = to_plain(value)
    if not isinstance(value, bool) and isinstance(value, numbers.Integral):
        return int(value)
    return value if isinstance(value, str) else None


def to_number(value: Any, key: str, where: str, *, limit: float = sys.float_info.max) -> float:
    """Return a finite number.

    Args:
        value: the value; a bool is not a number.
        key: what it is, for the message.
        where: where it is, for the message.
        limit: the largest absolute value.

    Raises:
        ValueError: any other value.
    """
    if (type(value) is float or type(value) is int) and -limit <= value <= limit:  # nearly every number
        return value
    value = to_plain(value)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not -limit <= value <= limit:
        expected = f"numbers of at most {limit:g}" if real and abs(value) < math.inf else "finite numbers"
        raise ValueError(f"{where}: expected {expected} as {key}, got {describe(value)}")
    return value if isinstance(value, int) else float(value)


def get_value(entry: Any, key: str, where: str) -> Any:
    """Return a value of an object.

    Raises:
        ValueError: not an object, or one without the key.
    """
    if (type(entry) is not dict and not isinstance(entry, Mapping)) or key not in entry:
        raise ValueError(
            f"{where}: expected an object with {key!r}, got {describe_keys(entry) or describe_content(entry)}"
        )
    return entry[key]


def describe(value: Any) -> str:
    """Return a value's representation, shortened."""
    return _REPR.repr(value)


def describe_keys(content: Any) -> str:
    """Return the keys of an object; '' for anything else."""
    return f"the keys {shorten_list(map(describe, content))}" if isinstance(content, Mapping) else ""


def describe_content(content: Any) -> str:
    """Describe a value in JSON's terms."""
    if isinstance(content, Mapping):
        return f"an object with {describe_keys(content)}"
    return "a list" if isinstance(content, list | tuple) else describe(content)


def shorten_list(names: Iterable[str], most: int = 20) -> str:
    """Join names, the first of many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
