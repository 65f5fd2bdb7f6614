"""Build the model that ``conditional-detr train`` starts from, as its options describe it."""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conditional_detr.cli.console import print_line

if TYPE_CHECKING:
    from conditional_detr.data.coco import Annotations
    from conditional_detr.modeling.conditional_detr import ConditionalDETR
    from conditional_detr.modeling.detection_transformer import DetectionTransformer
    from conditional_detr.modeling.detr import DETR

UNTRAINED = "none"
"""Value of ``--weights`` for a randomly initialised model."""


def make_model(
    data: "Annotations",
    weights: str | None,
    architecture: str,
    backbone_weights: Path | None,
    num_queries: int | None,
    seed: int,
) -> "DetectionTransformer":
    """Return the initial model: from weights, or randomly initialised."""
    import torch

    from conditional_detr.checkpoints.backbone_weights import load_backbone_weights
    from conditional_detr.checkpoints.loading import from_pretrained
    from conditional_detr.data.annotations import map_classes
    from conditional_detr.modeling.metadata import Metadata

    names, _ = map_classes(data, None)
    torch.manual_seed(seed)
    if weights is None:
        raise ValueError(
            "--weights: expected a checkpoint to start from: a folder, a file, a hub id, or none for random weights"
        )
    if weights != UNTRAINED:
        for name, value in (("architecture", architecture), ("backbone-weights", backbone_weights)):
            if value:
                raise ValueError(f"--{name}: expected none with --weights {weights}, got {str(value)!r}")
        return from_pretrained(weights, class_names=names, num_queries=num_queries)
    network, sizes = _read_architecture(architecture)
    queries = {} if num_queries is None else {"num_queries": num_queries}
    config = replace(network.default_config, **{**sizes, **queries, "num_classes": len(names)})
    model = network(config, Metadata(names))
    if backbone_weights is not None:
        report = load_backbone_weights(model, backbone_weights)
        unused = f", and {len(report.unused)} tensors that it does not have" if report.unused else ""
        print_line(f"{backbone_weights}: all {len(report.loaded)} tensors of the backbone{unused}")
    return model


def resumed_model(
    data: "Annotations",
    output: Path,
    weights: str | None,
    architecture: str,
    backbone_weights: Path | None,
    num_queries: int | None,
    seed: int,
) -> "DetectionTransformer | None":
    """Return the model of a run to resume, which then gets the weights of its training state; None: no such run.

    With --weights, that is the model that the run would begin with, so that train() compares its architecture.

    Raises:
        ValueError: --weights are not those that the run began with, or an option needs --weights.
    """
    from conditional_detr.checkpoints.loading import from_pretrained
    from conditional_detr.training.checkpoints import LAST, STATE, read_training_state
    from conditional_detr.training.record import initial_model

    state = read_training_state(output, mmap=True)
    if state is None:
        return None
    if weights is None:
        for name, value in (("architecture", architecture), ("backbone-weights", backbone_weights)):
            if value:
                raise ValueError(f"--{name}: expected --weights {UNTRAINED} with it, got {str(value)!r} alone")
        # a state of an earlier version does not have the metadata
        try:
            model = initial_model(state) if "category_ids" in state else from_pretrained(output / LAST)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # ValueErrors have the name that is wrong
            raise ValueError(f"{output / LAST / STATE}: expected a training state, got {error!r}") from error
        queries = model.config.num_queries
        if num_queries not in (None, queries):
            raise ValueError(f"--num-queries: expected {queries}, as the run in {output} has, got {num_queries}")
        return model
    model = make_model(data, weights, architecture, backbone_weights, num_queries, seed)
    settings, began = state["settings"], state.get("initial_weights")
    shape = {**settings["architecture"], "dropout": model.config.dropout}
    same_shape = settings["model"] == model.architecture and shape == asdict(model.config)
    same_shape = same_shape and tuple(settings["classes"]) == model.metadata.class_names
    if began is None:
        print_line(f"warning: {output / LAST / STATE}: does not record --weights, which could not be compared")
    elif same_shape and settings["seed"] == seed and model.weights_digest() != began:
        raise ValueError(
            f"--weights: expected the weights that the run in {output} began with, got others in {weights}; without"
            " --weights, --resume continues from its own"
        )
    return model


def with_dropout(model: "DetectionTransformer", dropout: float) -> "DetectionTransformer":
    """Return a copy of the model with another dropout."""
    from conditional_detr.modeling.architectures import plain_class

    other = plain_class(model)(replace(model.config, dropout=dropout), model.metadata)
    other.load_state_dict(model.state_dict())
    other.load_report = model.load_report
    return other


def _read_architecture(text: str) -> "tuple[type[ConditionalDETR] | type[DETR], dict[str, Any]]":
    """Read 'model=detr backbone=resnet18 num_queries=100': the network, and sizes as JSON, or else as text."""
    from conditional_detr.modeling.architectures import ARCHITECTURES
    from conditional_detr.modeling.config import Config

    found: dict[str, Any] = {"model": "conditional_detr"}
    known = ["model", *(f.name for f in fields(Config) if f.name != "num_classes")]
    for part in text.replace(",", " ").split():
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            raise ValueError(f"--architecture: expected name=value with a name of {', '.join(known)}, got {part!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    network = found.pop("model")
    if network not in [*ARCHITECTURES]:  # a list: the value may not be hashable
        raise ValueError(f"--architecture: expected model={' or model='.join(ARCHITECTURES)}, got {network!r}")
    return ARCHITECTURES[network], found
