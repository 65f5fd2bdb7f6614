"""The architectures of this library, by name."""

from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.detr import DETR

ARCHITECTURES: dict[str, type[ConditionalDETR] | type[DETR]] = {
    network.architecture: network for network in (ConditionalDETR, DETR)
}


def plain_class(model: DetectionTransformer) -> type[ConditionalDETR] | type[DETR]:
    """Return the class of this library that a model is of, also if it is of a subclass or an optimised copy."""
    return ARCHITECTURES[model.architecture]
