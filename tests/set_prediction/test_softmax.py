"""DETR's loss and matching, with a softmax over the classes and "no object", against transformers' and PyTorch's."""

import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conditional_detr import DETR, ConditionalDETR, HungarianMatcher, Output, SetLoss
from conditional_detr.benchmark.timing import torch_threads
from conditional_detr.set_prediction.class_losses import FocalLoss, SoftmaxLoss
from conditional_detr.set_prediction.losses import Normalisers
from conditional_detr.set_prediction.targets import validate_targets
from helpers.models import TINY_CONFIG
from helpers.set_prediction import (
    OnDevice,
    assert_same_pairs,
    predictions,
    targets_of,
    transformers_softmax_losses,
    transformers_softmax_pairs,
)

LOSSES = ("class", "l1", "giou")
MATCHER = HungarianMatcher(1, 5, 2, SoftmaxLoss())
CRITERION = SetLoss(1, 5, 2, SoftmaxLoss(), MATCHER)


def assert_close(found, expected, rtol):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def test_each_architecture_has_the_loss_and_costs_of_its_paper():
    ours, baseline = ConditionalDETR(TINY_CONFIG), DETR(TINY_CONFIG)
    assert SetLoss.for_model(baseline) == CRITERION
    assert HungarianMatcher.for_model(baseline) == MATCHER
    assert SetLoss.for_model(ours) == SetLoss(
        2, 5, 2, FocalLoss(0.25, 2), HungarianMatcher(2, 5, 2, FocalLoss(0.25, 2))
    )
    assert HungarianMatcher.for_model(ours) == HungarianMatcher()


@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0, 0, 0), (20, 25, 40, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_transformers_at_every_layer(counts, seed):
    """Losses, gradients and assignments; images without targets, and with more targets than the 20 queries."""
    output, targets = predictions(C=8, seed=seed), targets_of(counts, seed=seed)
    total, expected = transformers_softmax_losses(output, targets)
    losses = CRITERION(output, targets)
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["total"], total, rtol=1e-5, atol=0)
    gradients = (torch.autograd.grad(loss, output) for loss in (losses["total"], total))
    for found, wanted in zip(*gradients, strict=True):
        assert_close(found, wanted, rtol=1e-5)
    assert_same_pairs(MATCHER(*output, targets), transformers_softmax_pairs(output, targets))


@pytest.mark.parametrize("no_object", [0.1, 0.7, 0.0, 3])
def test_the_class_loss_is_pytorchs_weighted_mean(no_object):
    output, targets = predictions(L=2, C=8), targets_of([3, 0, 5, 30])
    criterion = replace(CRITERION, class_loss=SoftmaxLoss(no_object))
    expected = []
    for logits, pairs in zip(output.logits, criterion.matcher(*output, targets), strict=True):
        classes = torch.full((4, 20), 7)
        for image, (queries, indices) in enumerate(pairs):
            classes[image, queries] = targets[image]["labels"][indices]
        weight = torch.tensor([1.0] * 7 + [no_object])
        expected.append(F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight))
    torch.testing.assert_close(criterion(output, targets)["class"], torch.stack(expected), rtol=1e-5, atol=0)


def test_without_weights_and_targets_the_class_loss_is_zero():
    criterion = replace(CRITERION, class_loss=SoftmaxLoss(0))
    assert criterion(predictions(C=8), targets_of([0] * 4))["class"].tolist() == [0, 0, 0]


def test_cost_by_hand():
    """Scores 1/6, 2/6, 3/6 of two classes and "no object": the class costs minus its score."""
    logits = torch.tensor([1.0, 2.0, 3.0]).log().view(1, 1, 1, 3) + 100
    targets = [{"labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]] * 2)}]
    boxes = torch.full((1, 1, 1, 4), 0.5)
    cost = HungarianMatcher(1, 0, 0, SoftmaxLoss()).cost(logits, boxes, validate_targets(targets, 1, 2))
    torch.testing.assert_close(cost.flatten(), torch.tensor([-2 / 6, -1 / 6]), rtol=1e-6, atol=1e-6)


def test_gradients_equal_finite_differences():
    output = predictions(L=2, B=3, N=4, C=3, dtype=torch.float64)
    targets = targets_of([2, 0, 6], C=2, dtype=torch.float64)
    losses = lambda *x: tuple(CRITERION(Output(*x), targets)[name] for name in (*LOSSES, "total"))  # noqa: E731
    torch.autograd.gradcheck(losses, tuple(output), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_extreme_logits_have_finite_losses_and_gradients():
    logits = torch.tensor([[-3e4, 3e4, 0.0], [3e4, 0.0, -3e4]]).view(1, 1, 2, 3).requires_grad_()
    boxes = torch.full((1, 1, 2, 4), 0.5, requires_grad=True)
    losses = CRITERION(Output(logits, boxes), targets_of([2], C=2))
    assert all(value.isfinite().all() for value in losses.values())
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses["total"], (logits, boxes)))


def test_no_object_is_not_a_label():
    with pytest.raises(ValueError, match=r'"labels"\]\[0\]: expected 0\.\.6, got label 7 with 7 classes'):
        CRITERION(predictions(B=1, C=8), [{"labels": torch.tensor([7]), "boxes": torch.full((1, 4), 0.5)}])


@pytest.mark.parametrize("criterion", [CRITERION, SetLoss()], ids=["softmax", "focal"])
def test_losses_of_the_parts_of_a_batch_add_up_to_those_of_the_batch(criterion):
    output, targets = predictions(C=8), targets_of([3, 0, 25, 0])
    whole = criterion(output, targets)
    normalisers = criterion.normalisers_of([3, 0, 25, 0], 20, torch.device("cpu"))
    assert normalisers.boxes == 28
    parts = [
        replace(criterion, normalisers=normalisers)(Output(*(x[:, part] for x in output)), targets[part])
        for part in (slice(0, 1), slice(1, 4))
    ]
    for name in (*LOSSES, "total"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-5, atol=0)


def test_normalisers_by_hand():
    """Two images of 20 queries with 3 and 25 targets: 23 matched queries of weight 1, and 17 of weight 0.1."""
    found = CRITERION.normalisers_of([3, 25], 20, torch.device("cpu"))
    assert found == Normalisers(pytest.approx(23 + 1.7), 28)
    assert SetLoss().normalisers_of([0, 0], 20, torch.device("cpu")) == Normalisers(1, 1)


def in_one_of_two_processes(rank, folder):
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    share = (slice(0, 3), slice(3, 4))[rank]
    output = Output(*(x[:, share].detach() for x in predictions(C=8)))
    losses = CRITERION(output, targets_of([3, 0, 5, 1])[share])
    torch.save(losses, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_losses_of_two_processes_average_to_those_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(in_one_of_two_processes, (str(tmp_path),), nprocs=2)
    expected = CRITERION(predictions(C=8), targets_of([3, 0, 5, 1]))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in (*LOSSES, "total"):
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(mean, expected[name].detach(), rtol=1e-5, atol=0)


def test_one_copy_to_the_host_a_step():
    output, targets = predictions(C=8), targets_of([3, 0, 5, 1])
    OnDevice.copies = 0
    CRITERION(Output(*(x.as_subclass(OnDevice) for x in output)), targets)["total"].backward()
    assert OnDevice.copies == 1


def test_at_least_three_times_as_fast_as_transformers():
    """CPU time of forward and backward at COCO's size, in turn; the minimum, because other work slows runs down."""
    output, targets = predictions(L=6, B=8, N=100, C=92), targets_of([7] * 8, C=91)

    def seconds(work):
        output.logits.grad = output.boxes.grad = None
        start = time.process_time()
        work().backward()
        return time.process_time() - start

    with torch_threads(1):  # CPU time includes that of threads that wait
        works = (lambda: CRITERION(output, targets)["total"], lambda: transformers_softmax_losses(output, targets)[0])
        rounds = [[seconds(work) for work in works] for _ in range(8)]
    ratio = min(slow for _, slow in rounds) / min(fast for fast, _ in rounds)
    assert ratio >= 3, f"{ratio:.2f} times as fast"
