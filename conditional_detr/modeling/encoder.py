"""The transformer encoder: self-attention over the tokens of the feature map, as in DETR."""

from torch import Tensor, nn

from conditional_detr.modeling.attention import MultiHeadAttention
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.layers import FeedForward


class SelfAttention(MultiHeadAttention):
    """Multi-head self-attention with positions added to queries and keys, not to values."""

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor | None = None) -> Tensor:
        """Attend from tokens x (B, S, D) to each other, with positions (B, S, D) and padding (B, S): (B, S, D)."""
        return self.attend(*self.project(x, positions), padding)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, S, D) of tokens."""
        return self.query(x + positions), self.key(x + positions), self.value(x)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each with residual addition and layer norm."""

    def __init__(self, width: int, heads: int, feedforward: int, *, dropout: float) -> None:
        super().__init__()
        self.self_attention = SelfAttention(width, heads, dropout=dropout)
        self.self_attention_norm = nn.LayerNorm(width)
        self.feedforward = FeedForward(width, feedforward, dropout=dropout)
        self.feedforward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
        """Map tokens (B, S, D) to tokens (B, S, D)."""
        x = self.self_attention_norm(x + self.dropout(self.self_attention(x, positions, padding)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))


class Encoder(nn.Module):
    """A stack of encoder layers; there is no norm after the last."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(config.width, config.heads, config.feedforward, dropout=config.dropout)
            for _ in range(config.encoder_layers)
        )

    def forward(self, tokens: Tensor, positions: Tensor, padding: Tensor | None = None) -> Tensor:
        """Apply all encoder layers to the tokens.

        Args:
            tokens: (B, S, D), the projected feature map.
            positions: (B, S, D), p_k.
            padding: (B, S) bool, True = padded; None: nothing is padded.

        Returns:
            memory (B, S, D).
        """
        for layer in self.layers:
            tokens = layer(tokens, positions, padding)
        return tokens
