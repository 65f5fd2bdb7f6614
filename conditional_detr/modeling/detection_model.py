"""The interface that the network, its optimised copy and exported models share."""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from conditional_detr.modeling.config import Config
from conditional_detr.modeling.detection_transformer import AttentionMaps, Output
from conditional_detr.modeling.metadata import Metadata
from conditional_detr.modeling.scores import ClassScores


@runtime_checkable
class DetectionModel(Protocol):
    """A model that a Detector can run.

    Attributes:
        config: the architecture.
        metadata: class names, category ids and preprocessing.
        scores: how logits become scores of classes.
    """

    config: Config
    metadata: Metadata
    scores: ClassScores

    @property
    def device(self) -> torch.device:
        """The device that pixels must be on."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision that pixels must have."""

    def __call__(self, pixels: Tensor, padding: Tensor | None = None) -> Output:
        """Return logits (L, B, N, C) and boxes (L, B, N, 4) of normalised pixels (B, 3, H, W); L may be 1."""

    def attention_maps(
        self, pixels: Tensor, padding: Tensor | None = None, *, layers: Sequence[int] = (-1,)
    ) -> AttentionMaps:
        """Return the cross-attention maps, or raise ValueError if the model cannot compute them."""

    def weights_digest(self) -> str:
        """Return a SHA-256 of the weights, or of the files that hold them."""

    def modules(self) -> Iterator[nn.Module]:
        """Yield the modules whose training mode decides how the model computes."""
