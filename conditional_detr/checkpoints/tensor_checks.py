"""Check tensors for NaN and infinity, and list names in messages."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

_SHOWN = 8  # names that a message lists before it counts the rest


def not_finite(tensors: dict[str, Tensor], sums: Sequence[Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity.

    A finite sum proves that all values are finite. A sum that is not finite may be an overflow, so only those tensors
    are checked value by value.

    Args:
        tensors: the tensors, by name.
        sums: the sum of each tensor, in the same order.
    """
    if not sums:
        return []
    totals = torch.stack(list(sums)).tolist()
    suspects = [name for name, total in zip(tensors, totals, strict=True) if not isfinite(total)]
    return [name for name in suspects if not tensors[name].isfinite().all()]


def abbreviate(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
