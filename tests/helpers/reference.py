"""transformers' outputs at every decoder layer, as this library's Output."""

import re

import torch
from torch import Tensor

from conditional_detr import Output

# Parameters without effect. Softmax cancels a constant added to all scores of a query, so key biases have no effect.
# The content of the first decoder layer is zero, so that all values equal the value's bias for any attention weights.
_FIRST = r"decoder\.layers\.0\.self_attention"
IDLE = re.compile(
    r"(self_attention|cross_attention)\.(\w+_)?key\.bias"
    rf"|{_FIRST}\.(\w+_)?(query|key)\.|{_FIRST}\.value\.weight"
)


@torch.no_grad()
def transformers_output(model, pixels: Tensor, padding: Tensor) -> Output:
    """Run transformers and apply its heads to the states of every decoder layer, as its loss does."""
    outputs = model.model(pixels, pixel_mask=(~padding).long(), output_hidden_states=True)
    *between, last = outputs.decoder_hidden_states[1:]  # only the last is normalised
    states = torch.stack([*map(model.model.decoder.layernorm, between), last])
    boxes = model.bbox_predictor(states)
    if model.config.model_type == "conditional_detr":
        points = outputs.reference_points.transpose(0, 1)  # (B, N, 2)
        boxes[..., :2] += torch.log(points.clamp(min=1e-5) / (1 - points).clamp(min=1e-5))
    return Output(model.class_labels_classifier(states), boxes.sigmoid())


def distance(a: Output, b: Output) -> tuple[float, float]:
    """Return the largest absolute difference of logits and of boxes."""
    return tuple((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def rounding(model, pixels: Tensor, padding: Tensor) -> tuple[float, float]:
    """Return the distance of transformers in float32 from float64, of logits and of boxes."""
    single = transformers_output(model, pixels, padding)
    double = transformers_output(model.double(), pixels.double(), padding)
    model.float()
    return distance(single, double)
