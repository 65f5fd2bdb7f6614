"""What loading and saving both ask of tensors, and how they name what they find."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

_SHOWN = 8  # how many keys a message spells out before it counts the rest


def not_finite(tensors: dict[str, Tensor], sums: Sequence[Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity.

    A finite sum tells that none is there; one that is not finite may have overflowed by itself.

    Args:
        tensors: by name.
        sums: of each of them, in their order.
    """
    if not sums:
        return []
    totals = torch.stack(list(sums)).tolist()
    suspects = [name for name, total in zip(tensors, totals, strict=True) if not isfinite(total)]
    return [name for name in suspects if not tensors[name].isfinite().all()]


def some(keys: Sequence[str]) -> str:
    """Spell out the first few and count the rest."""
    rest = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
