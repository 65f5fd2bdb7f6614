"""Sine position encodings of the cells of a padded feature map (keys) and of points (reference points).

A coordinate is scaled to an angle in [0, 2π]. The angle is encoded as D/2 numbers: sin(angle / 10000^(2⌊i/2⌋ / (D/2)))
for even i, and the cosine of the same argument for odd i. A position is encoded as its y followed by its x.
"""

import math

import torch
from torch import Tensor

from conditional_detr.modeling.layers import at_least_float32


def sine(angle: Tensor, features: int) -> Tensor:
    """Encode angles (...,) as (..., features): sine at even indices, cosine at odd indices."""
    index = torch.arange(features, device=angle.device, dtype=angle.dtype)
    angle = angle[..., None] / 10000 ** (2 * (index // 2) / features)  # (..., features)
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)


def sine_of_map(padding: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Encode every cell of a feature map by its position in the visible part: the paper's p_k.

    Along each axis, visible cells are numbered from 1 and divided by their number. The last visible cell is therefore
    at 2π for any amount of padding after it.

    Args:
        padding: (B, h, w) bool, True = padded.
        width: D, a multiple of 4.
        dtype: dtype of the computation; float32 or wider.

    Returns:
        (B, h·w, D) of ``dtype``.
    """
    visible = (~padding).to(dtype)
    y, x = visible.cumsum(1), visible.cumsum(2)
    y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat((sine(y, width // 2), sine(x, width // 2)), dim=-1).flatten(1, 2)  # (B, S, D)


def sine_of_points(points: Tensor, width: int) -> Tensor:
    """Encode points: the paper's p_s = sine(sigmoid(s)).

    Args:
        points: (..., 2) x y, in [0, 1] of the visible image.
        width: D, a multiple of 4.

    Returns:
        (..., D), float32 or wider.
    """
    x, y = (at_least_float32(points) * (2 * math.pi)).unbind(-1)
    return torch.cat((sine(y, width // 2), sine(x, width // 2)), dim=-1)
