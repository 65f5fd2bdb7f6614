"""Copy tensors, check them for NaN and infinity, and list names in messages."""

import mmap
import sys
from collections.abc import Sequence
from math import isfinite

import numpy as np
import torch
from torch import Tensor

_SHOWN = 8  # names that a message lists before it counts the rest
_ALIGNMENT = 64  # bytes; torch's own, on which the last digits of some kernels depend


def allocate(shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return float32 tensors on the CPU with any values, each with a storage of its own.

    On Linux they lie in one block whose pages are requested at once: a page fault for each page takes longer than
    copying the values. The block is freed with the last of the tensors.
    """
    if sys.platform != "linux":
        return [torch.empty(shape, dtype=torch.float32, device="cpu") for shape in shapes]
    sizes = [-(-shape.numel() * torch.float32.itemsize // _ALIGNMENT) * _ALIGNMENT for shape in shapes]
    block = mmap.mmap(-1, max(sum(sizes), 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
    tensors, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        values = torch.frombuffer(block, dtype=torch.float32, count=shape.numel(), offset=start)
        tensors.append(values.view(shape))
        start += size
    return tensors


def copy_values(source: Tensor, target: Tensor) -> bool:
    """Copy values to a float32 tensor of the same shape on the CPU, and return whether all are finite there.

    numpy computes in one thread. torch would start its thread pool, and a process with one hangs when it is forked and
    the child computes.
    """
    values, copy = source.detach(), target.numpy()
    if source.dtype == torch.bfloat16:  # numpy does not have it; its bits are the upper half of a float32's
        np.left_shift(values.view(torch.uint16).numpy(), 16, out=copy.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore"):  # float64 beyond float32
            np.copyto(copy, values.numpy(), casting="same_kind")
    return isfinite(copy.min()) and isfinite(copy.max())  # either is NaN if any value is


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not all(map(isfinite, tensor.aminmax()))]


def abbreviate(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
