"""Convolutions and linear layers with what follows them in one kernel, where oneDNN has such kernels: on CPUs.

Weights are brought into oneDNN's own layout once, so these modules stay where they were made.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Computation(NamedTuple):
    """What an optimised copy computes in, and with.

    Attributes:
        dtype: the precision.
        kernels: whether to use oneDNN's, of this module; a compiler makes its own instead.
    """

    dtype: torch.dtype
    kernels: bool


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes in this precision on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class FusedConv(nn.Module):
    """A convolution, then if wanted the addition of another map, then if wanted ReLU: in one pass over memory.

    Args:
        convolution: as it is to be computed, in its precision.
        relu: whether ReLU follows.
    """

    def __init__(self, convolution: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        padding, stride, dilation = (list(getattr(convolution, n)) for n in ("padding", "stride", "dilation"))
        self.geometry: tuple[Any, ...] = (padding, stride, dilation, convolution.groups)
        weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry)
        self.bias = None if convolution.bias is None else convolution.bias.detach()
        self.activation = "relu" if relu else None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W), channels last, to (B, C', H', W'); ``other`` is of that shape."""
        if other is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, self.activation or "none", [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, self.weight, self.bias, *self.geometry, "add", 1.0, self.activation, [], None
        )


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
        self.kernels, self.relu = computation.kernels, relu
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if computation.kernels else weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features in) to (..., features out)."""
        if self.kernels:
            attribute = "relu" if self.relu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attribute, [], "")
        x = F.linear(x, self.weight, self.bias)
        return x.relu() if self.relu else x
