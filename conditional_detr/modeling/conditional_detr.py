"""Conditional DETR (Meng et al., ICCV 2021, arXiv 2108.06152): the network, from pixels to boxes.

Shapes, here and everywhere: B images, H x W padded size, h x w feature map, S = h·w tokens, N queries,
D width, M heads, C classes, L decoder layers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditional_detr.modeling.backbone import Backbone
from conditional_detr.modeling.decoder import Decoder
from conditional_detr.modeling.encoder import Encoder
from conditional_detr.modeling.layers import MLP
from conditional_detr.modeling.metadata import LoadReport, Metadata
from conditional_detr.modeling.positions import sine_of_map

# limits that refuse a damaged or hostile description before anything is built
_MOST = {"num_classes": 10**6, "num_queries": 10**6, "width": 2**16, "feedforward": 10**6}
_MOST |= {"encoder_layers": 1000, "decoder_layers": 1000}
PRIOR_PROBABILITY = 0.01  # score of every class before training (focal loss paper, section 4.1)


@dataclass(frozen=True)
class Config:
    """The architecture and nothing else. The defaults are the published ResNet-50 model.

    Attributes:
        num_classes: C, rows of the class head.
        num_queries: N, object queries per image.
        width: D, a multiple of 4 and of ``heads``.
        heads: M.
        encoder_layers: layers of the encoder, 0 or more.
        decoder_layers: L, 1 or more.
        feedforward: hidden units of the feed-forward networks.
        dropout: in [0, 1), on attention weights, hidden units and residual branches, while training.
        backbone: timm's name of the backbone.
        backbone_stage: index of the backbone's feature map; 4 is the last stage of a ResNet.
        dilation: DC5, the last stage dilated instead of strided.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of its range.
    """

    num_classes: int = 91
    num_queries: int = 300
    width: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward: int = 2048
    dropout: float = 0.1
    backbone: str = "resnet50"
    backbone_stage: int = 4
    dilation: bool = False

    def __post_init__(self) -> None:
        for name, annotation in type(self).__annotations__.items():
            value = getattr(self, name)
            expected = (int, float) if annotation is float else (annotation,)
            if not isinstance(value, expected) or (isinstance(value, bool) and annotation is not bool):
                raise TypeError(f"{name}: expected {annotation.__name__}, got {value!r}")
        at_least_zero = ("encoder_layers", "backbone_stage")
        at_least_one = ("num_classes", "num_queries", "width", "heads", "decoder_layers", "feedforward")
        for minimum, names in enumerate((at_least_zero, at_least_one)):
            for name in names:
                if getattr(self, name) < minimum:
                    raise ValueError(f"{name}: expected at least {minimum}, got {getattr(self, name)}")
        for name, maximum in _MOST.items():
            if getattr(self, name) > maximum:
                raise ValueError(f"{name}: expected at most {maximum}, got {getattr(self, name)}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width: expected a multiple of 4 and of heads ({self.heads}), got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {self.dropout}")


class Output(NamedTuple):
    """Predictions of every decoder layer; those of the last layer are the detections.

    Attributes:
        logits: (L, B, N, C), before the sigmoid.
        boxes: (L, B, N, 4), cx cy w h in [0, 1] of the visible image.
    """

    logits: Tensor
    boxes: Tensor


class AttentionMaps(NamedTuple):
    """Attention of each query per head: softmax over the feature map of the content part, the spatial part and both.

    Attributes:
        content: (B, M, N, h, w), of c_qᵀ c_k.
        spatial: (B, M, N, h, w), of p_qᵀ p_k.
        combined: (B, M, N, h, w), of their sum, which the model uses.
    """

    content: Tensor
    spatial: Tensor
    combined: Tensor


class ConditionalDETR(nn.Module):
    """Conditional DETR. ``forward`` is the paper's figure.

    Args:
        config: the architecture.
        metadata: class names, category ids and preprocessing; default: numbered classes, the paper's preprocessing.

    Attributes:
        config: the architecture as built.
        metadata: class names, category ids and preprocessing, for Detector, saving and export.
        load_report: how the weights were loaded; None for a model without loaded weights.
        backbone: the backbone, :class:`~conditional_detr.modeling.backbone.Backbone`.
        projection: 1x1 convolution from the backbone's channels to D.
        encoder: :class:`~conditional_detr.modeling.encoder.Encoder`.
        object_queries: embedding (N, D), the learned o_q.
        decoder: :class:`~conditional_detr.modeling.decoder.Decoder`.
        class_head: linear (D to C).
        box_head: MLP (D to 4).

    Raises:
        TypeError: ``config`` is not a Config.
        ValueError: timm has no such backbone or stage, or the number of class names differs from ``num_classes``.
    """

    def __init__(self, config: Config | None = None, metadata: Metadata | None = None) -> None:
        super().__init__()
        config = Config() if config is None else config
        if not isinstance(config, Config):
            raise TypeError(f"config: expected a Config, got {type(config).__name__}")
        metadata = Metadata.numbered(config.num_classes) if metadata is None else metadata
        if len(metadata.class_names) != config.num_classes:
            raise ValueError(f"metadata: expected {config.num_classes} class names, got {len(metadata.class_names)}")
        self.config = config
        self.metadata = metadata
        self.load_report: LoadReport | None = None
        width = config.width
        sizes = {"width": width, "heads": config.heads, "feedforward": config.feedforward}
        self.backbone = Backbone(config.backbone, stage=config.backbone_stage, dilation=config.dilation)
        self.projection = nn.Conv2d(self.backbone.channels, width, kernel_size=1)
        self.encoder = Encoder(layers=config.encoder_layers, dropout=config.dropout, **sizes)
        self.object_queries = nn.Embedding(config.num_queries, width)
        self.decoder = Decoder(layers=config.decoder_layers, dropout=config.dropout, **sizes)
        self.class_head = nn.Linear(width, config.num_classes)
        self.box_head = MLP(width, width, 4, depth=3)
        nn.init.constant_(self.class_head.bias, prior_bias())
        for parameter in self.box_head.layers[-1].parameters():
            nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        """The device of the weights; pixels must be on it."""
        return self.projection.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights; pixels must have it."""
        return self.projection.weight.dtype

    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> Output:
        """Detect objects.

        Args:
            pixels: (B, 3, H, W), normalised by ``metadata.preprocessing``, of the model's dtype.
            padding: (B, H, W) bool, True = padded; None: nothing is padded.

        Returns:
            Output of logits (L, B, N, C) and boxes (L, B, N, 4), the same in train and eval mode.

        Raises:
            TypeError: an argument is not a tensor or has the wrong dtype.
            ValueError: an argument has the wrong shape.
        """
        check_input(pixels, padding)
        features, padding = self.backbone(pixels, padding)  # (B, C, h, w), (B, h, w)
        memory, positions = self.encode(features, padding)  # (B, S, D)
        f, s = self.decode(memory, positions, padding)  # (L, B, N, D), (B, N, 2)
        return self.predict(f, s)  # (L, B, N, C), (L, B, N, 4)

    def encode(self, features: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Project the feature map to tokens and encode them.

        Args:
            features: (B, C, h, w), the backbone's map.
            padding: (B, h, w) bool, True = padded; None: nothing is padded.

        Returns:
            memory (B, S, D) and its positions p_k (B, S, D).
        """
        tokens = self.projection(features).flatten(2).transpose(1, 2)  # (B, S, D)
        p_k = self.key_positions(features, padding).expand_as(tokens)
        memory = self.encoder(tokens, p_k, None if padding is None else padding.flatten(1))
        return memory, p_k

    def key_positions(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """Encode the cells of a feature map: p_k (B, S, D), or (1, S, D) for all images if nothing is padded."""
        cells = features.new_zeros((1, *features.shape[-2:]), dtype=torch.bool) if padding is None else padding
        dtype = torch.promote_types(features.dtype, torch.float32)
        return sine_of_map(cells, self.config.width, dtype).to(features.dtype)

    def decode(
        self, memory: Tensor, positions: Tensor, padding: Tensor | None = None, *, object_queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode the object queries with the memory.

        Args:
            memory: (B, S, D).
            positions: (B, S, D), p_k.
            padding: (B, h, w) or (B, S) bool, True = padded; None: nothing is padded.
            object_queries: (B, N, D), o_q, with any N; None: the model's own, the same for every image.

        Returns:
            f (L, B, N, D), decoder states after the final norm; s (B, N, 2), reference points before the sigmoid.
        """
        o_q = self.object_queries.weight.repeat(memory.shape[0], 1, 1) if object_queries is None else object_queries
        return self.decoder(o_q, memory, positions, None if padding is None else padding.flatten(1))

    def predict(self, f: Tensor, s: Tensor) -> Output:
        """Predict classes and boxes from decoder states: b = sigmoid(FFN(f) + [s, 0, 0]) (paper, section 3.2).

        Args:
            f: (L, B, N, D), decoder states.
            s: (B, N, 2), reference points before the sigmoid.

        Returns:
            Output of logits (L, B, N, C) and boxes (L, B, N, 4).
        """
        boxes = (self.box_head(f) + F.pad(s, (0, 2))).sigmoid()
        return Output(self.class_head(f), boxes)

    def weights_digest(self) -> str:
        """Return the SHA-256 of the names, shapes, dtypes and values of all parameters and buffers."""
        hashed = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return hashed.hexdigest()

    def attention_maps(
        self, pixels: Tensor, padding: Tensor | None = None, *, layers: Sequence[int] = (-1,)
    ) -> AttentionMaps:
        """Compute the cross-attention maps of the paper's figure 1.

        They are computed separately; ``forward`` uses fused attention, which does not return maps.

        Args:
            pixels: (B, 3, H, W), as for ``forward``.
            padding: (B, H, W) bool, True = padded; None: nothing is padded.
            layers: indices of decoder layers, -L..L-1. The heads of several layers are concatenated: M becomes M times
                the number of layers, and ``maps.content.unflatten(1, (len(layers), -1))`` separates them.

        Returns:
            AttentionMaps of (B, M, N, h, w) each, every map summing to 1.

        Raises:
            TypeError: not tensors, or not of these dtypes.
            ValueError: an argument has the wrong shape, or ``layers`` is empty or has an index out of range.
        """
        check_input(pixels, padding)
        depth = len(self.decoder.layers)
        if not layers or any(not -depth <= layer < depth for layer in layers):
            raise ValueError(f"layers: expected one or more of {-depth}..{depth - 1}, got {tuple(layers)}")
        features, padding = self.backbone(pixels, padding)
        memory, p_k = self.encode(features, padding)
        cells = None if padding is None else padding.flatten(1)
        o_q = self.object_queries.weight.repeat(memory.shape[0], 1, 1)
        maps = [self.decoder.attention_maps(i % depth, o_q, memory, p_k, cells) for i in layers]
        return AttentionMaps(
            *(torch.cat(kind, dim=1).unflatten(-1, features.shape[-2:]) for kind in zip(*maps, strict=True))
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "ConditionalDETR":
        """Load a checkpoint: see :func:`conditional_detr.checkpoints.loading.from_pretrained`."""
        from conditional_detr.checkpoints.loading import from_pretrained

        return from_pretrained(name, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save in the published format: see :func:`conditional_detr.checkpoints.saving.save_pretrained`."""
        from conditional_detr.checkpoints.saving import save_pretrained

        save_pretrained(self, folder, **options)


def prior_bias() -> float:
    """Return the class bias at which every score is the prior probability: -log(99)."""
    return -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)


def check_input(pixels: Tensor, padding: Tensor | None) -> None:
    """Raise TypeError or ValueError unless pixels are (B, 3, H, W) floats and padding (B, H, W) bools."""
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        got = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(
            f"pixels: expected a normalised floating point tensor (B, 3, H, W), got {got}; use Detector for images"
        )
    if pixels.dim() != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels: expected (B, 3, H, W), none of them 0, got {tuple(pixels.shape)}")
    if padding is None:
        return
    if not isinstance(padding, Tensor) or padding.dtype != torch.bool:
        got = padding.dtype if isinstance(padding, Tensor) else type(padding).__name__
        raise TypeError(
            f"padding: expected a bool tensor (B, H, W), True = padded, got {got};"
            " for a mask where 1 means visible, pass mask == 0"
        )
    expected = (pixels.shape[0], *pixels.shape[2:])
    if padding.shape != expected:
        raise ValueError(f"padding: expected {tuple(expected)}, the shape of the pixels, got {tuple(padding.shape)}")
