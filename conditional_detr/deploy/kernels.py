"""Convolutions and linear layers with what follows them in one kernel, where oneDNN has such kernels: on CPUs.

Weights are brought into oneDNN's own layouts, so these modules stay where they were made.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Computation(NamedTuple):
    """What an optimised copy computes in, and with.

    Attributes:
        dtype: the precision.
        kernels: whether to use oneDNN's, of this module.
        compiled: whether linear layers are to be called by code of ``torch.compile``.
    """

    dtype: torch.dtype
    kernels: bool
    compiled: bool = False


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes in this precision on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def of_any_size(x: Tensor) -> Tensor:
    """Return a tensor of whose height and width the compiler assumes nothing: else the first image's are fixed."""
    x = x.detach()  # the mark is not for the caller's
    for dimension in (-2, -1):
        torch._dynamo.mark_dynamic(x, x.dim() + dimension)
    return x


class FusedConv(nn.Module):
    """A convolution, then if wanted the addition of another map, then if wanted ReLU: in one pass over memory.

    Which layout of the weights is fastest depends on the size of the map. They are brought into it when a map of
    another size comes, from oneDNN's plain layout: from one of its fast layouts to another takes far longer, up to
    ten times as long as the convolution itself.

    Args:
        convolution: as it is to be computed, in its precision.
        relu: whether ReLU follows.
    """

    def __init__(self, convolution: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        padding, stride, dilation = (list(getattr(convolution, n)) for n in ("padding", "stride", "dilation"))
        self.geometry: tuple[Any, ...] = (padding, stride, dilation, convolution.groups)
        self.weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
        self.bias = None if convolution.bias is None else convolution.bias.detach()
        self.activation = "relu" if relu else None
        self._packed: tuple[torch.Size, Tensor] | None = None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W), channels last, to (B, C', H', W'); ``other`` is of that shape."""
        weight = self._weight_for(x.shape)
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, self.bias, *self.geometry, self.activation or "none", [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, weight, self.bias, *self.geometry, "add", 1.0, self.activation, [], None
        )

    def _weight_for(self, size: torch.Size) -> Tensor:
        """Return the weights in the layout for maps of a size."""
        packed = self._packed
        if packed is None or packed[0] != size:
            packed = size, torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(size))
            self._packed = packed  # in one assignment: threads may share a copy, with images of other sizes
        return packed[1]


class FusedLinear(nn.Module):
    """A linear layer, then if wanted ReLU.

    Args:
        weight: (features out, features in).
        bias: (features out,).
        computation: the precision, and whether oneDNN computes it.
        relu: whether ReLU follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor, computation: Computation, *, relu: bool = False) -> None:
        super().__init__()
        weight, bias = (x.detach().to(computation.dtype).contiguous() for x in (weight, bias))
        self.relu = relu
        packed = computation.kernels and not computation.compiled  # the compiler does not know tensors in such layouts
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if packed else weight
        self.bias = bias
        self.linear = _plain_linear if not computation.kernels else _fused_linear if packed else _opaque_linear

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features in) to (..., features out)."""
        return self.linear(x, self.weight, self.bias, self.relu)


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    x = F.linear(x, weight, bias)
    return x.relu() if relu else x


def _fused_linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")


_opaque_linear = torch.library.custom_op("conditional_detr::linear", _fused_linear, mutates_args=())
"""The same as one thing to the compiler, which on some CPUs would take a far slower library."""


@_opaque_linear.register_fake
def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
