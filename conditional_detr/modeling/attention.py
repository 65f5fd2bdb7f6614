"""Multi-head attention: functions of projected queries, keys and values, and the projections that DETR has."""

import torch.nn.functional as F
from torch import Tensor, nn

from conditional_detr.modeling.layers import Linear


class MultiHeadAttention(nn.Module):
    """The projections of multi-head attention; subclasses choose what is projected.

    Args:
        width: D.
        heads: M.
        dropout: rate on the attention weights.
    """

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        # The authors store these three in one (3D, D) matrix, whose Xavier bound is smaller by √2.
        self.query = Linear(width, width, gain=2**-0.5, zero_bias=True)
        self.key = Linear(width, width, gain=2**-0.5, zero_bias=True)
        self.value = Linear(width, width, gain=2**-0.5, zero_bias=True)
        self.output = Linear(width, width, zero_bias=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """Attend with projected queries (B, N, D) to keys and values (B, S, D), with padding (B, S): (B, N, D)."""
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(q, k, v, self.heads, padding=padding, dropout=dropout))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape (B, T, M·d) to (B, M, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    padding: Tensor | None = None,
    hidden: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute softmax(q kᵀ / √d) v in every head.

    Args:
        query: (B, N, M·d), heads concatenated.
        key: (B, S, M·d).
        value: (B, S, M·d_v); d_v may differ from d.
        heads: M.
        padding: (B, S) bool, True = no query attends to this key; None: all keys are visible.
        hidden: (N, S) or (B, N, S) bool, True = this query does not attend to this key; instead of padding.
        dropout: rate on the attention weights.

    Returns:
        (B, N, M·d_v).
    """
    visible = None if padding is None else ~padding[:, None, None, :]  # (B, 1, 1, S)
    if hidden is not None:
        visible = ~hidden.unsqueeze(-3)  # (1, N, S) or (B, 1, N, S)
    q, k, v = (split_heads(x, heads) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)


def attention_scores(query: Tensor, key: Tensor, heads: int, *, scale: float) -> Tensor:
    """Compute q kᵀ · scale in every head, from (B, N, M·d) and (B, S, M·d); return (B, M, N, S)."""
    return split_heads(query, heads) @ split_heads(key, heads).transpose(-2, -1) * scale


def attention_weights(scores: Tensor, padding: Tensor | None = None) -> Tensor:
    """Return the softmax of scores (B, M, N, S) over the keys, which is 0 for padded keys (B, S)."""
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None, :], float("-inf"))
    return scores.softmax(dim=-1)
