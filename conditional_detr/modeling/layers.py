"""Layers and functions shared by several parts: linear layers, MLPs, inverse sigmoid, precision and eval mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """Linear layer with Xavier uniform initialisation, which the authors use in the transformer.

    Args:
        features_in: size of the last dimension of the input.
        features_out: size of the last dimension of the output.
        gain: factor of Xavier's bound.
        zero_bias: whether the bias starts at 0 instead of PyTorch's random default.
    """

    def __init__(self, features_in: int, features_out: int, *, gain: float = 1.0, zero_bias: bool = False) -> None:
        self.gain = gain
        self.zero_bias = zero_bias
        super().__init__(features_in, features_out)

    def reset_parameters(self) -> None:
        """Initialise weight and bias, except on the meta device, which holds no values."""
        if self.weight.is_meta:
            return
        super().reset_parameters()
        nn.init.xavier_uniform_(self.weight, self.gain)
        if self.zero_bias:
            nn.init.zeros_(self.bias)


class MLP(nn.Module):
    """Linear layers with ReLU between them: the paper's FFN on queries and on decoder states.

    Args:
        features_in: size of the last dimension of the input.
        hidden: size of every layer between the first and the last.
        features_out: size of the last dimension of the output.
        depth: number of linear layers.
        linear: class of the linear layers, which determines their initialisation.
    """

    def __init__(
        self,
        features_in: int,
        hidden: int,
        features_out: int,
        depth: int,
        linear: Callable[[int, int], nn.Linear] = nn.Linear,
    ) -> None:
        super().__init__()
        sizes = [features_in, *[hidden] * (depth - 1), features_out]
        self.layers = nn.ModuleList(linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features_in) to (..., features_out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The two-layer network of a transformer layer, with dropout on its hidden units."""

    def __init__(self, width: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.hidden = Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D).

        Dropout scales by 0 or a positive factor, so that it gives the same result before and after ReLU. Before ReLU
        it saves one tensor of hidden units in a training step.
        """
        return self.output(F.relu(self.dropout(self.hidden(x))))


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32, and return wider types unchanged.

    bfloat16 is too coarse for angles up to 2π, for costs, and for sums over thousands of queries.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute log(x / (1 - x)) with numerator and denominator clamped to at least ``eps``, as the authors do.

    ``torch.logit(x, eps)`` clamps x instead, and differs by 1e-5 at the ends of the range.

    Args:
        x: values in [0, 1], any shape.
        eps: lower bound of numerator and denominator.
    """
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class _HasModules(Protocol):
    def modules(self) -> Iterator[nn.Module]: ...


@contextmanager
def evaluation_mode(model: _HasModules) -> Iterator[None]:
    """Set all modules of a model to eval mode, and restore the mode of each at the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:  # not train(): a module may have been in eval mode before
            module.training = True
