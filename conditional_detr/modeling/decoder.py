"""The transformer decoder with conditional cross-attention, the paper's contribution (section 3).

Names follow the paper: ``f`` decoder states (``c`` where they act as content), ``o_q`` object queries,
``s`` reference points, ``p_s`` their sine encoding, ``lambda_q`` the transformation, ``p_q`` the conditional
spatial query, ``p_k`` the position encoding of the keys.
"""

import torch
from torch import Tensor, nn

from conditional_detr.modeling.attention import attend, attention_scores, attention_weights
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.decoder_layer import DecoderLayer, DecoderStack
from conditional_detr.modeling.layers import MLP, Linear, at_least_float32, inverse_sigmoid
from conditional_detr.modeling.positions import sine_of_points


class SelfAttention(nn.Module):
    """Self-attention of the queries: q = W c + W' o_q and k = W c + W' o_q with separate projections; v = W c."""

    def __init__(self, width: int, heads: int, *, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.content_query = Linear(width, width)
        self.position_query = Linear(width, width)
        self.content_key = Linear(width, width)
        self.position_key = Linear(width, width)
        self.value = Linear(width, width)
        self.output = Linear(width, width, zero_bias=True)

    def forward(self, c: Tensor, o_q: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Attend from the queries' content c (B, N, D), with positions o_q (B, N, D), to each other: (B, N, D).

        ``hidden`` is (N, N) or (B, N, N) bool, True = this query does not attend to that one; None: to all.
        """
        q, k, v = self.project(c, o_q)
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(q, k, v, self.heads, hidden=hidden, dropout=dropout))

    def project(self, c: Tensor, o_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return projected queries, keys and values, each (B, N, D)."""
        q = self.content_query(c) + self.position_query(o_q)
        k = self.content_key(c) + self.position_key(o_q)
        return q, k, self.value(c)


class ConditionalCrossAttention(nn.Module):
    """Cross-attention whose scores are c_qᵀ c_k + p_qᵀ p_k (paper, equation 2, section 3.3).

    The sum of the two products is one product of concatenations, [c_q; p_q]ᵀ [c_k; p_k], in every head. In the
    first decoder layer, where the content of the queries is zero, the projected o_q is added to c_q and the projected
    p_k to c_k.

    Args:
        width: D.
        heads: M.
        dropout: rate on the attention weights.
        first: whether this is the first decoder layer.
    """

    def __init__(self, width: int, heads: int, *, dropout: float, first: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.content_query = Linear(width, width)
        self.object_query = Linear(width, width) if first else None
        self.spatial_query = Linear(width, width)
        self.content_key = Linear(width, width)
        self.spatial_key = Linear(width, width)
        self.value = Linear(width, width)
        self.output = Linear(width, width, zero_bias=True)

    def forward(
        self, f: Tensor, o_q: Tensor, p_q: Tensor, memory: Tensor, p_k: Tensor, padding: Tensor | None
    ) -> Tensor:
        """Attend from the queries (B, N, D) to the memory (B, S, D): (B, N, D)."""
        q = self.concatenate(*self.project_queries(f, o_q, p_q))  # (B, N, 2D)
        k = self.concatenate(*self.project_keys(memory, p_k))  # (B, S, 2D)
        return self.attend(q, k, self.value(memory), padding)

    def project_queries(self, f: Tensor, o_q: Tensor, p_q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected c_q (B, N, D) and p_q (B, N, D)."""
        c_q = self.content_query(f)
        if self.object_query is not None:
            c_q = c_q + self.object_query(o_q)
        return c_q, self.spatial_query(p_q)

    def project_keys(self, memory: Tensor, p_k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the projected c_k (B, S, D) and p_k (B, S, D), which depend on the image and not on the queries."""
        c_k, p_k = self.content_key(memory), self.spatial_key(p_k)
        return (c_k if self.object_query is None else c_k + p_k), p_k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """Attend with queries (B, N, 2D) to keys (B, S, 2D) and values (B, S, D): (B, N, D)."""
        dropout = self.dropout if self.training else 0.0
        return self.output(attend(q, k, v, self.heads, padding=padding, dropout=dropout))

    def concatenate(self, content: Tensor, spatial: Tensor) -> Tensor:
        """Concatenate content (B, T, D) and spatial part (B, T, D) in each head: (B, T, 2D)."""
        parts = [part.unflatten(-1, (self.heads, -1)) for part in (content, spatial)]
        return torch.cat(parts, dim=-1).flatten(-2)

    def attention_maps(
        self, f: Tensor, o_q: Tensor, p_q: Tensor, memory: Tensor, p_k: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the softmax of the content part, of the spatial part, and of their sum: each (B, M, N, S)."""
        (c_q, p_q), (c_k, p_k) = self.project_queries(f, o_q, p_q), self.project_keys(memory, p_k)
        scale = (2 * c_q.shape[-1] // self.heads) ** -0.5
        content = attention_scores(c_q, c_k, self.heads, scale=scale)
        spatial = attention_scores(p_q, p_k, self.heads, scale=scale)
        content, spatial, combined = (attention_weights(x, padding) for x in (content, spatial, content + spatial))
        return content, spatial, combined


class Decoder(DecoderStack):
    """The stack of decoder layers, with its reference points and conditional spatial queries."""

    def __init__(self, config: Config) -> None:
        width, heads, dropout = config.width, config.heads, config.dropout

        def attentions(layer: int) -> tuple[nn.Module, nn.Module]:
            self_attention = SelfAttention(width, heads, dropout=dropout)
            return self_attention, ConditionalCrossAttention(width, heads, dropout=dropout, first=layer == 0)

        super().__init__(config, attentions)
        self.reference_point = MLP(width, width, 2, depth=2, linear=Linear)
        self.transformation = MLP(width, width, width, depth=2, linear=Linear)

    def forward(
        self,
        o_q: Tensor,
        memory: Tensor,
        p_k: Tensor,
        padding: Tensor | None = None,
        *,
        content: Tensor | None = None,
        points: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply all decoder layers to the object queries.

        Args:
            o_q: (B, N, D), object queries.
            memory: (B, S, D), the encoder's output.
            p_k: (B, S, D), position encoding of the keys.
            padding: (B, S) bool, True = padded; None: nothing is padded.
            content: (B, N, D), the states before the first layer; None: zero, as in the paper.
            points: (B, N, 2) x y in [0, 1], sigmoid(s); None: predicted from o_q, as in the paper.
            hidden: (N, N) or (B, N, N) bool, True = this query does not attend to that one; None: to all.

        Returns:
            f: (L, B, N, D), normalised states of every layer.
            s: (B, N, 2), reference points x y before the sigmoid.
        """
        points, p_s = self.points(o_q, points)
        f = torch.stack(self.run(o_q, p_s, memory, p_k, padding, content, hidden)[1:])  # (L, B, N, D)
        return self.norm(f), inverse_sigmoid(points)

    def points(self, o_q: Tensor, points: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return sigmoid(s), s = FFN(o_q): (B, N, 2) x y in [0, 1]; and p_s = sine(sigmoid(s)): (B, N, D)."""
        points = at_least_float32(self.reference_point(o_q)).sigmoid() if points is None else at_least_float32(points)
        return points, sine_of_points(points, o_q.shape[-1]).to(o_q.dtype)

    def run(
        self,
        o_q: Tensor,
        p_s: Tensor,
        memory: Tensor,
        p_k: Tensor,
        padding: Tensor | None,
        content: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the states before the first layer and after each layer, not normalised: L + 1 times (B, N, D)."""
        states = [torch.zeros_like(o_q) if content is None else content]
        for i, layer in enumerate(self.layers):
            p_q = self.spatial_query(i, states[-1], p_s)
            states.append(layer(states[-1], o_q, p_q, memory, p_k, padding, hidden=hidden))
        return states

    def spatial_query(self, layer: int, f: Tensor, p_s: Tensor) -> Tensor:
        """Return p_q = λ_q ⊙ p_s with λ_q = FFN(f); in the first layer, p_q = p_s (paper, section 3.3)."""
        if layer == 0:
            return p_s
        lambda_q = self.transformation(f)
        return lambda_q * p_s

    def attention_maps(
        self, layer: int, o_q: Tensor, memory: Tensor, p_k: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return content, spatial and combined cross-attention of one layer, 0..L-1: each (B, M, N, S)."""
        _, p_s = self.points(o_q)
        f = self.run(o_q, p_s, memory, p_k, padding)[layer]
        p_q = self.spatial_query(layer, f, p_s)
        decoder_layer: DecoderLayer = self.layers[layer]  # type: ignore[assignment]  # ModuleList has no element type
        return decoder_layer.attention_maps(f, o_q, p_q, memory, p_k, padding)
