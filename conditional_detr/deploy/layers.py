"""Optimise encoder and decoder: join projections, and compute once what does not depend on the image."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditional_detr.deploy.kernels import Computation, FusedLinear
from conditional_detr.modeling.attention import attend
from conditional_detr.modeling.decoder import ConditionalCrossAttention as CrossAttention
from conditional_detr.modeling.decoder import Decoder
from conditional_detr.modeling.decoder import SelfAttention as QueryAttention
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
    """Decoder self-attention with one projection of the content, and constant projections of the object queries."""

    output: Any

    def __init__(self, plain: QueryAttention, o_q: Tensor, computation: Computation) -> None:
        nn.Module.__init__(self)
        self.heads = plain.heads
        self.content = join_linears(computation, plain.content_query, plain.content_key, plain.value)
        self.output = join_linears(computation, plain.output)
        q, k = plain.position_query(o_q), plain.position_key(o_q)
        self.register_buffer(
            "positions", torch.cat((q, k, torch.zeros_like(k)), dim=-1).to(computation.dtype)
        )  # (1, N, 3D)

    def project(self, c: Tensor, o_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, N, D)."""
        q, k, v = (self.content(c) + self.positions).chunk(3, dim=-1)
        return q, k, v


class FastCrossAttention(CrossAttention):
    """Conditional cross-attention to keys and values that are already projected.

    Values are padded with zeros to the width of the keys, which are content and spatial part: fused attention kernels
    require equal widths.
    """

    content_query: Any
    object_query: None
    spatial_query: Any
    output: Any

    def __init__(self, plain: CrossAttention, computation: Computation) -> None:
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


class FastDecoder(nn.Module):
    """Optimised decoder for fixed object queries, whose projections are computed once.

    Args:
        plain: the plain decoder.
        object_queries: o_q (N, D).
        computation: dtype and kernels; reference points are float32.
    """

    layers: Any
    first_content: Tensor
    first_queries: Tensor
    s: Tensor

    def __init__(self, plain: Decoder, object_queries: Tensor, computation: Computation) -> None:
        super().__init__()
        plain = copy.deepcopy(plain).float().eval()
        o_q = object_queries.detach().float()[None]
        points, p_s = plain.points(o_q)
        layers: Any = plain.layers
        c = layers[0].self_attend(torch.zeros_like(o_q), o_q)
        cross: list[Any] = [layer.cross_attention for layer in layers]
        q = cross[0].concatenate(*cross[0].project_queries(c, o_q, plain.spatial_query(0, c, p_s)))
        constants = {"o_q": o_q, "p_s": p_s, "first_content": c, "first_queries": q}
        for name, value in constants.items():
            self.register_buffer(name, value.to(computation.dtype))
        self.register_buffer("s", inverse_sigmoid(points))
        self.memory_parts = join_linears(computation, *(x for one in cross for x in (one.content_key, one.value)))
        self.spatial_keys = join_linears(computation, *(one.spatial_key for one in cross))
        fast = copy.deepcopy(plain).eval()
        self.layers = fast.layers
        self.norm, self.transformation = fast.norm.to(computation.dtype), fast.transformation.to(computation.dtype)
        for layer, same in zip(self.layers, layers, strict=True):
            layer.cross_attention = FastCrossAttention(same.cross_attention, computation)
            layer.self_attention = FastQueryAttention(same.self_attention, o_q, computation)
            layer.feedforward = FastFeedForward(same.feedforward, computation)
            layer.to(computation.dtype)

    def forward(self, memory: Tensor, p_k: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decode the object queries.

        Args:
            memory: (B, S, D), the encoder's output.
            p_k: (B, S, D), position encoding of the keys.
            padding: (B, S) bool, True = padded; None: nothing is padded.

        Returns:
            f: (1, B, N, D), normalised states of the last layer, float32.
            s: (B, N, 2), reference points x y before the sigmoid, float32.
        """
        images = memory.shape[0]  # symbolic in torch.export, unlike len
        keys, values = self.keys(memory, p_k if padding is not None else p_k[:1])
        c, q = (x.expand(images, -1, -1) for x in (self.first_content, self.first_queries))
        f = self.layers[0].update(c, self.layers[0].cross_attention.attend(q, keys[0], values[0], padding))
        for i, layer in list(enumerate(self.layers))[1:]:
            c, cross = layer.self_attend(f, self.o_q), layer.cross_attention
            q = cross.concatenate(*cross.project_queries(c, self.o_q, self.transformation(f) * self.p_s))
            f = layer.update(c, cross.attend(q, keys[i], values[i], padding))
        return self.norm(f)[None].float(), self.s.expand(images, -1, -1)

    def keys(self, memory: Tensor, p_k: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the keys (B, S, 2D) and values (B, S, D) of all layers."""
        depth = len(self.layers)
        parts = self.memory_parts(memory).unflatten(-1, (depth, 2, -1))
        c_k, values = parts.unbind(-2)  # (B, S, L, D)
        p_k = self.spatial_keys(p_k).unflatten(-1, (depth, -1))
        c_k = torch.cat((c_k[:, :, :1] + p_k[:, :, :1], c_k[:, :, 1:]), dim=2)  # in the first layer, p_k is added
        keys = self.layers[0].cross_attention.concatenate(c_k, p_k.expand_as(c_k))
        return keys.unbind(2), values.unbind(2)
