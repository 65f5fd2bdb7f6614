"""The transformer decoder of DETR (Carion et al., ECCV 2020), which the paper starts from (section 3.1).

Names are those of :mod:`conditional_detr.modeling.decoder`, to be read beside it: there are no reference points and no
conditional spatial query, and positions are added to the content instead of concatenated.
"""

import torch
from torch import Tensor, nn

from conditional_detr.modeling.attention import MultiHeadAttention, attention_scores, attention_weights
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.decoder_layer import DecoderLayer, DecoderStack
from conditional_detr.modeling.encoder import SelfAttention


class CrossAttention(MultiHeadAttention):
    """Cross-attention whose scores are (c_q + o_q)ᵀ (c_k + p_k) (paper, equation 1): content and positions mix."""

    def forward(self, f: Tensor, o_q: Tensor, memory: Tensor, p_k: Tensor, padding: Tensor | None) -> Tensor:
        """Attend from the queries (B, N, D) to the memory (B, S, D): (B, N, D)."""
        return self.attend(self.project_queries(f, o_q), self.key(memory + p_k), self.value(memory), padding)

    def project_queries(self, f: Tensor, o_q: Tensor) -> Tensor:
        """Return the projected queries (B, N, D)."""
        return self.query(f + o_q)

    def attention_maps(
        self, f: Tensor, o_q: Tensor, memory: Tensor, p_k: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the softmax of c_qᵀ c_k, of o_qᵀ p_k, and of the whole scores: each (B, M, N, S)."""
        scale = (f.shape[-1] // self.heads) ** -0.5
        pairs = ((f, memory), (o_q, p_k), (f + o_q, memory + p_k))
        scores = (attention_scores(self.query(q), self.key(k), self.heads, scale=scale) for q, k in pairs)
        content, spatial, combined = (attention_weights(x, padding) for x in scores)
        return content, spatial, combined


class DETRDecoder(DecoderStack):
    """The stack of decoder layers. Self-attention is the encoder's, with o_q as positions."""

    def __init__(self, config: Config) -> None:
        width, heads, dropout = config.width, config.heads, config.dropout

        def attentions(_: int) -> tuple[nn.Module, nn.Module]:
            return SelfAttention(width, heads, dropout=dropout), CrossAttention(width, heads, dropout=dropout)

        super().__init__(config, attentions)

    def forward(self, o_q: Tensor, memory: Tensor, p_k: Tensor, padding: Tensor | None = None) -> tuple[Tensor]:
        """Apply all decoder layers to the object queries.

        Args:
            o_q: (B, N, D), object queries.
            memory: (B, S, D), the encoder's output.
            p_k: (B, S, D), position encoding of the keys.
            padding: (B, S) bool, True = padded; None: nothing is padded.

        Returns:
            f: (L, B, N, D), normalised states of every layer, alone in a tuple.
        """
        f = torch.stack(self.run(o_q, memory, p_k, padding)[1:])  # (L, B, N, D)
        return (self.norm(f),)

    def run(self, o_q: Tensor, memory: Tensor, p_k: Tensor, padding: Tensor | None) -> list[Tensor]:
        """Return the states before the first layer and after each layer, not normalised: L + 1 times (B, N, D)."""
        states = [torch.zeros_like(o_q)]
        for layer in self.layers:
            states.append(layer(states[-1], o_q, memory, p_k, padding))
        return states

    def attention_maps(
        self, layer: int, o_q: Tensor, memory: Tensor, p_k: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return content, spatial and combined cross-attention of one layer, 0..L-1: each (B, M, N, S)."""
        f = self.run(o_q, memory, p_k, padding)[layer]
        decoder_layer: DecoderLayer = self.layers[layer]  # type: ignore[assignment]  # ModuleList has no element type
        return decoder_layer.attention_maps(f, o_q, memory, p_k, padding)
