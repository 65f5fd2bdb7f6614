"""Losses against transformers', hand-worked cases and finite differences; processes, precisions, speed."""

import math
import re
import time

import pytest
import torch
from torch import nn

from conditional_detr import ConditionalDETR, HungarianMatcher, Output, SetLoss
from conditional_detr.benchmark.timing import torch_threads
from conditional_detr.inference.postprocessing import Postprocessing, postprocess
from conditional_detr.set_prediction.class_losses import FocalLoss, SoftmaxLoss
from conditional_detr.set_prediction.targets import copy_to_device
from helpers.models import two_images
from helpers.set_prediction import OnDevice, predictions, targets_of, transformers_losses

LOSSES = ("class", "l1", "giou")


def gradients(loss, output):
    return torch.autograd.grad(loss, output)


def assert_close(found, expected, rtol):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0, 0, 0), (20, 25, 40, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_transformers_at_every_layer(counts, seed):
    """Values and gradients; transformers' total ignores the class weight, so that it is 1 there and not 2."""
    output, targets = predictions(seed=seed), targets_of(counts, seed=seed)
    total, expected = transformers_losses(output, targets)
    losses = SetLoss()(output, targets)
    assert losses.keys() == {*LOSSES, "total"}
    for name in LOSSES:
        assert losses[name].shape == (3,)
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["total"], total + expected["class"].sum(), rtol=1e-5, atol=0)
    once = SetLoss(class_weight=1)(output, targets)["total"]
    torch.testing.assert_close(once, total, rtol=1e-5, atol=0)
    for found, wanted in zip(gradients(once, output), gradients(total, output), strict=True):
        assert_close(found, wanted, rtol=1e-5)


def test_equals_transformers_at_the_size_of_coco():
    output, targets = predictions(L=6, B=8, N=300, C=91), targets_of([7] * 8, C=91)
    _, expected = transformers_losses(output, targets)
    losses = SetLoss()(output, targets)
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)


def test_by_hand():
    """Two layers, one image, two queries, two classes, one target; the second layer matches the other query."""
    logits = torch.tensor([[[[0.0, math.log(3)], [0.0, -math.log(3)]]], [[[0.0, -math.log(3)], [0.0, math.log(3)]]]])
    near, far = [0.7, 0.5, 0.4, 0.2], [0.1, 0.1, 0.1, 0.1]
    boxes = torch.tensor([[[[0.5, 0.5, 0.4, 0.4], far]], [[far, near]]])
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([near])}]
    losses = SetLoss()(Output(logits, boxes), targets)
    log = math.log
    matched = 0.25 * 0.25**2 * -log(0.75)  # score 3/4 of the target's class
    others = 0.75 * (0.5**2 * -log(0.5) * 2 + 0.25**2 * -log(0.75))  # scores 1/2, 1/2, 1/4 of unmatched classes
    giou = 0.04 / 0.2 - (0.24 - 0.2) / 0.24
    for name, expected in {"class": [matched + others] * 2, "l1": [0.4, 0.0], "giou": [1 - giou, 0.0]}.items():
        torch.testing.assert_close(losses[name], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    expected = 2 * 2 * (matched + others) + 5 * 0.4 + 2 * (1 - giou)
    assert losses["total"].item() == pytest.approx(expected, rel=1e-6)


def test_gradients_of_every_loss_equal_finite_differences():
    """Each of the four, in float64; one image has more targets than queries, one has none."""
    output = predictions(L=2, B=3, N=4, C=2, dtype=torch.float64)
    targets = targets_of([2, 0, 6], C=2, dtype=torch.float64)

    def losses(logits, boxes):
        return tuple(SetLoss()(Output(logits, boxes), targets)[name] for name in (*LOSSES, "total"))

    torch.autograd.gradcheck(losses, tuple(output), eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (0.9, 0), (0.5, 1), (0, 3.5)])
def test_focal_loss_equals_torchvisions_everywhere(alpha, gamma):
    """On logits from -90 to 90, in float64 to 1e-9, in float32 to 1e-6; gradients by finite differences too."""
    from torchvision.ops import sigmoid_focal_loss

    logits = torch.linspace(-90, 90, 1201, dtype=torch.float64).view(1, 1, -1, 1)
    for index in range(0, 1201, 2):
        logits[0, 0, index] += 0.01
    matched = torch.arange(0, 1201, 7)[None]
    index = (torch.zeros_like(matched), torch.zeros_like(matched), matched, torch.zeros_like(matched))
    wanted = torch.zeros_like(logits)
    wanted[index] = 1
    expected = sigmoid_focal_loss(logits.requires_grad_(), wanted, alpha, gamma)
    (derivative,) = torch.autograd.grad(expected.sum(), logits)
    for dtype, rtol in [(torch.float64, 1e-9), (torch.float32, 1e-6)]:
        x = logits.detach().to(dtype).requires_grad_()
        value = FocalLoss(alpha, gamma).sums(x, index)
        torch.testing.assert_close(value.double(), expected.sum()[None].detach(), rtol=rtol, atol=0)
        assert_close(torch.autograd.grad(value.sum(), x)[0].double(), derivative, rtol=rtol)
    small = predictions(L=2, B=1, N=4, C=3, dtype=torch.float64).logits * 5
    index = tuple(torch.tensor(i) for i in ([[0], [1]], [[0], [0]], [[2], [3]], [[1], [0]]))
    torch.autograd.gradcheck(lambda x: FocalLoss(alpha, gamma).sums(x, index), small)


@pytest.mark.parametrize("x", [-1e30, -200.0, -40.0, -17.0, 17.0, 40.0, 200.0, 1e30])
def test_focal_loss_of_extreme_logits_is_exact(x):
    """Of an unmatched logit: (1-α) p^γ softplus(x), within the range of float32."""
    logits = torch.full((1, 1, 1, 1), x, requires_grad=True)
    none = (torch.zeros(1, 0, dtype=torch.int64),) * 4
    value = FocalLoss(0.25, 2).sums(logits, none)
    p = 1 / (1 + math.exp(min(-x, 700)))
    assert value.item() == pytest.approx(0.75 * p**2 * (x if x > 30 else math.log1p(math.exp(x))), rel=1e-6, abs=1e-37)
    assert torch.autograd.grad(value, logits)[0].item() == pytest.approx(0.75 * p**3 if x < 0 else 0.75, rel=1e-5)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 0.5, 7)])
def test_every_weight_scales_its_loss(weights):
    output, targets = predictions(), targets_of([3, 0, 5, 1])
    plain, weighted = SetLoss()(output, targets), SetLoss(*weights)(output, targets)
    for name in LOSSES:
        torch.testing.assert_close(weighted[name], plain[name], rtol=0, atol=0)
    expected = sum(weight * plain[name].sum() for weight, name in zip(weights, LOSSES, strict=True))
    torch.testing.assert_close(weighted["total"], expected, rtol=1e-6, atol=0)
    names = ("class_weight", "l1_weight", "giou_weight")
    assert SetLoss(**dict(zip(names, weights, strict=True))) == SetLoss(*weights)


def test_alpha_gamma_and_matcher_change_the_loss():
    from torchvision.ops import sigmoid_focal_loss

    output, targets = predictions(L=1), targets_of([3, 0, 5, 1])
    matcher = HungarianMatcher(class_cost=0.5, class_loss=FocalLoss(0.6, 1))
    found = SetLoss(class_loss=FocalLoss(0.4, 3), matcher=matcher)(output, targets)
    wanted, l1 = torch.zeros_like(output.logits), 0
    for image, (queries, indices) in enumerate(matcher(*output, targets)[0]):
        wanted[0, image, queries, targets[image]["labels"][indices]] = 1
        l1 += (output.boxes[0, image, queries] - targets[image]["boxes"][indices]).abs().sum()
    expected = sigmoid_focal_loss(output.logits, wanted, 0.4, 3, reduction="sum") / 9
    torch.testing.assert_close(found["class"], expected[None], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["l1"], l1[None] / 9, rtol=1e-5, atol=0)
    default = SetLoss()(output, targets)
    assert abs(found["class"] / default["class"] - 1) > 0.05
    assert abs(found["l1"] / default["l1"] - 1) > 0.01  # the matcher's coefficients select other queries


def test_layers_are_independent():
    """Losses and gradients of all layers together equal those of each layer alone."""
    output, targets = predictions(), targets_of([3, 0, 5, 1])
    together = SetLoss()(output, targets)
    whole = gradients(together["total"], output)
    for layer in range(3):
        one = Output(output.logits[layer : layer + 1], output.boxes[layer : layer + 1])
        alone = SetLoss()(one, targets)
        for name in LOSSES:
            torch.testing.assert_close(alone[name][0], together[name][layer], rtol=1e-6, atol=0)
        for found, expected in zip(gradients(alone["total"], output), whole, strict=True):
            assert_close(found[layer], expected[layer], rtol=1e-6)
            assert found[[i for i in range(3) if i != layer]].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    targets = targets_of([3, 0, 5, 1])
    half = Output(*(x.detach().to(dtype).requires_grad_() for x in predictions()))
    full = Output(*(x.detach().float().requires_grad_() for x in half))
    expected = SetLoss()(full, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SetLoss()(half, targets)
    for name in (*LOSSES, "total"):
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name])
    for a, b in zip(gradients(found["total"], half), gradients(expected["total"], full), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


def test_more_targets_than_queries_and_images_without_targets():
    output = predictions(L=2, B=2, N=300)
    targets = targets_of([1000, 0])
    losses = SetLoss()(output, targets)
    _, expected = transformers_losses(output, targets)
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-5, atol=0)
    output = predictions(L=2, B=100)
    losses = SetLoss()(output, targets_of([0] * 100))
    p = output.logits.double().sigmoid()
    nothing = (0.75 * p**2 * -(1 - p).log()).sum((1, 2, 3))  # divided by 1, not by 0
    torch.testing.assert_close(losses["class"].double(), nothing, rtol=1e-5, atol=0)
    assert losses["l1"].tolist() == losses["giou"].tolist() == [0, 0]
    by_logits, by_boxes = gradients(losses["total"], output)
    assert (by_logits > 0).all()
    assert (by_boxes == 0).all()


def test_degenerate_predictions_have_finite_losses_and_gradients():
    boxes = torch.zeros(1, 1, 3, 4)
    boxes[0, 0, 1] = torch.tensor([0.5, 0.5, 0.0, 0.3])
    boxes[0, 0, 2] = 1.0
    output = Output(torch.tensor([-1e4, 0.0, 1e4]).view(1, 1, 3, 1).requires_grad_(), boxes.requires_grad_())
    losses = SetLoss()(output, targets_of([3], C=1))
    assert all(value.isfinite().all() for value in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(losses["total"], output))


def test_predictions_that_are_not_finite_are_an_error():
    output = predictions()
    with torch.no_grad():
        output.boxes[2, 1, 3] = math.nan
    message = r"^images\[1\]: expected finite predictions .*, got NaN in the box head's boxes at decoder layer 2;"
    with pytest.raises(ValueError, match=message):
        SetLoss()(output, targets_of([3, 0, 5, 1]))


def test_one_copy_to_the_host_a_step():
    output, targets = predictions(), targets_of([3, 0, 5, 1])
    OnDevice.copies = 0
    losses = SetLoss()(Output(*(x.as_subclass(OnDevice) for x in output)), targets)
    assert OnDevice.copies == 1
    losses["total"].backward()
    assert OnDevice.copies == 1
    expected = SetLoss()(output, targets)
    for name in (*LOSSES, "total"):
        torch.testing.assert_close(losses[name].as_subclass(torch.Tensor), expected[name], rtol=0, atol=0)


class Dtypes(torch.utils._python_dispatch.TorchDispatchMode):
    """Record the dtype of every tensor that is created."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.seen.add(x.dtype)
        return result


def test_no_float64_on_the_way_to_a_device(monkeypatch):
    """Some devices have no float64. None is created, and float64 targets are converted on the CPU before the copy."""
    with Dtypes() as dtypes:
        SetLoss()(predictions(), targets_of([3, 0, 5, 1]))["total"].backward()
    assert dtypes.seen == {torch.float32, torch.int64, torch.bool}
    copied = []

    for module in ("losses", "matcher"):
        monkeypatch.setattr(
            f"conditional_detr.set_prediction.{module}.copy_to_device",
            lambda x, to: copied.append(x.dtype) or copy_to_device(x, to),
        )
    losses = SetLoss()(predictions(), targets_of([3, 0, 5, 1], dtype=torch.float64))
    assert copied == [torch.int64, torch.float32, torch.int64, torch.float32]
    assert losses["total"].dtype == torch.float32


# ---- with a model


@pytest.mark.parametrize("training", [True, False])
def test_losses_and_detections_from_one_forward_in_either_mode(tiny, training):
    """The loss does not modify the output: the detections equal those of a forward without it."""
    model = ConditionalDETR.from_pretrained(tiny.folder).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    pixels, padding = two_images()
    with torch.no_grad():
        before = model(pixels, padding)
    output = model(pixels, padding)
    losses = SetLoss()(output, targets_of([2, 0]))
    assert all(torch.equal(a, b) for a, b in zip(output, before, strict=True))
    assert losses["class"].shape == (3,)
    losses["total"].backward()
    assert all(torch.equal(a, b) for a, b in zip(output, before, strict=True))
    logits, boxes = (x[-1, 0].detach() for x in output)
    boxes, scores, *_ = postprocess(logits, boxes, (160, 224), Postprocessing(torch.arange(7), 0.0, 5))
    torch.testing.assert_close(scores, before.logits[-1, 0].sigmoid().flatten().topk(5).values, rtol=0, atol=0)
    assert boxes.shape == (5, 4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "key.bias" not in name:
            assert parameter.grad is not None, name
    assert model.class_head.weight.grad.abs().max() > 0
    assert model.box_head.layers[-1].weight.grad.abs().max() > 0


def test_gradient_descent_reaches_the_targets():
    """Gradient descent on predictions gives the targets' boxes high scores, and all other boxes low scores."""
    logits, boxes = (x.detach() for x in predictions(L=1, B=2, N=12))
    logits, boxes = logits.requires_grad_(), boxes.logit().requires_grad_()
    targets = targets_of([3, 0])
    optimizer = torch.optim.Adam([logits, boxes], lr=0.1)
    for _ in range(300):
        losses = SetLoss()(Output(logits, boxes.sigmoid()), targets)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    scores = logits[0].sigmoid()
    best, indices = scores[0].flatten().topk(3)
    assert best.min() > 0.5 > 0.2 > scores[0].flatten().topk(4).values[-1]
    assert scores[1].max() < 0.2
    order = (indices % 7).argsort()
    wanted = targets[0]["labels"].argsort()
    assert (indices % 7)[order].tolist() == targets[0]["labels"][wanted].tolist()
    found = boxes[0, 0].sigmoid()[indices // 7]
    torch.testing.assert_close(found[order], targets[0]["boxes"][wanted], rtol=0, atol=0.02)


# ---- processes


class Heads(nn.Module):
    """A minimal detector: two linear heads on given decoder outputs (L, B, N, 16)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.boxes = nn.Linear(16, 7), nn.Linear(16, 4)

    def forward(self, f):
        return Output(self.classes(f), self.boxes(f).sigmoid())


STATES = torch.randn(3, 5, 20, 16, generator=torch.Generator().manual_seed(1))
SHARES = [slice(0, 3), slice(3, 5)]  # of five images: the processes have different numbers of images and of boxes
COUNTS = [4, 0, 7, 1, 0]


def one_of_two(rank, folder):
    """Compute the gradients of one process's part of the batch, which DDP averages over both processes."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(Heads())
    share = SHARES[rank]
    losses = SetLoss()(model(STATES[:, share]), targets_of(COUNTS)[share])
    losses["total"].backward()
    result = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    nothing = SetLoss()(model.module(STATES[:, share]), targets_of([0] * STATES[:, share].shape[1]))
    written = [{name: value.detach() for name, value in each.items()} for each in (losses, nothing)]
    torch.save((result, *written), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    model = Heads()
    losses = SetLoss()(model(STATES), targets_of(COUNTS))
    losses["total"].backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, parameter in model.named_parameters():
        for found, *_ in parts:
            assert_close(found[name], parameter.grad, rtol=1e-5)
    for name in (*LOSSES, "total"):
        mean = (parts[0][1][name] + parts[1][1][name]) / 2
        torch.testing.assert_close(mean, losses[name].detach(), rtol=1e-5, atol=0)
    with torch.no_grad():  # no box in any process: divided by 1, as in one process
        alone = [SetLoss()(model(f), targets_of([0] * f.shape[1])) for f in (STATES[:, share] for share in SHARES)]
    for (_, _, nothing), expected in zip(parts, alone, strict=True):
        torch.testing.assert_close(nothing["total"], expected["total"], rtol=1e-6, atol=0)


# ---- speed


def test_at_least_three_times_as_fast_as_transformers():
    """CPU time of forward and backward at COCO's size, in turn; the minimum, because other work slows runs down."""
    output, targets = predictions(L=6, B=8, N=300, C=91), targets_of([7] * 8, C=91)
    criterion = SetLoss()

    def ours():
        criterion(output, targets)["total"].backward()

    def others():
        transformers_losses(output, targets)[0].backward()

    def seconds(work):
        output.logits.grad = output.boxes.grad = None
        start = time.process_time()
        work()
        return time.process_time() - start

    with torch_threads(1):  # CPU time includes that of threads that wait
        rounds = [(seconds(ours), seconds(others)) for _ in range(8)]
    ratio = min(slow for _, slow in rounds) / min(fast for fast, _ in rounds)
    assert ratio >= 3, f"{ratio:.2f} times as fast"


# ---- invalid input


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ({"logits": 0, "pred_boxes": 0}, TypeError, "output: expected an Output of logits and boxes, got dict"),
        (
            (torch.zeros(2, 5, 3), torch.zeros(2, 5, 4)),
            ValueError,
            r"expected \(L, B, N, C\).*; for one layer: logits\[",
        ),
        ((torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 4, 4)), ValueError, r"boxes: expected \(1, 2, 5, 4\) for logits"),
    ],
)
def test_outputs_of_the_wrong_form(output, error, message):
    with pytest.raises(error, match=message):
        SetLoss()(output, targets_of([1, 1]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_weight": -1}, ValueError, "class_weight: expected at least 0, got -1"),
        ({"giou_weight": math.nan}, ValueError, "giou_weight: expected at least 0, got nan"),
        (
            {"matcher": "hungarian"},
            TypeError,
            "matcher: expected a HungarianMatcher, or an object with match(), got str",
        ),
        (
            {"class_loss": SoftmaxLoss()},
            ValueError,
            "matcher: expected one with the class loss SoftmaxLoss, got FocalLoss",
        ),
    ],
)
def test_invalid_coefficients(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SetLoss(**options)


@pytest.mark.parametrize(
    ("part", "options", "error", "message"),
    [
        (FocalLoss, {"alpha": 1.5}, ValueError, r"alpha: expected 0\.\.1, got 1.5"),
        (FocalLoss, {"gamma": "2"}, TypeError, "gamma: expected a number, got '2'"),
        (SoftmaxLoss, {"no_object": -0.1}, ValueError, "no_object: expected at least 0, got -0.1"),
    ],
)
def test_invalid_coefficients_of_class_losses(part, options, error, message):
    with pytest.raises(error, match=message):
        part(**options)
