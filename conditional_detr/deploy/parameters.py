"""Count the parameters of a model."""

from collections import Counter
from typing import NamedTuple

from conditional_detr.modeling.detection_transformer import DetectionTransformer

_HEADS = {"class_head", "box_head"}


class ParameterCounts(NamedTuple):
    """Numbers of parameters.

    Attributes:
        parts: parameters of each part, by its name in the model; "heads" is the sum of both heads.
        trainable: parameters that are not frozen, of all parts.
    """

    parts: dict[str, int]
    trainable: int


def count_parameters(model: DetectionTransformer) -> ParameterCounts:
    """Return the numbers of parameters of a plain model."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        parts["heads" if part in _HEADS else part] += parameter.numel()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ParameterCounts(dict(parts), trainable)
