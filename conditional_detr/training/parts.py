"""Parts of a model in training: which are frozen, and how the learning rate falls from the heads to the input."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.training.config import TrainConfig

_BACKBONE = "backbone"


def freeze(model: DetectionTransformer, parts: Sequence[str]) -> None:
    """Set ``requires_grad`` of the parameters of some parts to False.

    Args:
        model: the model.
        parts: names of modules or parameters, such as "backbone", "encoder" or "decoder.layers.0".

    Raises:
        ValueError: the model has no such part, or nothing in it has parameters.
    """
    for part in parts:
        inside = [p for name, p in model.named_parameters() if name == part or name.startswith(f"{part}.")]
        if not inside:
            names = ", ".join(name for name, child in model.named_children() if any(True for _ in child.parameters()))
            raise ValueError(f"freeze: expected parts of the model, such as {names} or decoder.layers.0, got {part!r}")
        for parameter in inside:
            parameter.requires_grad_(False)


def parameter_groups(
    model: DetectionTransformer, config: TrainConfig, other_queries: nn.Embedding | None = None
) -> list[dict[str, Any]]:
    """Return the parameter groups of the optimizer: trainable parameters by learning rate, the backbone's last.

    The rate of a part is ``lr``, or the backbone's ``backbone_lr``, times layer_decay to the power of its depth.

    Args:
        model: the model.
        config: the settings.
        other_queries: object queries of additional groups, see QueryGroups.

    Raises:
        ValueError: no parameter is trainable.
    """
    depths = dict(_depths(model)) if config.layer_decay < 1 else {}
    groups: dict[tuple[bool, int], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith(f"{_BACKBONE}."), depths.get(name, 0))
            groups.setdefault(key, []).append(parameter)
    if other_queries is not None and other_queries.weight.requires_grad:
        groups.setdefault((False, depths.get("object_queries.weight", 0)), []).append(other_queries.weight)
    if not groups:
        raise ValueError("model: expected trainable parameters, got none with requires_grad")
    filled = []
    for (of_backbone, depth), parameters in sorted(groups.items(), key=lambda item: item[0]):
        rate = (config.backbone_lr if of_backbone else config.lr) * config.layer_decay**depth
        filled.append({"params": parameters, "lr": rate, "initial_lr": rate})
    return filled


def _depths(model: DetectionTransformer) -> Iterator[tuple[str, int]]:
    """Yield the depth of each parameter: layers between it and the heads; in the backbone, stages after its own.

    Heads, and what all decoder layers share, have 0. Of L decoder and E encoder layers, the last decoder layer has 1,
    the first one and the object queries L, the last encoder layer L + 1, the first one L + E, the projection
    L + E + 1. In the backbone, which has a rate of its own, the last stage has 0 again.
    """
    decoder, encoder = len(model.decoder.layers), len(model.encoder.layers)
    stages = [name for name, child in model.backbone.body.named_children() if any(True for _ in child.parameters())]
    for name, _ in model.named_parameters():
        part, *inner = name.split(".")
        if part == _BACKBONE:
            yield name, len(stages) - 1 - stages.index(inner[1])
        elif part in ("decoder", "encoder") and inner[0] == "layers":
            yield name, decoder - int(inner[1]) + (encoder if part == "encoder" else 0)
        else:
            yield name, {"object_queries": decoder, "projection": decoder + encoder + 1}.get(part, 0)
