"""DETR trains with its own loss, joins batches and query groups as ConditionalDETR does, and resumes."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from conditional_detr import DETR, HungarianMatcher, Metadata, SetLoss
from conditional_detr.data.dataset import collate
from conditional_detr.training.checkpoints import LAST, read_training_state
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.first_epoch import check_first_epoch
from conditional_detr.training.loop import train
from conditional_detr.training.query_groups import QueryGroups
from conditional_detr.training.record import initial_model
from conditional_detr.training.steps import Stepper
from helpers.models import assert_same
from helpers.reference import IDLE
from helpers.training_runs import SMALL, Rectangles, small_model, steps_of

ONE_STEP = TrainConfig(epochs=1, batch_size=4, workers=0, clip=0)


def small_detr(seed=0, **changes):
    torch.manual_seed(seed)
    return DETR(replace(SMALL, **changes), Metadata(("red", "blue")))


def without_boxes(data, index):
    data.samples[index] = (
        data.samples[index][0],
        {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    )
    return data


def test_the_first_loss_is_that_of_the_papers_criterion(tmp_path):
    model, data = small_detr(dropout=0.0), Rectangles(4)
    pixels, padding, targets = collate([data[i] for i in range(4)])
    expected = SetLoss.for_model(model)(model(pixels, padding), targets)["total"].item()
    train(model, data, Rectangles(3, seed=1), ONE_STEP, folder=tmp_path, progress=False)
    assert steps_of(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert_same(DETR.from_pretrained(tmp_path / "last"), model)


def test_the_criterion_of_the_other_architecture_is_refused(tmp_path):
    message = "criterion: expected a class loss for DETR, as SetLoss.for_model.model. has, got FocalLoss"
    with pytest.raises(ValueError, match=message):
        train(small_detr(), Rectangles(4), None, ONE_STEP, folder=tmp_path, criterion=SetLoss(), progress=False)
    criterion = SetLoss.for_model(small_detr())
    with pytest.raises(ValueError, match=r"expected a class loss for ConditionalDETR, .*, got SoftmaxLoss"):
        train(small_model(), Rectangles(4), None, ONE_STEP, folder=tmp_path, criterion=criterion, progress=False)


def test_accumulation_is_the_joined_batch():
    """Batches of different numbers of images and boxes, one without boxes."""
    data = without_boxes(Rectangles(5), 4)
    models, numbers = [], []
    for split in ([[0, 1, 2, 3, 4]], [[0, 1, 2], [3], [4]]):
        models.append(small_detr(dropout=0.0))
        stepper = Stepper(models[-1], ONE_STEP, SetLoss.for_model(models[-1]), Accelerator(), str)
        stepper.join_processes()
        group = [(indices, collate([data[i] for i in indices])) for indices in split]
        numbers.append([stepper.train_step(group, step=step, epochs=0.0) for step in range(2)])
    for joined, parts in zip(*numbers, strict=True):
        assert joined == pytest.approx(parts, rel=1e-5)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert IDLE.search(name) or (a - b).abs().max() < 1e-5, name  # AdamW moves those by the sign of rounding


@pytest.mark.parametrize("boxes", [True, False])
def test_query_groups_average_the_losses_of_models_with_each_groups_queries(boxes):
    data = Rectangles(2)
    samples = [data[i] for i in range(2)] if boxes else [without_boxes(data, i)[i] for i in range(2)]
    batch = collate(samples)
    model = small_detr(dropout=0.0)
    config = replace(ONE_STEP, query_groups=3)
    stepper = Stepper(model, config, SetLoss.for_model(model), Accelerator(), str)
    stepper.join_processes()
    groups = QueryGroups(model, 3, config.seed)
    rows = [model.object_queries.weight, *groups.others.weight.split(10)]
    each = []
    for queries in rows:
        one = small_detr(dropout=0.0)
        one.load_state_dict(model.state_dict() | {"object_queries.weight": queries.detach()})
        each.append(SetLoss.for_model(one)(one(*batch[:2]), batch[2])["total"].item())
    found = stepper.train_step([([0, 1], batch)], step=0, epochs=0.0)
    assert found["loss"] == pytest.approx(sum(each) / 3, rel=1e-5)


def test_a_resumed_run_is_a_detr_and_ends_at_the_same_weights(tmp_path):
    config = replace(ONE_STEP, epochs=2, lr=1e-3, clip=0.1, schedule="constant")
    whole, begun = small_detr(), small_detr()
    train(whole, Rectangles(8), None, config, folder=tmp_path / "whole", progress=False)
    train(begun, Rectangles(8), None, replace(config, epochs=1), folder=tmp_path / "two", progress=False)
    resumed = initial_model(read_training_state(tmp_path / "two"))
    assert type(resumed) is DETR
    train(resumed, Rectangles(8), None, config, folder=tmp_path / "two", resume=True, progress=False)
    assert_same(resumed, whole)
    assert read_training_state(tmp_path / "two")["settings"]["model"] == "detr"
    assert_same(DETR.from_pretrained(tmp_path / "two" / LAST), resumed)
    with pytest.raises(ValueError, match="model 'conditional_detr', not 'detr'"):
        train(small_model(), Rectangles(8), None, config, folder=tmp_path / "two", resume=True, progress=False)


def test_the_first_epochs_check_reads_the_softmax():
    """Scores are without "no object", which is the best of all in a network that detects nothing."""
    model = small_detr()
    with torch.no_grad():
        model.class_head.weight.zero_()
        model.class_head.bias.copy_(torch.tensor([0.0, 1.0, 8.0]))
    report = check_first_epoch(model, Rectangles(4), HungarianMatcher.for_model(model))
    assert report.top_score == pytest.approx(torch.tensor([0.0, 1.0, 8.0]).softmax(0)[1].item(), rel=1e-4)
    assert "scores" in report.advice
