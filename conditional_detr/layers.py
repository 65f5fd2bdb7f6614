"""What encoder, decoder and heads share: small perceptrons, their initialisation, the inverse sigmoid."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them: the paper's FFN on queries and on decoder states.

    Args:
        features_in: size of the last dimension of the input.
        hidden: size of every layer between the first and the last.
        features_out: size of the last dimension of the output.
        depth: number of linear layers.
    """

    def __init__(self, features_in: int, hidden: int, features_out: int, depth: int) -> None:
        super().__init__()
        sizes = [features_in, *[hidden] * (depth - 1), features_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., features_in) to (..., features_out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The two-layer network of a transformer layer, with dropout on its hidden units."""

    def __init__(self, width: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.output(self.dropout(F.relu(self.hidden(x))))


def xavier(module: nn.Module) -> None:
    """Initialise every matrix in a module by Xavier's uniform rule, as the authors do for the transformer."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return log(x / (1 - x)), each of the two kept at or above ``eps``.

    The authors' form. ``torch.logit(x, eps)`` bounds both together and differs by 1e-5 at the ends.

    Args:
        x: values in [0, 1], any shape.
        eps: lower bound of numerator and denominator.
    """
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
