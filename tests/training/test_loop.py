"""The training loop: convergence, hand-worked and PyTorch's own numbers, several processes, errors."""

import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from conditional_detr import ConditionalDETR, Config, HungarianMatcher, SetLoss
from conditional_detr.data.dataset import collate
from conditional_detr.training import loader
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.curves import read_log
from conditional_detr.training.first_epoch import check_first_epoch
from conditional_detr.training.loader import BatchLoader
from conditional_detr.training.loop import train
from conditional_detr.training.optimizer import (
    folded_batch_norm,
    gradient_checkpointing,
    linear_as_convolution,
    moving_average,
    rate_factor,
)
from conditional_detr.training.parts import parameter_groups
from conditional_detr.training.steps import Stepper
from conditional_detr.training.validation import measure
from helpers import training_runs
from helpers.models import assert_same
from helpers.training_runs import Rectangles, five_steps, small_model, steps_of

ONE_STEP = TrainConfig(epochs=1, batch_size=4, workers=0)


def run(model, data, val=None, config=ONE_STEP, *, folder, **options):
    return train(model, data, val, config, folder=folder, progress=False, **options)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A detector overfitted to four images: 180 steps from random weights."""
    config = TrainConfig(
        **{"epochs": 3, "batch_size": 4, "lr": 2e-3, "backbone_lr": 2e-3, "clip": 1.0, "warmup": 10},
        **{"schedule": "cosine", "ema": 0.9, "workers": 0},
    )
    folder = tmp_path_factory.mktemp("learned")
    model = small_model(width=64, feedforward=128, dropout=0.0)
    data = Rectangles(4, times=60)
    return model, run(model, data, Rectangles(4), config, folder=folder), data


# ---- learning


def test_overfits_four_images(learned):
    _, result, _ = learned
    losses = [entry["loss"] for entry in steps_of(result.folder)]
    assert len(losses) == result.steps == 180
    assert losses[0] > 8
    assert losses[-1] < 1.5
    assert result.best_ap > 0.7
    assert result.history[-1]["AP50"] > 0.85
    assert [entry["epoch"] for entry in result.history] == [0, 1, 2]
    best = ConditionalDETR.from_pretrained(result.best)
    assert measure(best, Rectangles(4), 4, SetLoss())["AP"] == pytest.approx(result.best_ap, abs=0.02)
    assert best.metadata.class_names == ("red", "blue")
    assert {path.name for path in result.folder.iterdir()} == {
        ".conditional_detr.lock",
        "best",
        "last",
        "log.jsonl",
        "curves.png",
        "tensorboard",
    }


def test_the_model_has_the_weights_saved_last(learned):
    model, result, _ = learned
    assert_same(model, ConditionalDETR.from_pretrained(result.last))
    assert not model.training


def test_tensorboard_has_losses_and_ap(learned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, result, _ = learned
    events = EventAccumulator(str(result.folder / "tensorboard")).Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 181))
    assert losses[7].value == pytest.approx(steps_of(result.folder)[7]["loss"], rel=1e-6)
    assert [event.value for event in events.Scalars("val/AP")] == pytest.approx([e["AP"] for e in result.history])


def test_fine_tuning_with_other_classes_starts_at_a_low_loss(learned, tmp_path):
    """Boxes are learned, one class is kept, two are new: each layer's loss is low, new rows are at the prior."""
    _, result, _ = learned
    model = ConditionalDETR.from_pretrained(result.best, class_names=["green", "blue", "violet"])
    run(model, Rectangles(4), folder=tmp_path)
    (first,) = steps_of(tmp_path)
    assert first["loss"] < 10
    assert first["class"] < 2
    layers = 6 / model.config.decoder_layers
    assert first["loss"] * layers < 20  # of as many layers as the published model has


def test_starts_below_20_with_all_classes_new_and_the_published_sizes():
    """With 300 queries and 91 classes at the prior, unmatched queries add little to the loss of any layer.

    The targets are boxes that the untrained model predicts: a trained one predicts nearly the targets' boxes.
    """
    torch.manual_seed(0)
    model = ConditionalDETR(Config(width=64, heads=4, feedforward=64, backbone="resnet18", dropout=0.0)).eval()
    output = model(torch.randn(1, 3, 64, 64))
    boxes = output.boxes[-1, 0].detach()  # half the image wide and high
    boxes = boxes[((boxes[:, :2] > 0.25) & (boxes[:, :2] < 0.75)).all(1)][:7]
    targets = [{"labels": torch.tensor([1, 1, 44, 90, 3, 3, 17]), "boxes": boxes}]
    total = SetLoss()(output, targets)["total"].item()
    assert 5 < total < 20


# ---- check of the first epoch


def test_the_check_distinguishes_trained_and_untrained_models(learned):
    model, result, data = learned
    report = check_first_epoch(model, data, HungarianMatcher(), 0.8)
    assert (report.images, report.targets) == (64, 16 * sum(len(t["labels"]) for _, t in Rectangles(4).samples))
    assert report.matched > 0.9
    assert report.best_iou > 0.8
    assert report.right_class > 0.9
    assert report.top_score > 0.5
    assert report.advice == "No problem found."
    assert "the validation AP is 0" in check_first_epoch(model, data, HungarianMatcher(), 0.0).advice
    new = check_first_epoch(small_model(), data, HungarianMatcher(), 0.0)
    assert new.top_score < 0.05
    assert "scores" in new.advice
    assert result.first_epoch.images == 64
    assert str(new).startswith("after the first epoch, on 64 training images with ")


def test_the_check_finds_wrong_labels_and_wrong_boxes(learned):
    model, _, _ = learned
    swapped, moved, empty = Rectangles(4), Rectangles(4), Rectangles(1)
    for i in range(4):
        swapped.samples[i][1]["labels"] = 1 - swapped.samples[i][1]["labels"]
        moved.samples[i][1]["boxes"] = moved.samples[i][1]["boxes"] * 0.1 + torch.tensor([0.01, 0.8, 0, 0])
    empty.samples[0] = (empty.samples[0][0], {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)})
    reports = [check_first_epoch(model, data, HungarianMatcher()) for data in (swapped, moved, empty)]
    assert reports[0].right_class < 0.5
    assert reports[0].advice.startswith("Boxes are right, classes are not")
    assert reports[1].advice.startswith("Scores rise, but boxes miss the targets")
    assert reports[2].advice.startswith("The images have no targets")
    assert (reports[2].targets, reports[2].matched) == (0, 0.0)


def test_the_check_by_hand():
    """Two targets, two queries, one of them right: half is matched, the other's best IoU is 1/3."""

    class Fixed(ConditionalDETR):
        def forward(self, pixels, padding=None):
            logits = torch.tensor([[[[2.0, -9.0], [-9.0, -9.0]]]])
            return logits, torch.tensor([[[[0.2, 0.2, 0.2, 0.2], [0.7, 0.5, 0.2, 0.2]]]])

    target = {"labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.8, 0.5, 0.2, 0.2]])}
    torch.manual_seed(0)
    fixed = Fixed(replace(small_model().config, num_queries=2))
    fixed.forward = lambda pixels, padding=None: _Output(*Fixed.forward(fixed, pixels))
    report = check_first_epoch(fixed, [(torch.zeros(3, 64, 64), target)], HungarianMatcher())
    assert (report.matched, report.right_class) == (0.5, 1.0)
    assert report.best_iou == pytest.approx((1 + 1 / 3) / 2)
    assert report.top_score == pytest.approx(1 / (1 + math.exp(-2)))


class _Output(tuple):
    def __new__(cls, logits, boxes):
        return super().__new__(cls, (logits, boxes))

    logits = property(lambda self: self[0])
    boxes = property(lambda self: self[1])


# ---- rates, groups, clipping, average


def test_rates_by_hand():
    cosine = TrainConfig(epochs=10, warmup=4, schedule="cosine")
    assert [rate_factor(cosine, step, 0.0) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert rate_factor(cosine, 99, 5.0) == pytest.approx(0.5)
    assert rate_factor(cosine, 99, 2.5) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert rate_factor(cosine, 99, 10.0) == 0
    step = TrainConfig(epochs=50)
    assert [rate_factor(step, 99, epoch) for epoch in (0.0, 39.99, 40.0, 49.9)] == [1, 1, 0.1, 0.1]
    assert rate_factor(TrainConfig(schedule="constant"), 0, 49) == 1


def test_cosine_is_torchs():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for epoch in range(10):
        assert rate_factor(TrainConfig(epochs=10, schedule="cosine"), 0, epoch) == pytest.approx(
            theirs.get_last_lr()[0]
        )
        optimizer.step()
        theirs.step()


def test_rates_in_the_log(tmp_path):
    """Two epochs of two steps: warm-up over 2, then a tenth from the second epoch on."""
    config = TrainConfig(epochs=2, batch_size=2, lr=1e-3, warmup=2, drop_at=0.5, workers=0)
    run(small_model(), Rectangles(4), config=config, folder=tmp_path)
    assert [entry["lr"] for entry in steps_of(tmp_path)] == pytest.approx([5e-4, 1e-3, 1e-4, 1e-4])
    run(small_model(), Rectangles(4), config=replace(config, warmup=0, schedule="cosine"), folder=tmp_path / "cosine")
    falling = [1e-3 * (1 + math.cos(math.pi * quarter / 4)) / 2 for quarter in range(4)]
    assert [entry["lr"] for entry in steps_of(tmp_path / "cosine")] == pytest.approx(falling)


def test_every_trainable_parameter_is_in_one_group_with_its_rate():
    model = small_model()
    others, backbone = parameter_groups(model, TrainConfig(lr=3e-4, backbone_lr=2e-5))
    assert (others["lr"], backbone["lr"]) == (3e-4, 2e-5)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    grouped = [id(p) for group in (others, backbone) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trained
    assert {id(p) for p in backbone["params"]} == {id(p) for p in model.backbone.parameters()} & trained
    assert backbone["params"]
    with pytest.raises(ValueError, match="expected trainable parameters, got none with requires_grad"):
        parameter_groups(model.requires_grad_(False), TrainConfig())


def test_one_step_is_adamws_on_clipped_gradients(tmp_path):
    """Compared with AdamW by hand: the joined loss, the norm clipped to 0.1, two rates, weight decay."""
    data = Rectangles(4)
    model, other = small_model(dropout=0.0), small_model(dropout=0.0).train()
    config = replace(ONE_STEP, lr=1e-2, backbone_lr=1e-3, weight_decay=0.3, clip=0.1)
    run(model, data, config=config, folder=tmp_path)
    (logged,) = steps_of(tmp_path)
    order = torch.stack([pixels for pixels, _ in data.samples])
    loss = SetLoss()(other(order), [target for _, target in data.samples])
    loss["total"].backward()
    trained = [p for p in other.parameters() if p.requires_grad]
    norm = torch.cat([p.grad.flatten() for p in trained]).norm()
    assert logged["loss"] == pytest.approx(loss["total"].item(), rel=1e-5)
    assert [logged[name] for name in ("class", "l1", "giou")] == pytest.approx(
        [loss[name][-1].item() for name in ("class", "l1", "giou")], rel=1e-5
    )
    assert logged["norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 1
    for (name, updated), before in zip(model.named_parameters(), other.parameters(), strict=True):
        if not before.requires_grad:
            assert torch.equal(updated, before), name
            continue
        rate = 1e-3 if name.startswith("backbone") else 1e-2
        gradient = before.grad * 0.1 / norm
        expected = before * (1 - rate * 0.3) - rate * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-6  # elsewhere rounding decides on the sign
        torch.testing.assert_close(updated[clear], expected[clear], rtol=1e-4, atol=rate * 1e-2)


def test_average_by_hand():
    """The first update copies the weights; then the decay is 2/11, 3/12 and so on, at most the given one."""
    model = small_model()
    with torch.no_grad():
        model.class_head.bias.fill_(0.0)
        average = moving_average(model, 0.2)
        expected = 0.0
        average.update_parameters(model)
        for step, decay in enumerate((2 / 11, 0.2, 0.2), start=1):
            model.class_head.bias.fill_(float(step))
            average.update_parameters(model)
            expected = decay * expected + (1 - decay) * step
            torch.testing.assert_close(average.module.class_head.bias, torch.full((2,), expected))
    assert not any(p.requires_grad for p in average.parameters())


def test_the_average_is_evaluated_and_saved(tmp_path):
    """With a decay near 1 and few steps, the average differs from the last weights."""
    config = TrainConfig(epochs=1, batch_size=2, lr=1e-2, ema=0.999, workers=0)
    result = run(small_model(), Rectangles(6), config=config, folder=tmp_path)
    state = torch.load(result.last / "training_state.pt", weights_only=True)
    saved = ConditionalDETR.from_pretrained(result.last).state_dict()
    assert all(torch.equal(saved[name], state["average"][f"module.{name}"]) for name in saved)
    assert not torch.equal(saved["box_head.layers.0.weight"], state["model"]["box_head.layers.0.weight"])


def test_frozen_parts_stay(tmp_path):
    model = small_model()
    for part in (model.encoder, model.class_head):
        part.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = TrainConfig(epochs=2, batch_size=2, lr=1e-2, backbone_lr=0, weight_decay=0.5, workers=0)
    run(model, Rectangles(4), config=config, folder=tmp_path)
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    changed = {
        name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"projection", "object_queries", "decoder", "box_head"}


def test_accumulation_is_the_joined_batch():
    """Batches with different numbers of boxes, one without: each is weighted by its share."""
    data = Rectangles(5)
    data.samples[4] = (data.samples[4][0], {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)})
    models, numbers = [], []
    for split in ([[0, 1, 2, 3, 4]], [[0, 1, 2], [3], [4]]):
        models.append(small_model(dropout=0.0))
        stepper = Stepper(models[-1], ONE_STEP, SetLoss(), Accelerator(), str)
        stepper.join_processes()
        group = [(indices, collate([data[i] for i in indices])) for indices in split]
        numbers.append([stepper.train_step(group, step=step, epochs=0.0) for step in range(2)])
    for joined, parts in zip(*numbers, strict=True):
        assert joined == pytest.approx(parts, rel=1e-5)
    _assert_same_weights(*models)


def _assert_same_run(folder, other, model, its):
    for a, b in zip(steps_of(folder), steps_of(other), strict=True):
        for name in ("loss", "class", "l1", "giou", "norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-5), name
    _assert_same_weights(model, its)


def _assert_same_weights(model, its):
    for (name, a), b in zip(model.state_dict().items(), its.state_dict().values(), strict=True):
        assert (a - b).abs().max() < 1e-5, name


@pytest.mark.parametrize(("backbone", "folded_norms"), [("resnet18", 15), ("resnet50", 43), ("vgg11_bn", 6)])
def test_folded_batch_norm_gives_the_same_loss_and_gradients(backbone, folded_norms):
    """For every trainable parameter; afterwards the backbone is unchanged."""
    model = small_model(backbone=backbone, backbone_stage=3, dropout=0.0).double().train()
    for module in model.backbone.modules():
        if hasattr(module, "running_var"):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    pixels, padding, targets = collate([Rectangles(2)[i] for i in range(2)])

    def gradients():
        model.zero_grad()
        loss = SetLoss()(model(pixels.double(), padding), targets)["total"]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    plain = gradients()
    with folded_batch_norm(model):
        changed = [m for m in model.backbone.modules() if "forward" in vars(m)]
        folded = gradients()
    assert len(changed) == 2 * folded_norms  # each convolution, and the norm behind it
    for a, b in zip(folded, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


def test_linear_as_convolution_gives_the_same_loss_and_gradients():
    """In float32 on a CPU; layers are unchanged in other precisions, and afterwards."""
    model = small_model(dropout=0.0).train()
    pixels, padding, targets = collate([Rectangles(2)[i] for i in range(2)])

    def gradients():
        model.zero_grad()
        loss = SetLoss()(model(pixels, padding), targets)["total"]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    def half():
        with torch.autocast("cpu", torch.bfloat16):
            return gradients()

    plain, plain_half = gradients(), half()
    with linear_as_convolution(model):
        with torch.profiler.profile() as profile:
            convolved = gradients()
        assert all(map(torch.equal, half(), plain_half))
        assert model.class_head(torch.zeros(0, model.config.width)).shape == (0, model.config.num_classes)
    calls = Counter(event.name for event in profile.events())
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert calls["aten::linear"] == 0
    assert calls["aten::conv2d"] >= linears
    for a, b in zip(convolved, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
    assert not any("forward" in vars(module) for module in model.modules())


def test_scaled_convolutions_store_no_scaled_weights():
    """Autograd stores no more for the backbone with folded BatchNorm than without."""
    model, kept = small_model(dropout=0.0).train(), []
    for manager in (nullcontext, lambda: folded_batch_norm(model)):
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with manager(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features, _ = model.backbone(torch.randn(1, 3, 64, 64))
        kept.append(sum(sizes.values()))
        del features
    assert kept[1] <= kept[0]


def test_folding_and_checkpointing_restore_all_modules():
    """Also where both replace the same modules, the convolutions of a VGG."""
    model = small_model(backbone="vgg11_bn", backbone_stage=2)
    with folded_batch_norm(model), gradient_checkpointing(model, True):
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradient_checkpointing_gives_the_same_numbers(tmp_path):
    """With dropout, which must be the same in both passes; afterwards the model is unchanged."""
    models = []
    for wanted in (False, True):
        model = small_model(dropout=0.3)
        config = TrainConfig(epochs=1, batch_size=2, workers=0, gradient_checkpointing=wanted)
        run(model, Rectangles(4), config=config, folder=tmp_path / str(wanted))
        models.append(model)
    assert steps_of(tmp_path / "True") == steps_of(tmp_path / "False")
    assert_same(*models)
    assert not any("forward" in vars(module) for module in models[1].modules())


def test_gradient_checkpointing_stores_less():
    """Bytes that autograd stores after the forward pass."""
    model, kept = small_model(dropout=0.0).train(), []
    for wanted in (False, True):
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with gradient_checkpointing(model, wanted), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            output = model(torch.randn(2, 3, 96, 96))
        kept.append(sum(sizes.values()))
        del output
    assert kept[1] < 0.8 * kept[0]


def test_autocast(tmp_path):
    """With bfloat16 the loss is close to that of float32, but not equal; weights stay float32."""
    for precision in (None, "bfloat16"):
        model = small_model(dropout=0.0)
        run(model, Rectangles(4), config=replace(ONE_STEP, autocast=precision), folder=tmp_path / str(precision))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    (exact,), (rounded,) = steps_of(tmp_path / "None"), steps_of(tmp_path / "bfloat16")
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.03)
    assert rounded["loss"] != exact["loss"]


def test_early_stopping(tmp_path, monkeypatch):
    """AP does not improve for two evaluations: the third epoch after the best one is not trained."""
    aps = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr("conditional_detr.training.run.measure", lambda *_: {"AP": next(aps), "AP50": 0.5})
    config = TrainConfig(epochs=5, batch_size=4, patience=2, workers=0)
    result = run(small_model(), Rectangles(4), Rectangles(2), config, folder=tmp_path)
    assert (result.best_ap, len(result.history), result.stopped_early) == (0.3, 4, True)
    again = run(small_model(), Rectangles(4), Rectangles(2), config, folder=tmp_path, resume=True)
    assert (again.best_ap, again.steps, again.stopped_early) == (0.3, 4, True)


def test_evaluates_every_second_epoch_and_at_the_end(tmp_path):
    config = TrainConfig(epochs=3, batch_size=4, evaluate_every=2, workers=0)
    result = run(small_model(), Rectangles(4), Rectangles(2), config, folder=tmp_path)
    assert ["AP" in entry for entry in result.history] == [False, True, True]


# ---- data


def test_global_generators_are_seeded_by_seed_epoch_and_index():
    """With any number of workers; the states of the main process's generators are restored."""
    data, config = Rectangles(5, noise=1.0), replace(ONE_STEP, seed=3)
    torch.manual_seed(7)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    def load(plan, epoch, workers):
        with BatchLoader(data, replace(config, workers=workers), parts=[data], pin=False, skip=None) as batches:
            return [(indices, pixels) for indices, (pixels, *_) in batches.load(plan, epoch, lambda *_: None)]

    plan = [[0, 1], [4]]
    one, two, other = (
        [pixels for _, pixels in load(plan, epoch, workers)] for workers, epoch in ((0, 2), (2, 2), (0, 3))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0][0], one[0][1])
    ((indices, last),) = load([[4]], 2, 0)
    assert indices == [4]
    assert torch.equal(last, one[1])


class Recorded(Rectangles):
    """Images that have the process that loads them and the epochs that it was told in their first pixels."""

    def __getitem__(self, index):
        pixels, target = super().__getitem__(index)
        pixels = pixels.clone()
        pixels[0, 0, :2] = torch.tensor([float(os.getpid()), float(self.epochs[-1])])
        return pixels, target


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_live_for_all_epochs_and_get_each(method):
    """The numbers are those without workers; the last epoch begins with its second batch."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    config, plan = replace(ONE_STEP, batch_size=2, seed=3), [[0, 1], [2, 3], [4, 5], [6]]
    try:
        pixels, children = {}, multiprocessing.active_children()
        for workers in (0, 2):
            data = Recorded(7, noise=1.0)
            options = {"parts": [data], "pin": False, "skip": None}
            with BatchLoader(data, replace(config, workers=workers), **options) as batches:
                loaded = [
                    [batch[0] for _, batch in batches.load(plan[epoch == 5 :], epoch, lambda *_: None)]
                    for epoch in (2, 3, 5)
                ]
            assert multiprocessing.active_children() == children
            assert data.epochs == [2, 3, 5]
            assert [{float(batch[0, 0, 0, 1]) for batch in epoch} for epoch in loaded] == [{2.0}, {3.0}, {5.0}]
            ids = [{float(batch[0, 0, 0, 0]) for batch in epoch} for epoch in loaded]
            assert ids == [ids[0]] * 3
            assert len(ids[0]) == max(workers, 1)
            pixels[workers] = [batch[:, :, 1:] for epoch in loaded for batch in epoch]
        assert len(pixels[0]) == 11
        assert all(torch.equal(a, b) for a, b in zip(pixels[0], pixels[2], strict=True))
    finally:
        multiprocessing.set_start_method(before, force=True)


class Slow(Rectangles):
    """Images that take 100 ms each."""

    def __getitem__(self, index):
        time.sleep(0.1)
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_model_that_waits_for_its_images(tmp_path, monkeypatch, workers):
    """The log has the rate of the input alone, and the first epoch that waits ends with what to do."""
    monkeypatch.setattr(loader, "_LONG_WAITING", 0.15)  # the first batch takes 0.2 s
    monkeypatch.setattr(loader, "_MUCH_WAITING", 0.0)  # steps may be slow
    config = TrainConfig(epochs=2, batch_size=2, workers=workers)
    with pytest.warns(UserWarning, match="the model waited for images for") as caught:
        run(small_model(), Slow(16), None, config, folder=tmp_path)
    (message,) = (str(one.message) for one in caught)
    assert f": {workers} workers load" in message
    entries = [entry for entry in read_log(tmp_path / "log.jsonl") if "mean_loss" in entry]
    for entry in entries:
        assert 0.15 < entry["waited"] <= entry["seconds"]
        assert 5 * max(workers, 1) < entry["images_per_second_loaded"] <= 10 * max(workers, 1)
    assert loader.InputTimes(100, 5.0, 9.0).rate(0) == loader.InputTimes(100, 10.0, 9.0).rate(2) == 20.0
    assert loader.InputTimes(100, 5.0, 0.1).explain(9.0, 2) == ""


def test_the_dataset_gets_each_epoch(tmp_path):
    data = Rectangles(4)
    run(small_model(), data, config=replace(ONE_STEP, epochs=2), folder=tmp_path)
    assert data.epochs == [0, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_stops_training_with_its_own_message(tmp_path, workers):
    class Broken(Rectangles):
        def __getitem__(self, index):
            if index == 2:
                raise FileNotFoundError("b.jpg: no such file")
            return super().__getitem__(index)

    with pytest.raises(OSError, match=r"^b\.jpg: no such file; there is no checkpoint yet$"):
        run(small_model(), Broken(4), config=replace(ONE_STEP, workers=workers), folder=tmp_path)


# ---- processes


def test_two_processes_train_like_one_with_the_joined_batch(tmp_path):
    """Five steps with different numbers of boxes: the same losses, norms, weights and AP."""
    script = Path(training_runs.__file__)
    # with --cpu, accelerate starts only one process
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, script, tmp_path / "two"]
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    model, result = five_steps(tmp_path / "one", batch_size=4)
    _assert_same_run(
        tmp_path / "one", tmp_path / "two", model, ConditionalDETR.from_pretrained(tmp_path / "two" / "last")
    )
    state = torch.load(tmp_path / "two" / "last" / "training_state.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert state["history"][0]["AP"] == pytest.approx(result.history[0]["AP"], abs=1e-3)
    assert state["settings"]["processes"] == 2


# ---- errors


def test_the_message_of_a_loss_that_is_not_finite_has_step_images_and_checkpoint(tmp_path):
    class Described(Rectangles):
        def describe(self, index):
            return f"{index}.jpg"

    class Exploding(SetLoss):
        def __call__(self, output, targets):
            losses = super().__call__(output, targets)
            return {**losses, "total": losses["total"] * (math.inf if calls.append(1) or len(calls) == 3 else 1)}

    calls = []
    config = TrainConfig(epochs=1, batch_size=2, save_every=1, workers=0)
    message = (
        r"^step 3: expected a finite loss, got inf; training diverged: lower the learning rate, clip gradients, or"
        r" warm up; images\[0\] is image \d, \d\.jpg, images\[1\] is image \d, \d\.jpg;"
        rf" the last good checkpoint is {tmp_path / 'last'}, of step 2$"
    )
    with pytest.raises(ValueError, match=message):
        run(small_model(), Described(8), config=config, folder=tmp_path, criterion=Exploding())
    assert torch.load(tmp_path / "last" / "training_state.pt", weights_only=True)["step"] == 2


def test_gradients_that_are_not_finite_do_not_reach_the_weights(tmp_path):
    class Steep(SetLoss):
        def __call__(self, output, targets):
            losses = super().__call__(output, targets)
            return {**losses, "total": losses["total"] + (output.boxes.sum() * 0).sqrt()}

    model = small_model()
    before = model.class_head.weight.clone()
    message = "step 1: expected a finite norm of the gradients, got nan; .*; there is no checkpoint yet$"
    with pytest.raises(ValueError, match=message):
        run(model, Rectangles(4), config=ONE_STEP, folder=tmp_path, criterion=Steep())
    assert torch.equal(model.class_head.weight, before)


def test_predictions_that_are_not_finite_and_invalid_targets(tmp_path):
    model = small_model()
    model.class_head.register_forward_hook(lambda head, inputs, logits: logits * math.nan)
    message = r"^step 1: images\[0\]: expected finite predictions .*; images\[0\] is image \d, images\[1\] is image"
    with pytest.raises(ValueError, match=message):
        run(model, Rectangles(4), folder=tmp_path)
    data = Rectangles(4)
    data.samples[2][1]["labels"][0] = 2
    message = r'^step 1: targets\[\d\]\["labels"\]\[0\]: expected 0..1, got label 2 with 2 classes.*; there is no'
    with pytest.raises(ValueError, match=message):
        run(small_model(), data, folder=tmp_path)


def test_arguments_of_the_wrong_type(tmp_path):
    with pytest.raises(TypeError, match="model: expected a ConditionalDETR or DETR, got Linear"):
        run(nn.Linear(1, 1), Rectangles(1), folder=tmp_path)
    with pytest.raises(TypeError, match="config: expected a TrainConfig, got dict"):
        run(small_model(), Rectangles(1), config={}, folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected an int, got 2.0"),
        ({"workers": True}, TypeError, "workers: expected an int, got True"),
        ({"lr": "1e-4"}, TypeError, "lr: expected a number, got '1e-4'"),
        ({"lr": math.nan}, ValueError, "lr: expected at least 0, got nan"),
        ({"clip": -1}, ValueError, "clip: expected at least 0, got -1"),
        ({"ema": 1.0}, ValueError, "ema: expected a decay below 1, got 1.0"),
        ({"drop_at": 40}, ValueError, "drop_at: expected a fraction of the epochs, at most 1, got 40"),
        ({"schedule": "linear"}, ValueError, "schedule: expected one of 'step', 'cosine', 'constant', got 'linear'"),
        ({"autocast": "fp16"}, ValueError, "autocast: expected one of None, 'bfloat16', 'float16', got 'fp16'"),
        ({"gradient_checkpointing": 1}, TypeError, "gradient_checkpointing: expected a bool, got 1"),
    ],
)
def test_settings_out_of_range(changes, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        TrainConfig(**changes)


def test_presets():
    """The paper's recipe is the default, except for the split of its 16 images a step."""
    paper = TrainConfig.from_scratch()
    assert (paper.epochs, paper.lr, paper.backbone_lr, paper.weight_decay, paper.clip) == (50, 1e-4, 1e-5, 1e-4, 0.1)
    assert (paper.schedule, paper.drop_at * paper.epochs, paper.batch_size * paper.accumulation) == ("step", 40, 16)
    for preset in (TrainConfig.finetune(), TrainConfig.finetune_small()):
        assert preset.ema > 0
        assert preset.patience > 0


def test_without_the_packages_for_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    message = r"^training needs accelerate, which is not installed: pip install 'conditional-detr\[train\]'$"
    with pytest.raises(ModuleNotFoundError, match=message):
        run(small_model(), Rectangles(1), folder=tmp_path)
