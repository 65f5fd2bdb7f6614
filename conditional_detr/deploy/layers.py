"""Optimise encoder and decoders: join projections, and compute once what does not depend on the image."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditional_detr.deploy.kernels import Computation, FusedLinear
from conditional_detr.modeling.attention import attend
from conditional_detr.modeling.decoder import ConditionalCrossAttention, Decoder
from conditional_detr.modeling.decoder import SelfAttention as QueryAttention
from conditional_detr.modeling.detr_decoder import CrossAttention, DETRDecoder
from conditional_detr.modeling.encoder import Encoder
from conditional_detr.modeling.encoder import SelfAttention as TokenAttention
from conditional_detr.modeling.layers import FeedForward, inverse_sigmoid


def join_linears(computation: Computation, *layers: Any, relu: bool = False) -> FusedLinear:
    """Return one linear layer whose output is the concatenated output of several layers."""
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    return FusedLinear(weight, bias, computation, relu=relu)


class FastFeedForward(nn.Module):
    """Feed-forward network, with ReLU fused into the first layer."""

    def __init__(self, plain: FeedForward, computation: Computation) -> None:
        super().__init__()
        self.hidden = join_linears(computation, plain.hidden, relu=True)
        self.output = join_linears(computation, plain.output)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) for (..., D)."""
        return self.output(self.hidden(x))


class FastTokenAttention(TokenAttention):
    """Encoder self-attention with one projection for queries and keys."""

    value: Any
    output: Any

    def __init__(self, plain: TokenAttention, computation: Computation) -> None:
        nn.Module.__init__(self)
        self.heads = plain.heads
        self.query_key = join_linears(computation, plain.query, plain.key)
        self.value = join_linears(computation, plain.value)
        self.output = join_linears(computation, plain.output)

    def project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, S, D)."""
        q, k = self.query_key(x + positions).chunk(2, dim=-1)
        return q, k, self.value(x)


def fast_encoder(plain: Encoder, computation: Computation) -> Encoder:
    """Return an optimised copy of an encoder."""
    fast = copy.deepcopy(plain).eval()
    layers: Any = fast.layers  # ModuleList loses their type
    for layer in layers:
        layer.self_attention = FastTokenAttention(layer.self_attention, computation)
        layer.feedforward = FastFeedForward(layer.feedforward, computation)
        layer.to(computation.dtype)
    return fast


class FastQueryAttention(QueryAttention):
    """Decoder self-attention with one projection of the content, and constant projections of the object queries.

    Args:
        plain: the plain self-attention, whose ``output`` is used.
        content: layers that project the content to queries, keys and values.
        positions: projections of the object queries to queries and keys, (1, N, D) each.
        computation: dtype and kernels.
    """

    output: Any

    def __init__(
        self, plain: Any, content: Sequence[nn.Module], positions: Sequence[Tensor], computation: Computation
    ) -> None:
        nn.Module.__init__(self)
        self.heads = plain.heads
        self.content = join_linears(computation, *content)
        self.output = join_linears(computation, plain.output)
        q, k = positions
        self.register_buffer(
            "positions", torch.cat((q, k, torch.zeros_like(k)), dim=-1).to(computation.dtype)
        )  # (1, N, 3D)

    def project(self, c: Tensor, o_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, N, D)."""
        q, k, v = (self.content(c) + self.positions).chunk(3, dim=-1)
        return q, k, v


class FastConditionalCrossAttention(ConditionalCrossAttention):
    """Conditional cross-attention to keys and values that are already projected.

    Values are padded with zeros to the width of the keys, which are content and spatial part: fused attention kernels
    require equal widths.
    """

    content_query: Any
    object_query: None
    spatial_query: Any
    output: Any

    def __init__(self, plain: ConditionalCrossAttention, computation: Computation) -> None:
        nn.Module.__init__(self)
        self.heads = plain.heads
        self.object_query = None  # only used in the first layer, whose queries are computed once
        for name in ("content_query", "spatial_query", "output"):
            setattr(self, name, join_linears(computation, getattr(plain, name)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
        """Return attention (B, N, D) of queries (B, N, 2D) over keys (B, S, 2D) and values (B, S, D)."""
        v = v.unflatten(-1, (self.heads, -1))
        width = v.shape[-1]
        v = F.pad(v, (0, k.shape[-1] // self.heads - width)).flatten(-2)
        attended = attend(q, k, v, self.heads, padding=padding).unflatten(-1, (self.heads, -1))
        return self.output(attended[..., :width].flatten(-2))


class FastCrossAttention(CrossAttention):
    """DETR's cross-attention to keys and values that are already projected."""

    query: Any
    output: Any

    def __init__(self, plain: CrossAttention, o_q: Tensor, computation: Computation) -> None:
        nn.Module.__init__(self)
        self.heads = plain.heads
        self.query, self.output = (join_linears(computation, one) for one in (plain.query, plain.output))
        self.register_buffer("positions", F.linear(o_q, plain.query.weight).to(computation.dtype))  # (1, N, D)

    def project_queries(self, f: Tensor, o_q: Tensor) -> Tensor:
        """Return the projected queries (B, N, D) of content f (B, N, D)."""
        return self.query(f) + self.positions


class FastDecoder(nn.Module, ABC):
    """Optimised decoder for fixed object queries, whose projections are computed once.

    States and norms are float32; attentions and feed-forward networks have the dtype of the computation. Subclasses
    replace the attentions of the layers, and project queries, keys and values.

    Args:
        plain: a float32 copy of the plain decoder, which is changed.
        o_q: the object queries (1, N, D).
        computation: dtype and kernels.
    """

    layers: Any
    o_q: Tensor
    first_content: Tensor
    first_queries: Tensor

    def __init__(self, plain: Any, o_q: Tensor, computation: Computation) -> None:
        super().__init__()
        c = plain.layers[0].self_attend(torch.zeros_like(o_q), o_q)
        self.register_buffer("o_q", o_q)
        self.register_buffer("first_content", c)
        self.register_buffer("first_queries", self.queries_of_first_layer(plain, c, o_q).to(computation.dtype))
        for layer in plain.layers:
            layer.self_attention, layer.cross_attention = self.attentions(layer, o_q, computation)
            layer.feedforward = FastFeedForward(layer.feedforward, computation)
        self.layers, self.norm = plain.layers, plain.norm

    def run(self, memory: Tensor, p_k: Tensor, padding: Tensor | None) -> Tensor:
        """Decode the object queries.

        Args:
            memory: (B, S, D), the encoder's output.
            p_k: (B, S, D), position encoding of the keys.
            padding: (B, S) bool, True = padded; None: nothing is padded.

        Returns:
            f: (1, B, N, D), normalised states of the last layer, float32.
        """
        images = memory.shape[0]  # symbolic in torch.export, unlike len
        keys, values = self.keys(memory, p_k if padding is not None else p_k[:1])
        c, q = (x.expand(images, -1, -1) for x in (self.first_content, self.first_queries))
        f = self.layers[0].update(c, self.layers[0].cross_attention.attend(q, keys[0], values[0], padding))
        for i, layer in list(enumerate(self.layers))[1:]:
            c = layer.self_attend(f, self.o_q)
            q = self.queries(layer.cross_attention, c, f)
            f = layer.update(c, layer.cross_attention.attend(q, keys[i], values[i], padding))
        return self.norm(f)[None]

    @abstractmethod
    def queries_of_first_layer(self, plain: Any, c: Tensor, o_q: Tensor) -> Tensor:
        """Return the projected queries of the first layer, from the plain decoder."""

    @abstractmethod
    def attentions(self, layer: Any, o_q: Tensor, computation: Computation) -> tuple[nn.Module, nn.Module]:
        """Return the optimised self-attention and cross-attention of a plain layer."""

    @abstractmethod
    def queries(self, cross: Any, c: Tensor, f: Tensor) -> Tensor:
        """Return the projected queries of a layer, from its content c and the states f before it, (B, N, D) each."""

    @abstractmethod
    def keys(self, memory: Tensor, p_k: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the keys and the values (B, S, D) of all layers."""


class FastConditionalDecoder(FastDecoder):
    """Optimised decoder of ConditionalDETR; reference points, their encoding p_s and λ_q are float32."""

    p_s: Tensor
    s: Tensor

    def __init__(self, plain: Decoder, o_q: Tensor, computation: Computation) -> None:
        cross: list[Any] = [layer.cross_attention for layer in plain.layers]
        super().__init__(plain, o_q, computation)
        points, p_s = plain.points(o_q)
        self.register_buffer("p_s", p_s)
        self.register_buffer("s", inverse_sigmoid(points))
        self.memory_parts = join_linears(computation, *(x for one in cross for x in (one.content_key, one.value)))
        self.spatial_keys = join_linears(computation, *(one.spatial_key for one in cross))
        self.transformation = plain.transformation

    def forward(self, memory: Tensor, p_k: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f (1, B, N, D) of :meth:`run`, and reference points s (B, N, 2) before the sigmoid, float32."""
        return self.run(memory, p_k, padding), self.s.expand(memory.shape[0], -1, -1)

    def queries_of_first_layer(self, plain: Decoder, c: Tensor, o_q: Tensor) -> Tensor:
        """Return the projected queries (1, N, 2D) of the first layer, whose spatial query is p_s."""
        cross: Any = plain.layers[0].cross_attention
        return cross.concatenate(*cross.project_queries(c, o_q, plain.points(o_q)[1]))

    def attentions(self, layer: Any, o_q: Tensor, computation: Computation) -> tuple[nn.Module, nn.Module]:
        """Return the optimised attentions of a plain layer."""
        plain = layer.self_attention
        content = (plain.content_query, plain.content_key, plain.value)
        positions = (plain.position_query(o_q), plain.position_key(o_q))
        return (
            FastQueryAttention(plain, content, positions, computation),
            FastConditionalCrossAttention(layer.cross_attention, computation),
        )

    def queries(self, cross: Any, c: Tensor, f: Tensor) -> Tensor:
        """Return the projected queries (B, N, 2D) of a layer after the first, with λ_q = FFN(f)."""
        return cross.concatenate(*cross.project_queries(c, self.o_q, self.transformation(f) * self.p_s))

    def keys(self, memory: Tensor, p_k: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the keys (B, S, 2D) and values (B, S, D) of all layers."""
        depth = len(self.layers)
        parts = self.memory_parts(memory).unflatten(-1, (depth, 2, -1))
        c_k, values = parts.unbind(-2)  # (B, S, L, D)
        p_k = self.spatial_keys(p_k).unflatten(-1, (depth, -1))
        c_k = torch.cat((c_k[:, :, :1] + p_k[:, :, :1], c_k[:, :, 1:]), dim=2)  # in the first layer, p_k is added
        keys = self.layers[0].cross_attention.concatenate(c_k, p_k.expand_as(c_k))
        return keys.unbind(2), values.unbind(2)


class FastDETRDecoder(FastDecoder):
    """Optimised decoder of DETR."""

    def __init__(self, plain: DETRDecoder, o_q: Tensor, computation: Computation) -> None:
        cross: list[Any] = [layer.cross_attention for layer in plain.layers]
        super().__init__(plain, o_q, computation)
        self.all_keys, self.all_values = (
            join_linears(computation, *(getattr(one, name) for one in cross)) for name in ("key", "value")
        )

    def forward(self, memory: Tensor, p_k: Tensor, padding: Tensor | None = None) -> tuple[Tensor]:
        """Return f (1, B, N, D) of :meth:`run`, alone in a tuple."""
        return (self.run(memory, p_k, padding),)

    def queries_of_first_layer(self, plain: DETRDecoder, c: Tensor, o_q: Tensor) -> Tensor:
        """Return the projected queries (1, N, D) of the first layer."""
        cross: Any = plain.layers[0].cross_attention
        return cross.project_queries(c, o_q)

    def attentions(self, layer: Any, o_q: Tensor, computation: Computation) -> tuple[nn.Module, nn.Module]:
        """Return the optimised attentions of a plain layer."""
        plain = layer.self_attention
        content = (plain.query, plain.key, plain.value)
        positions = [F.linear(o_q, one.weight) for one in (plain.query, plain.key)]  # biases: with the content
        return (
            FastQueryAttention(plain, content, positions, computation),
            FastCrossAttention(layer.cross_attention, o_q, computation),
        )

    def queries(self, cross: Any, c: Tensor, f: Tensor) -> Tensor:
        """Return the projected queries (B, N, D) of a layer after the first."""
        return cross.project_queries(c, self.o_q)

    def keys(self, memory: Tensor, p_k: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the keys and values (B, S, D) of all layers."""
        keys, values = self.all_keys(memory + p_k), self.all_values(memory)
        depth = len(self.layers)
        return keys.chunk(depth, dim=-1), values.chunk(depth, dim=-1)


_FAST: dict[type[nn.Module], Callable[..., FastDecoder]] = {
    Decoder: FastConditionalDecoder,
    DETRDecoder: FastDETRDecoder,
}


def fast_decoder(plain: nn.Module, object_queries: Tensor, computation: Computation) -> FastDecoder:
    """Return an optimised copy of a decoder for fixed object queries (N, D)."""
    copied = copy.deepcopy(plain).float().eval()
    return _FAST[type(plain)](copied, object_queries.detach().float()[None], computation)
