"""Frozen parts and learning rates by depth, against numbers worked by hand."""

from dataclasses import replace

import pytest
import torch

from conditional_detr import DETR, Config
from conditional_detr.training import TrainConfig, train
from conditional_detr.training.checkpoints import STATE
from conditional_detr.training.parts import freeze, parameter_groups
from conditional_detr.training.query_groups import QueryGroups
from helpers.training_runs import Rectangles, small_model

SHORT = TrainConfig(epochs=1, batch_size=4, workers=0, clip=0)
QUIET = {"progress": False}


def rates_of(model, config, **others):
    """The learning rate of each parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config, **others)
    return {names.get(id(p), "others"): group["initial_lr"] for group in groups for p in group["params"]}


def test_rates_of_two_decoder_and_two_encoder_layers_by_hand():
    """Factor 1/2, lr 1, backbone 0.1: heads 1, decoder 1/2 and 1/4, encoder 1/8 and 1/16, projection 1/32."""
    model = small_model(encoder_layers=2)
    config = replace(SHORT, lr=1.0, backbone_lr=0.1, layer_decay=0.5)
    rates = rates_of(model, config, other_queries=QueryGroups(model, 2, 0).others)
    expected = {
        "class_head.": 1,
        "box_head.": 1,
        "decoder.norm.": 1,
        "decoder.reference_point.": 1,
        "decoder.transformation.": 1,
        "decoder.layers.1.": 1 / 2,
        "decoder.layers.0.": 1 / 4,
        "object_queries.": 1 / 4,
        "others": 1 / 4,
        "encoder.layers.1.": 1 / 8,
        "encoder.layers.0.": 1 / 16,
        "projection.": 1 / 32,
        "backbone.body.layer2.": 0.1,
        "backbone.body.layer1.": 0.05,
        "backbone.body.conv1.": 0.025,
    }
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, _ in model.named_parameters()} == (rates.keys() - {"others"}) | frozen
    for name, rate in rates.items():
        (value,) = (value for prefix, value in expected.items() if name.startswith(prefix))
        assert rate == pytest.approx(value, rel=1e-12), name
    unused = {prefix for prefix in expected if not any(name.startswith(prefix) for name in rates)}
    assert unused <= {"backbone.body.conv1.", "backbone.body.layer1."}  # frozen, as the authors do


def test_rates_are_the_two_of_the_paper_without_decay():
    rates = rates_of(small_model(), replace(SHORT, lr=1.0, backbone_lr=0.1))
    assert {name.split(".")[0]: rate for name, rate in rates.items() if rate != 1} == {"backbone": 0.1}


def test_rates_of_detr():
    sizes = {"width": 32, "heads": 4, "encoder_layers": 0, "decoder_layers": 3, "feedforward": 16}
    model = DETR(Config(num_classes=2, num_queries=5, backbone="resnet18", backbone_stage=2, **sizes))
    rates = rates_of(model, replace(SHORT, lr=1.0, layer_decay=0.5))
    assert rates["decoder.layers.0.cross_attention.query.weight"] == 1 / 8
    assert rates["projection.weight"] == 1 / 16


def test_layer_decay_scales_the_steps_of_adamw(tmp_path):
    """The first step of AdamW moves a weight by its learning rate, whatever the gradient is."""
    before, model = small_model(dropout=0.0), small_model(dropout=0.0)
    config = replace(SHORT, lr=1e-3, layer_decay=0.5, weight_decay=0, schedule="constant")
    train(model, Rectangles(4), None, config, folder=tmp_path, **QUIET)
    moved = {
        name: float((parameter - old).detach().abs().max())
        for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    assert moved["class_head.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["decoder.layers.1.feedforward_norm.weight"] == pytest.approx(5e-4, rel=1e-2)
    assert moved["decoder.layers.0.feedforward_norm.weight"] == pytest.approx(2.5e-4, rel=1e-2)
    assert moved["encoder.layers.0.feedforward_norm.weight"] == pytest.approx(1.25e-4, rel=1e-2)


def test_frozen_parts_stay_and_all_others_move(tmp_path):
    before, model = small_model(), small_model()
    config = replace(SHORT, freeze=("encoder", "decoder.layers.0", "object_queries"), query_groups=2)
    result = train(model, Rectangles(4), None, config, folder=tmp_path, **QUIET)
    fixed = ("encoder.", "decoder.layers.0.", "object_queries.")
    state, moved = before.state_dict(), set()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, state[name]):
            moved.add(name.split(".")[0] if not name.startswith("decoder.layers.") else name[:16])
        if not name.startswith("backbone."):
            assert parameter.requires_grad == (not name.startswith(fixed)), name
    assert moved - {"backbone"} == {"projection", "decoder.layers.1", "decoder", "class_head", "box_head"}
    queries = torch.load(result.last / STATE, weights_only=True)["other_queries"]["weight"]
    torch.testing.assert_close(queries, QueryGroups(small_model(), 2, 0).others.weight.data, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["encodr", "decoder.layers.7", "decoder.layer", "", "backbone."])
def test_parts_that_the_model_does_not_have(part):
    names = "backbone, projection, encoder, object_queries, decoder, class_head, box_head"
    with pytest.raises(ValueError, match=rf"freeze: expected parts of the model, such as {names} or .*, got '{part}'"):
        freeze(small_model(), (part,))


def test_all_parts_frozen_is_an_error(tmp_path):
    names = ("backbone", "projection", "encoder", "object_queries", "decoder", "class_head", "box_head")
    with pytest.raises(ValueError, match="expected trainable parameters, got none"):
        train(small_model(), Rectangles(4), None, replace(SHORT, freeze=names), folder=tmp_path, **QUIET)


def test_both_are_compared_on_resume(tmp_path):
    config = replace(SHORT, freeze=("encoder",), layer_decay=0.9, epochs=1, schedule="constant")
    train(small_model(), Rectangles(4), None, config, folder=tmp_path, **QUIET)
    for changes, message in (({"freeze": ()}, r"got freeze \(\), not"), ({"layer_decay": 1.0}, "got layer_decay 1.0")):
        with pytest.raises(ValueError, match=message):
            train(
                small_model(), Rectangles(4), None, replace(config, **changes), folder=tmp_path, resume=True, **QUIET
            )
    more = replace(config, epochs=2)
    assert train(small_model(), Rectangles(4), None, more, folder=tmp_path, resume=True, **QUIET).steps == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer_decay": 0}, ValueError, "layer_decay: expected a factor above 0, at most 1, got 0"),
        ({"layer_decay": 1.5}, ValueError, "layer_decay: expected a factor above 0, at most 1, got 1.5"),
        ({"freeze": "backbone"}, TypeError, "freeze: expected a tuple of names, got 'backbone'"),
    ],
)
def test_invalid_settings(changes, error, message):
    with pytest.raises(error, match=message):
        TrainConfig(**changes)
