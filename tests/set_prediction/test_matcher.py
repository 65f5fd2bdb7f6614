"""Assignments against transformers' and hand-worked ones; errors on invalid input."""

import itertools
import math

import pytest
import torch

from conditional_detr import HungarianMatcher
from conditional_detr.set_prediction.boxes import generalized_iou
from conditional_detr.set_prediction.class_losses import FocalLoss
from conditional_detr.set_prediction.targets import validate_targets
from helpers.set_prediction import OnDevice, assert_same_pairs, predictions, targets_of, transformers_pairs


@pytest.mark.parametrize("counts", [(3, 0, 5, 1), (0, 0, 0, 0), (20, 25, 40, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_equals_transformers_at_every_layer(counts, seed):
    """Including images without targets, and more targets than the 20 queries."""
    output, targets = predictions(seed=seed), targets_of(counts, seed=seed)
    found = HungarianMatcher()(*output, targets)
    assert_same_pairs(found, transformers_pairs(output, targets))
    for pairs in found:
        assert [len(queries) for queries, _ in pairs] == [min(count, 20) for count in counts]
        assert all(x.dtype == torch.int64 for pair in pairs for x in pair)


def test_equals_transformers_at_the_size_of_coco():
    output, targets = predictions(L=6, B=8, N=300, C=91), targets_of([7] * 8, C=91)
    assert_same_pairs(HungarianMatcher()(*output, targets), transformers_pairs(output, targets))


@pytest.mark.parametrize("costs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (9, 1, 1), (1, 9, 1), (1, 1, 9)])
def test_every_cost_has_the_same_effect_as_in_transformers(costs):
    output, targets = predictions(), targets_of([6, 4, 9, 2])
    expected = transformers_pairs(output, targets, *costs)
    assert_same_pairs(HungarianMatcher(*costs)(*output, targets), expected)
    with pytest.raises(AssertionError):  # and each setting gives another assignment than the default
        assert_same_pairs(HungarianMatcher()(*output, targets), expected)


def test_one_layer_gives_one_list():
    output, targets = predictions(), targets_of([3, 0, 5, 1])
    matcher = HungarianMatcher()
    several = matcher(*output, targets)
    one = matcher(output.logits[1], output.boxes[1], targets)
    assert_same_pairs([one], [several[1]])
    assert len(one) == 4


def test_cost_by_hand():
    """One query, two classes, one target of class 1."""
    logits, boxes = torch.tensor([[[[3.0, math.log(3)]]]]), torch.tensor([[[[0.5, 0.5, 0.4, 0.4]]]])
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.7, 0.5, 0.4, 0.2]])}]
    p = 0.75  # the sigmoid of log 3
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    l1 = 0.2 + 0.0 + 0.0 + 0.2
    # x 0.3..0.7 and 0.5..0.9, y 0.3..0.7 and 0.4..0.6
    intersection, union, hull = 0.2 * 0.2, 0.16 + 0.08 - 0.04, 0.6 * 0.4
    giou = intersection / union - (hull - union) / hull
    expected = 2 * focal + 5 * l1 - 2 * giou
    found = HungarianMatcher().cost(logits, boxes, validate_targets(targets, 1, 2))
    assert found.shape == (1, 1, 1)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    p_3 = 1 / (1 + math.exp(-3))
    focal = 0.4 * (1 - p_3) ** 3 * -math.log(p_3) - 0.6 * p_3**3 * -math.log(1 - p_3)
    targets[0]["labels"][0] = 0
    found = HungarianMatcher(1, 0, 0, FocalLoss(0.4, 3)).cost(logits, boxes, validate_targets(targets, 1, 2))
    assert found.item() == pytest.approx(focal, rel=1e-5)


def test_the_minimum_of_all_assignments():
    """Against exhaustive search: 4 queries, 3 targets, and 3 queries, 5 targets."""
    for queries, count in [(4, 3), (3, 5)]:
        output, targets = predictions(L=1, B=1, N=queries), targets_of([count])
        matcher = HungarianMatcher()
        cost = matcher.cost(*(x.detach() for x in output), validate_targets(targets, 1, 7))[:, 0]  # (T, N)
        found = matcher(*output, targets)[0][0]
        least = min(
            sum(cost[t, q].item() for q, t in zip(chosen, of, strict=True))
            for chosen in itertools.permutations(range(queries), min(queries, count))
            for of in itertools.permutations(range(count), min(queries, count))
        )
        assert sum(cost[t, q].item() for q, t in zip(*found, strict=True)) == pytest.approx(least, rel=1e-6)


def test_queries_are_compared_only_with_targets_of_their_image():
    """The cost has one row per target: 100 images have 100 times the rows of one image."""
    matcher = HungarianMatcher()
    one, many = predictions(L=2, B=1), predictions(L=2, B=100)
    alone = matcher.cost(*one, validate_targets(targets_of([4]), 1, 7))
    together = matcher.cost(*many, validate_targets(targets_of([4] * 100), 100, 7))
    assert alone.shape == (4, 2, 20)
    assert together.shape == (400, 2, 20)


def test_a_thousand_boxes_in_one_image():
    output, targets = predictions(L=2, B=2, N=300), targets_of([1000, 3])
    found = HungarianMatcher()(*output, targets)
    assert_same_pairs(found, transformers_pairs(output, targets))
    assert len(found[0][0][0]) == 300


def test_a_hundred_images_without_targets():
    output = predictions(L=2, B=100)
    found = HungarianMatcher()(*output, targets_of([0] * 100))
    assert [[(len(q), len(t)) for q, t in pairs] for pairs in found] == [[(0, 0)] * 100] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    output, targets = predictions(), targets_of([6, 4, 0, 2])
    half = [x.to(dtype) for x in output]
    matcher = HungarianMatcher()
    expected = matcher(*(x.float() for x in half), targets)
    assert_same_pairs(matcher(*half, targets), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_pairs(matcher(*half, targets), expected)
        joined = validate_targets(targets, 4, 7)
        assert matcher.cost(*half, joined).dtype == torch.float32


def test_logits_beyond_float32s_sigmoid_cost_finite_amounts():
    """The authors bound the logarithm: certainty costs 18.4 times its weight, so that box costs still matter."""
    logits = torch.tensor([[[[-3e4], [3e4]]]])
    boxes = torch.full((1, 1, 2, 4), 0.5)
    joined = validate_targets(targets_of([1], C=1), 1, 1)
    cost = HungarianMatcher(1, 0, 0).cost(logits, boxes, joined).flatten()
    bound = -math.log(1e-8)
    torch.testing.assert_close(cost, torch.tensor([0.25 * bound, -0.75 * bound]), rtol=1e-6, atol=0)


def test_one_copy_to_the_host():
    output, targets = predictions(), targets_of([3, 0, 5, 1])
    on_device = [x.detach().as_subclass(OnDevice) for x in output]
    OnDevice.copies = 0
    found = HungarianMatcher()(*on_device, targets)
    assert OnDevice.copies == 1
    assert_same_pairs(found, HungarianMatcher()(*output, targets))


# ---- invalid input


def test_predictions_that_are_not_finite_are_an_error():
    logits, boxes = (x.detach().clone() for x in predictions())
    targets = targets_of([3, 0, 5, 1])
    matcher = HungarianMatcher()
    broken = logits.clone()
    broken[[0, 2], 1, 4, 6] = math.nan
    with pytest.raises(
        ValueError, match=r"^images\[1\]: .* got NaN in the class head's logits at decoder layer 0, 2; tr"
    ):
        matcher(broken, boxes, targets)
    wrong = boxes.clone()
    wrong[1, 3, 0, 0] = math.inf
    with pytest.raises(
        ValueError, match=r"^images\[3\]: .* got infinity in the box head's boxes at decoder layer 1; tr"
    ):
        matcher(logits, wrong, targets)
    both = r"^images\[1\]: .*class head's logits at decoder layer 0, 2; also not finite: images\[3\]; training"
    with pytest.raises(ValueError, match=both):
        matcher(broken, wrong, targets)
    wrong[1, 1, 0, 0] = -math.inf
    both = (
        r"NaN in the class head's logits at decoder layer 0, 2 and infinity in the box head's boxes at decoder layer 1"
    )
    with pytest.raises(ValueError, match=both):
        matcher(broken, wrong, targets)
    with pytest.raises(ValueError, match=r"^images\[0\]: .*class head's logits at decoder layer 0"):
        matcher(broken[0, 1:2], boxes[0, 1:2], targets_of([0]))


def test_finite_predictions_with_a_large_sum_are_no_error():
    logits, boxes = (x.detach().clone() for x in predictions())
    logits[0, 0, :2] = 2e38
    targets = targets_of([3, 0, 5, 1])
    assert_same_pairs(HungarianMatcher()(logits, boxes, targets)[1:], HungarianMatcher()(*predictions(), targets)[1:])


@pytest.mark.parametrize(
    ("logits", "boxes", "error", "message"),
    [
        (
            torch.zeros(2, 5, 3),
            torch.zeros(2, 4, 4),
            ValueError,
            r"boxes: expected \(2, 5, 4\) for logits .*got \(2, 4, 4\)",
        ),
        (
            torch.zeros(5, 3),
            torch.zeros(5, 4),
            ValueError,
            r"logits: expected \(B, N, C\) or \(L, B, N, C\).*got \(5, 3\)",
        ),
        (torch.zeros(2, 0, 3), torch.zeros(2, 0, 4), ValueError, r"without empty dimensions, got \(2, 0, 3\)"),
        ([[0.0]], torch.zeros(2, 5, 4), TypeError, "logits: expected a floating point tensor, got list"),
        (
            torch.zeros(2, 5, 3),
            torch.zeros(2, 5, 4).int(),
            TypeError,
            "boxes: expected a floating .*, got torch.int32",
        ),
        (torch.zeros(2, 5, 3), torch.zeros(2, 5, 4, device="meta"), ValueError, "boxes: expected the device of .*cpu"),
    ],
)
def test_predictions_of_the_wrong_form(logits, boxes, error, message):
    with pytest.raises(error, match=message):
        HungarianMatcher()(logits, boxes, targets_of([1, 1]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_cost": -1}, ValueError, "class_cost: expected at least 0, got -1"),
        ({"l1_cost": math.inf}, ValueError, "l1_cost: expected at least 0, got inf"),
        ({"class_cost": 0, "l1_cost": 0, "giou_cost": 0}, ValueError, "expected .* above 0, got 0 for all three"),
    ],
)
def test_invalid_coefficients(options, error, message):
    with pytest.raises(error, match=message):
        HungarianMatcher(**options)


# ---- generalised IoU


def test_giou_equals_torchvisions_both_ways():
    from torchvision.ops import generalized_box_iou

    a, b = (torch.rand(9, 4, dtype=torch.float64) for _ in range(2))
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    pairwise = generalized_iou(a[:, None], b)
    torch.testing.assert_close(pairwise, generalized_box_iou(a, b), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(generalized_iou(a, b), pairwise.diagonal(), rtol=0, atol=0)
    half = generalized_iou(a.bfloat16(), b.bfloat16())
    assert torch.equal(half, generalized_iou(a.bfloat16().float(), b.bfloat16().float()))
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], -1),  # the same point
        ([0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2], -1),  # two points
        ([0, 0.5, 1, 0.5], [0, 0.5, 1, 0.5], -1),  # the same line
        ([0.2, 0.2, 0.2, 0.2], [0, 0, 1, 1], 0),  # a point in a box: IoU 0, and the union fills the enclosing box
        ([0, 0, 0, 1], [0, 0, 1, 1], 0),
        ([0.9, 0.9, 0.1, 0.1], [0.2, 0.2, 0.8, 0.8], 0),  # corners in the wrong order: area 0
        ([0, 0, 1, 1], [0, 0, 1, 1], 1),
        ([0, 0, 1, 1], [2, 0, 3, 1], -1 / 3),
        ([1e-7, 0, 2e-7, 1e-7], [1e-7, 0, 2e-7, 1e-7], 1e-14 / 1e-12 * 2 - 1),  # below the smallest area
    ],
)
def test_giou_of_degenerate_boxes_is_finite_and_so_is_its_gradient(a, b, expected):
    a, b = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (a, b))
    found = generalized_iou(a, b)
    found.backward()
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()
    assert generalized_iou(b, a).item() == pytest.approx(expected, abs=1e-6)
