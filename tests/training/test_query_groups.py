"""Query groups: each group is the model with other queries, and the loss is the mean over the groups."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from conditional_detr import ConditionalDETR, SetLoss
from conditional_detr.data.dataset import collate
from conditional_detr.training.loop import train
from conditional_detr.training.query_groups import QueryGroups
from conditional_detr.training.steps import Stepper
from helpers.training_runs import RESUMED, Rectangles, small_model, steps_of


@pytest.fixture
def grouped():
    """Three groups, two images of which one is padded, and their targets."""
    data = Rectangles(2)
    samples = [data[0], (data[1][0][:, :, :48], data[1][1])]
    return QueryGroups(small_model(), 3, seed=5).eval(), *collate(samples)


def models_of(groups):
    """Return a model for each group, with its queries."""
    queries = [groups.model.object_queries.weight, *groups.others.weight.chunk(2)]
    models = [copy.deepcopy(groups.model) for _ in queries]
    for model, own in zip(models, queries, strict=True):
        model.object_queries.weight.data.copy_(own)
    return models


def test_each_group_is_the_model_with_its_queries(grouped):
    groups, pixels, padding, _ = grouped
    assert padding is not None
    output = groups(pixels, padding)
    for i, model in enumerate(models_of(groups)):
        expected = model(pixels, padding)
        torch.testing.assert_close(output.logits[:, 2 * i : 2 * i + 2], expected.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.boxes[:, 2 * i : 2 * i + 2], expected.boxes, rtol=1e-5, atol=1e-6)
    assert (output.boxes[:, :2] - output.boxes[:, 2:4]).abs().max() > 0.01


def test_loss_and_gradients_are_the_means_of_the_groups(grouped):
    groups, pixels, padding, targets = grouped
    loss = SetLoss()(groups(pixels, padding), targets * 3)["total"]
    loss.backward()
    models = models_of(groups)
    losses = [SetLoss()(model(pixels, padding), targets)["total"] for model in models]
    torch.testing.assert_close(loss, sum(losses) / 3)
    for each in losses:
        each.backward()
    mean = sum(model.decoder.layers[0].feedforward.hidden.weight.grad for model in models) / 3
    torch.testing.assert_close(groups.model.decoder.layers[0].feedforward.hidden.weight.grad, mean)
    others = torch.cat([model.object_queries.weight.grad for model in models[1:]]) / 3
    torch.testing.assert_close(groups.others.weight.grad, others)


def test_a_batch_without_targets_counts_once_with_any_number_of_groups():
    """Its loss is the mean over the groups, also in an accumulated step."""
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    pixels, target = Rectangles(1)[0]
    losses = {}
    for groups in (1, 3):
        losses[groups] = []
        for batches in (1, 2):
            config = replace(RESUMED, query_groups=groups, workers=0)
            stepper = Stepper(small_model(dropout=0.0), config, SetLoss(), Accelerator(mixed_precision="no"), str)
            if stepper.grouped is not None:  # three groups of the same queries have the same loss
                stepper.grouped.others.weight.data = stepper.model.object_queries.weight.data.repeat(groups - 1, 1)
            stepper.join_processes()
            empty, other = (pixels.repeat(2, 1, 1, 1), None, [nothing] * 2), (pixels[None], None, [target])
            group = [([0, 1], empty), ([2], other)][:batches]
            losses[groups].append(stepper.train_step(group, step=0, epochs=0)["loss"])
    assert losses[3] == pytest.approx(losses[1], rel=1e-4)


def test_training_with_groups_does_not_change_the_architecture(tmp_path):
    """The additional queries are seeded and trained, and are not saved with the weights."""
    config = replace(RESUMED, query_groups=4, epochs=1, workers=0)
    model = small_model()
    result = train(model, Rectangles(11), None, config, folder=tmp_path / "a", progress=False)
    assert model.object_queries.weight.shape == (10, 32)
    assert ConditionalDETR.from_pretrained(result.last).config == model.config
    state = torch.load(result.last / "training_state.pt", weights_only=True)
    drawn = QueryGroups(small_model(), 4, seed=config.seed).others.weight
    assert state["other_queries"]["weight"].shape == drawn.shape == (30, 32)
    moved = (state["other_queries"]["weight"] - drawn).abs()
    assert 0 < moved.max() < 0.01  # three steps of at most 1e-3 each
    train(small_model(), Rectangles(11), None, config, folder=tmp_path / "b", progress=False)
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b")


def test_frozen_queries_do_not_change_in_any_group(tmp_path):
    model = small_model()
    model.object_queries.requires_grad_(False)
    config = replace(RESUMED, query_groups=2, epochs=1, workers=0)
    result = train(model, Rectangles(4), None, config, folder=tmp_path, progress=False)
    state = torch.load(result.last / "training_state.pt", weights_only=True)
    drawn = QueryGroups(small_model(), 2, seed=config.seed).others.weight
    assert torch.equal(state["other_queries"]["weight"], drawn)
    assert not QueryGroups(model, 2, seed=0).others.weight.requires_grad


def test_the_message_of_a_wrong_target_has_its_index_in_the_batch(tmp_path):
    data = Rectangles(4)
    data.samples[2][1]["labels"][0] = 7
    config = replace(RESUMED, query_groups=3, batch_size=4, accumulation=1, workers=0)
    with pytest.raises(ValueError, match=r'targets\[[0-3]\]\["labels"\]\[0\].*images\[3\] is image'):
        train(small_model(), data, None, config, folder=tmp_path, progress=False)
