"""Convolutions and linear layers fused with activations and additions, in oneDNN's CPU kernels.

Weights are packed in oneDNN's own layouts, so these modules cannot be moved to another device.
"""

import threading
import weakref
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Computation(NamedTuple):
    """Dtype and kernels of an optimised copy.

    Attributes:
        dtype: dtype of the computation.
        kernels: whether to use the oneDNN kernels of this module.
        compiled: whether ``torch.compile`` compiles the copy.
    """

    dtype: torch.dtype
    kernels: bool
    compiled: bool = False


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN supports this dtype on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def mark_dynamic_size(x: Tensor) -> Tensor:
    """Return a view whose height and width the compiler treats as dynamic, not as fixed to the first image's."""
    x = x.detach()  # the caller's tensor stays unmarked
    for dimension in (-2, -1):
        torch._dynamo.mark_dynamic(x, x.dim() + dimension)
    return x


_ALIGNMENT = 64  # bytes of a cache line and of the widest vectors
_LARGEST_KEPT_BY_LIBC = 32 << 20


class MapMemory:
    """Memory of large feature maps, kept for the next call.

    The C library returns large blocks to the system when they are freed. When the next map uses such memory, the
    system first zeroes every page of it, which can take longer than the convolution. Maps larger than ``MAX_BYTES``
    are left to the C library, so that large batches do not keep their memory.
    """

    MIN_BYTES = 16 << 20
    MAX_BYTES = 128 << 20

    def __init__(self) -> None:
        self._unused: list[Any] = []
        self._lock = threading.Lock()  # threads may share a copy
        # glibc keeps freed blocks up to the largest size that it has seen freed, and at most this. Otherwise, which of
        # the smaller maps it keeps depends on what the process has done before.
        torch.empty(_LARGEST_KEPT_BY_LIBC - 4096, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return a map of zeros (B, C, H, W), channels last; None: this size is left to the C library.

        Its memory is reused after the last tensor that shares it is deleted.
        """
        images, channels, height, width = shape
        size = prod(shape) * dtype.itemsize
        if not self.MIN_BYTES <= size <= self.MAX_BYTES:
            return None
        block = self._block(size + _ALIGNMENT)
        part = block[-block.ctypes.data % _ALIGNMENT :][:size]
        # torch's storage holds this array, which therefore lives as long as any tensor that shares the memory
        weakref.finalize(part, self._unused.append, block).atexit = False
        flat = torch.from_numpy(part).view(dtype).zero_()
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)

    def _block(self, size: int) -> Any:
        """Return the smallest unused block of at least ``size`` bytes, or a new one, which replaces the largest."""
        with self._lock:
            # drained, because the list may grow meanwhile: other threads delete tensors
            blocks = sorted((self._unused.pop() for _ in range(len(self._unused))), key=len)
            fitting = [i for i, block in enumerate(blocks) if len(block) >= size]
            block = blocks.pop(fitting[0]) if fitting else None
            self._unused.extend(blocks if fitting else blocks[:-1])
        return np.empty(size, np.uint8) if block is None else block


class FusedConv(nn.Module):
    """Convolution, optional addition of another map and optional ReLU, in one pass over memory.

    The fastest layout of the weights depends on the size of the map. When the size changes, the weights are packed
    again from the plain layout. Conversion between packed layouts takes up to ten times as long as the convolution.

    Args:
        convolution: the convolution, in the dtype of the computation.
        relu: whether ReLU follows.
        memory: memory of large outputs.
    """

    def __init__(self, convolution: nn.Conv2d, *, relu: bool, memory: MapMemory) -> None:
        super().__init__()
        self.memory = memory
        padding, stride, dilation = (list(getattr(convolution, n)) for n in ("padding", "stride", "dilation"))
        self.geometry: tuple[Any, ...] = (padding, stride, dilation, convolution.groups)
        self.weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
        self.bias = None if convolution.bias is None else convolution.bias.detach()
        self.activation = "relu" if relu else None
        self._packed: tuple[torch.Size, Tensor] | None = None

    def forward(self, x: Tensor, other: Tensor | None = None, in_place: bool = False) -> Tensor:
        """Return (B, C', H', W') for (B, C, H, W), channels last.

        ``other`` has the output's shape; with ``in_place``, the output is written to its memory.
        """
        weight = self._weight_for(x.shape)
        if other is None:  # the kernels cannot write to given memory, but add to it
            other, in_place = self.memory.zeros(self._output_shape(x.shape), x.dtype), True
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, self.bias, *self.geometry, self.activation or "none", [], ""
            )
        if in_place:
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                other, x, weight, self.bias, *self.geometry, "add", 1.0, self.activation, [], None
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, weight, self.bias, *self.geometry, "add", 1.0, self.activation, [], None
        )

    def _output_shape(self, size: torch.Size) -> tuple[int, ...]:
        """Return the shape of the output for an input size."""
        padding, stride, dilation, _ = self.geometry
        geometry = zip(size[2:], self.weight.shape[2:], padding, stride, dilation, strict=True)
        return size[0], len(self.weight), *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in geometry)

    def _weight_for(self, size: torch.Size) -> Tensor:
        """Return the weights packed for an input size."""
        packed = self._packed
        if packed is None or packed[0] != size:
            packed = size, torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(size))
            self._packed = packed  # one assignment, because threads may share a copy
        return packed[1]


class FusedLinear(nn.Module):
    """Linear layer and optional ReLU.

    Args:
        weight: (features out, features in).
        bias: (features out,).
        computation: dtype and kernels.
        relu: whether ReLU follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor, computation: Computation, *, relu: bool = False) -> None:
        super().__init__()
        weight, bias = (x.detach().to(computation.dtype).contiguous() for x in (weight, bias))
        self.relu = relu
        packed = computation.kernels and not computation.compiled  # the compiler does not support packed tensors
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if packed else weight
        self.bias = bias
        self.linear = _plain_linear if not computation.kernels else _fused_linear if packed else _opaque_linear

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., features out) in the dtype of the computation for (..., features in) in any dtype."""
        return self.linear(x.to(self.bias.dtype), self.weight, self.bias, self.relu)


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    x = F.linear(x, weight, bias)
    return x.relu() if relu else x


def _fused_linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")


_opaque_linear = torch.library.custom_op("conditional_detr::linear", _fused_linear, mutates_args=())
"""The same as an opaque operator: on some CPUs, the compiler would use a much slower library."""


@_opaque_linear.register_fake
def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
