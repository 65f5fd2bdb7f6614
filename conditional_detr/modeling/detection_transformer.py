"""What ConditionalDETR and DETR share: a network from pixels to boxes whose decoder and class scores are handed in.

Shapes, here and everywhere: B images, H x W padded size, h x w feature map, S = h·w tokens, N queries,
D width, M heads, C classes, L decoder layers.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from conditional_detr.modeling.backbone import Backbone
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.encoder import Encoder
from conditional_detr.modeling.layers import MLP
from conditional_detr.modeling.metadata import LoadReport, Metadata
from conditional_detr.modeling.positions import sine_of_map
from conditional_detr.modeling.scores import ClassScores

Network = TypeVar("Network", bound="DetectionTransformer")


class Output(NamedTuple):
    """Predictions of every decoder layer; those of the last layer are the detections.

    Attributes:
        logits: (L, B, N, C), before the sigmoid; of DETR (L, B, N, C + 1), before the softmax, "no object" last.
        boxes: (L, B, N, 4), cx cy w h in [0, 1] of the visible image.
    """

    logits: Tensor
    boxes: Tensor


class AttentionMaps(NamedTuple):
    """Attention of each query per head: softmax over the feature map of the content part, the spatial part and all.

    The scores of ConditionalDETR are the sum of both parts. DETR multiplies sums, (c_q + o_q)ᵀ (c_k + p_k), so that
    its scores also have the mixed terms c_qᵀ p_k and o_qᵀ c_k, which belong to neither part.

    Attributes:
        content: (B, M, N, h, w), of c_qᵀ c_k.
        spatial: (B, M, N, h, w), of p_qᵀ p_k; of DETR, of o_qᵀ p_k.
        combined: (B, M, N, h, w), of the whole scores, which the model uses.
    """

    content: Tensor
    spatial: Tensor
    combined: Tensor


class DetectionTransformer(nn.Module):
    """Backbone, encoder, object queries and heads around a decoder. ``forward`` is the paper's figure.

    Args:
        config: the sizes.
        metadata: class names, category ids and preprocessing; None: numbered classes, the paper's preprocessing.
        decoder: class of the decoder.

    Attributes:
        architecture: name of the architecture, as in ``model_type`` of a ``config.json``.
        default_config: sizes of the published checkpoint.
        scores: how logits become scores of classes.
        config: the sizes as built.
        metadata: class names, category ids and preprocessing, for Detector, saving and export.
        load_report: how the weights were loaded; None for a model without loaded weights.
        backbone: the backbone, :class:`~conditional_detr.modeling.backbone.Backbone`.
        projection: 1x1 convolution from the backbone's channels to D.
        encoder: :class:`~conditional_detr.modeling.encoder.Encoder`.
        object_queries: embedding (N, D), the learned o_q.
        decoder: the decoder.
        class_head: linear (D to the rows that ``scores`` need).
        box_head: MLP (D to 4).

    Raises:
        TypeError: ``config`` is not a Config.
        ValueError: timm has no such backbone or stage, or the number of class names differs from ``num_classes``.
    """

    architecture: str
    default_config: Config
    scores: ClassScores
    predict: Callable[..., Output]

    def __init__(
        self, config: Config | None, metadata: Metadata | None, *, decoder: Callable[[Config], nn.Module]
    ) -> None:
        super().__init__()
        config = self.default_config if config is None else config
        if not isinstance(config, Config):
            raise TypeError(f"config: expected a Config, got {type(config).__name__}")
        metadata = Metadata.numbered(config.num_classes) if metadata is None else metadata
        if len(metadata.class_names) != config.num_classes:
            raise ValueError(f"metadata: expected {config.num_classes} class names, got {len(metadata.class_names)}")
        self.config = config
        self.metadata = metadata
        self.load_report: LoadReport | None = None
        width = config.width
        self.backbone = Backbone(config.backbone, stage=config.backbone_stage, dilation=config.dilation)
        self.projection = nn.Conv2d(self.backbone.channels, width, kernel_size=1)
        self.encoder = Encoder(config)
        self.object_queries = nn.Embedding(config.num_queries, width)
        self.decoder: Any = decoder(config)
        self.class_head = nn.Linear(width, self.scores.rows(config.num_classes))
        self.box_head = MLP(width, width, 4, depth=3)
        self.scores.initialise(self.class_head)

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
        decoded = self.decode(memory, positions, padding)  # (L, B, N, D) and more that the heads need
        return self.predict(*decoded)  # (L, B, N, C), (L, B, N, 4)

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
    ) -> tuple[Tensor, ...]:
        """Decode the object queries with the memory.

        Args:
            memory: (B, S, D).
            positions: (B, S, D), p_k.
            padding: (B, h, w) or (B, S) bool, True = padded; None: nothing is padded.
            object_queries: (B, N, D), o_q, with any N; None: the model's own, the same for every image.

        Returns:
            f (L, B, N, D), decoder states after the final norm; of ConditionalDETR also s (B, N, 2), reference points
            before the sigmoid. ``predict`` takes them.
        """
        o_q = self.object_queries.weight.repeat(memory.shape[0], 1, 1) if object_queries is None else object_queries
        return self.decoder(o_q, memory, positions, None if padding is None else padding.flatten(1))

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
    def from_pretrained(cls: type[Network], name: str | Path, **options: Any) -> Network:
        """Load a checkpoint of this architecture: see :func:`conditional_detr.checkpoints.loading.from_pretrained`."""
        from conditional_detr.checkpoints.loading import from_pretrained

        architecture = getattr(cls, "architecture", None)  # this class itself has none, and loads any
        return cast(Network, from_pretrained(name, architecture=architecture, **options))

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save in the published format: see :func:`conditional_detr.checkpoints.saving.save_pretrained`."""
        from conditional_detr.checkpoints.saving import save_pretrained

        save_pretrained(self, folder, **options)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload to the hub: see :func:`conditional_detr.checkpoints.hub.push_to_hub`."""
        from conditional_detr.checkpoints.hub import push_to_hub

        return push_to_hub(self, repository, **options)


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
