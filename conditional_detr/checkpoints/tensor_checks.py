"""Copy tensors, check them for NaN and infinity, and list names in messages."""

from collections.abc import Iterator, Sequence
from math import isfinite

import numpy as np
import torch
from torch import Tensor

_SHOWN = 8  # names that a message lists before it counts the rest
_BLOCK = 2**15 - 1  # elements; torch starts its thread pool for more


def copy_values(source: Tensor, target: Tensor) -> Tensor:
    """Copy values to a float32 tensor of the same shape on the CPU, and return their sum.

    numpy computes in one thread. torch would start its thread pool, and a process with one hangs when it is forked and
    the child computes.
    """
    copy = target.numpy()
    if source.dtype == torch.bfloat16:  # numpy does not have it
        for part, block in zip(_blocks(source), _blocks(target), strict=True):
            block.copy_(part)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32; not_finite() reports it
            np.copyto(copy, source.detach().numpy(), casting="same_kind")
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.tensor(copy.sum(), dtype=torch.float32, device="cpu")


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
    return [name for name in suspects if not all(block.isfinite().all() for block in _blocks(tensors[name]))]


def abbreviate(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Split a tensor into views of few elements, in an order that depends on its shape only."""
    if tensor.numel() <= _BLOCK:
        yield tensor
        return
    rows = _BLOCK * len(tensor) // tensor.numel()
    for part in tensor.split(max(rows, 1)):
        if part.numel() <= _BLOCK:
            yield part
        else:
            yield from _blocks(part[0])
