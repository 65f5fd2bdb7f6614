"""What the decoders of Conditional DETR and DETR share: all but the two attentions of a layer, and their inputs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from conditional_detr.modeling.config import Config
from conditional_detr.modeling.layers import FeedForward


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward network, each with residual addition and norm.

    Args:
        self_attention: attention of the queries to each other, called with f and o_q.
        cross_attention: attention of the queries to the memory, called with the content, o_q and its other inputs.
        width: D.
        feedforward: hidden units of the feed-forward network.
        dropout: rate on hidden units and residual branches.
    """

    def __init__(
        self, self_attention: nn.Module, cross_attention: nn.Module, width: int, feedforward: int, *, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.self_attention_norm = nn.LayerNorm(width)
        self.cross_attention: Any = cross_attention  # which also has attention maps
        self.cross_attention_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, feedforward, dropout=dropout)
        self.feedforward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, f: Tensor, o_q: Tensor, *cross: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        """Return the next decoder states (B, N, D) from f (B, N, D).

        ``cross`` are other inputs of cross-attention; ``hidden`` is the mask of an attention that takes one.
        """
        c = self.self_attend(f, o_q, hidden)
        return self.update(c, self.cross_attention(c, o_q, *cross))

    def self_attend(self, f: Tensor, o_q: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return the content c (B, N, D) for cross-attention: self-attention with residual addition and norm."""
        mask = () if hidden is None else (hidden,)
        return self.self_attention_norm(f + self.dropout(self.self_attention(f, o_q, *mask)))

    def update(self, c: Tensor, attended: Tensor) -> Tensor:
        """Return the next states: add the cross-attention's output and the feed-forward network's, each with norm."""
        c = self.cross_attention_norm(c + self.dropout(attended))
        return self.feedforward_norm(c + self.dropout(self.feedforward(c)))

    def attention_maps(self, f: Tensor, o_q: Tensor, *cross: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return content, spatial and combined cross-attention for decoder states f: each (B, M, N, S)."""
        return self.cross_attention.attention_maps(self.self_attend(f, o_q), o_q, *cross)


class DecoderStack(nn.Module):
    """L decoder layers, and one norm for the states after each of them.

    Args:
        config: the sizes.
        attentions: returns the self-attention and the cross-attention of a layer, 0..L-1.
    """

    def __init__(self, config: Config, attentions: Callable[[int], tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(*attentions(i), config.width, config.feedforward, dropout=config.dropout)
            for i in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.width)
