"""The sizes of a network, validated."""

from dataclasses import dataclass

# limits that refuse a damaged or hostile description before anything is built
_MOST = {"num_classes": 10**6, "num_queries": 10**6, "width": 2**16, "feedforward": 10**6}
_MOST |= {"encoder_layers": 1000, "decoder_layers": 1000}


@dataclass(frozen=True)
class Config:
    """The sizes of a network and nothing else. The defaults are the published Conditional DETR with ResNet-50.

    Attributes:
        num_classes: C.
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
