"""What several parts share: linear layers, small perceptrons, the inverse sigmoid, precision and mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer whose matrix is drawn by Xavier's uniform rule, as the authors draw the transformer's.

    Args:
        features_in: size of the last dimension of the input.
        features_out: size of the last dimension of the output.
        gain: factor on Xavier's bound.
        zero_bias: whether the bias starts at 0 instead of PyTorch's random default.
    """

    def __init__(self, features_in: int, features_out: int, *, gain: float = 1.0, zero_bias: bool = False) -> None:
        self.gain = gain
        self.zero_bias = zero_bias
        super().__init__(features_in, features_out)

    def reset_parameters(self) -> None:
        """Draw weight and bias, unless they stand on the meta device, where there is nothing to draw."""
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
        linear: their class, which decides how they are drawn.
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

        Dropout, whose factors are 0 or positive, gives the same before ReLU as after it, and so a step of training
        keeps one tensor of hidden units less.
        """
        return self.output(F.relu(self.dropout(self.hidden(x))))


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32, anything wider unchanged.

    Angles of up to 2π, costs and sums over thousands of queries do not survive bfloat16.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return log(x / (1 - x)), each of the two kept at or above ``eps``.

    The authors' form. ``torch.logit(x, eps)`` bounds both together and differs by 1e-5 at the ends.

    Args:
        x: values in [0, 1], any shape.
        eps: lower bound of numerator and denominator.
    """
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class _HasModules(Protocol):
    def modules(self) -> Iterator[nn.Module]: ...


@contextmanager
def evaluation_mode(model: _HasModules) -> Iterator[None]:
    """Set all modules of a model to eval mode, and each back to its former mode in the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:  # not train(): a part may have been set to eval mode on purpose
            module.training = True
