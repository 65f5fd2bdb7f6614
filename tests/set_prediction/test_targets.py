"""Valid targets, and the error message of every kind of invalid target."""

import numpy as np
import pytest
import torch

from conditional_detr import HungarianMatcher, SetLoss
from conditional_detr.set_prediction.targets import validate_targets
from helpers.set_prediction import predictions, targets_of

BOX = [0.5, 0.5, 0.2, 0.4]


def target(boxes=(BOX,), labels=None):
    boxes = torch.tensor(boxes)
    return {"labels": torch.zeros(len(boxes), dtype=torch.int64) if labels is None else labels, "boxes": boxes}


def second(wrong):
    """Return targets of two images, the second of which is invalid."""
    return [target(), wrong]


WRONG = {
    "not a list": (
        target(),
        TypeError,
        r"targets: expected a list of dicts, one per image, got dict; for one image",
    ),
    "a stacked tensor": (torch.zeros(2, 1, 4), TypeError, r"expected a list of dicts, one per image, got Tensor"),
    "too few": ([target()], ValueError, r"targets: expected one per image, 2, got 1"),
    "not a dict": (
        second(torch.zeros(1, 4)),
        TypeError,
        r"targets\[1\]: expected a dict of labels and boxes, got Tensor",
    ),
    "no boxes": (
        second({"labels": torch.zeros(0, dtype=torch.int64), "bbox": torch.zeros(0, 4)}),
        ValueError,
        r"targets\[1\]: expected the keys labels and boxes, got \['bbox', 'labels'\]: no boxes",
    ),
    "transformers' key": (
        second({"class_labels": torch.zeros(1, dtype=torch.int64), "boxes": torch.tensor([BOX])}),
        ValueError,
        r"targets\[1\]: .*the key for transformers' class_labels is labels: no labels",
    ),
    "a list of boxes": (
        second({"labels": torch.zeros(1, dtype=torch.int64), "boxes": [BOX]}),
        TypeError,
        r'targets\[1\]\["boxes"\]: expected a tensor, got list',
    ),
    "an array of labels": (
        second({"labels": np.zeros(1, dtype=np.int64), "boxes": torch.tensor([BOX])}),
        TypeError,
        r'targets\[1\]\["labels"\]: expected a tensor, got ndarray',
    ),
    "int32 labels": (
        second(target(labels=torch.zeros(1, dtype=torch.int32))),
        TypeError,
        r'targets\[1\]\["labels"\]: expected int64, got torch.int32; labels.long\(\)',
    ),
    "float labels": (second(target(labels=torch.zeros(1))), TypeError, r"expected int64, got torch.float32"),
    "one-hot labels": (
        second(target(labels=torch.zeros(1, 3, dtype=torch.int64))),
        ValueError,
        r'targets\[1\]\["labels"\]: expected the shape \(T,\), got \(1, 3\); looks like one-hot rows',
    ),
    "whole-number boxes": (
        second(target([[50, 50, 20, 40]])),
        TypeError,
        r'targets\[1\]\["boxes"\]: expected floating point .*, got torch.int64; whole numbers look like pixels',
    ),
    "one box without its dimension": (
        second({"labels": torch.zeros(1, dtype=torch.int64), "boxes": torch.tensor(BOX)}),
        ValueError,
        r"expected the shape \(T, 4\), got \(4,\); looks like one box: boxes\[None\]",
    ),
    "no box without its dimension": (
        second({"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.tensor([])}),
        ValueError,
        r"expected the shape \(T, 4\), got \(0,\); for no boxes pass torch.zeros\(0, 4\)",
    ),
    "transposed boxes": (
        second({"labels": torch.zeros(3, dtype=torch.int64), "boxes": torch.zeros(4, 3)}),
        ValueError,
        r"got \(4, 3\); looks transposed: boxes.T",
    ),
    "five columns": (second(target([[*BOX, 0.0]])), ValueError, r"expected the shape \(T, 4\), got \(1, 5\)"),
    "counts that differ": (
        second(target(labels=torch.zeros(2, dtype=torch.int64))),
        ValueError,
        r"targets\[1\]: expected as many labels as boxes, got 2 labels and 1 boxes",
    ),
    "a label beyond the last": (
        second(target([BOX, BOX], torch.tensor([2, 3]))),
        ValueError,
        r'targets\[1\]\["labels"\]\[1\]: expected 0..2, got label 3 with 3 classes; labels are 0-based',
    ),
    "a negative label": (
        second(target([BOX, BOX], torch.tensor([-1, 2]))),
        ValueError,
        r'targets\[1\]\["labels"\]\[0\]: expected 0..2, got label -1 .*; looks like a padding row',
    ),
    "NaN": (
        second(target([BOX, [0.5, float("nan"), 0.2, 0.2]])),
        ValueError,
        r'targets\[1\]\["boxes"\]\[1\]: expected cy in \[0, 1\], got nan; .* not finite',
    ),
    "infinity": (
        second(target([[0.5, 0.5, float("inf"), 0.2]])),
        ValueError,
        r"expected w in \(0, 1\], got inf; .* not finite",
    ),
    "pixels": (
        second(target([BOX, [320.0, 240.0, 64.0, 48.0]])),
        ValueError,
        r'\["boxes"\]\[1\]: expected cx in \[0, 1\], got 320; .* = \[320, 240, 64, 48\]; looks like pixels: divide',
    ),
    "corners": (
        second(target([[0.4, 0.5, 0.6, 0.7], [0.1, 0.2, 0.9, 0.95]])),
        ValueError,
        r'\["boxes"\]\[1\]: expected x0 = cx - w/2 in .*, got -0.35; .*; looks like x0 y0 x1 y1: torchvision',
    ),
    "corners that end at the image's": (
        second(target([[0.4, 0.4, 1.0, 1.0]])),
        ValueError,
        r"expected x0 = cx - w/2 in .*, got -0.1; .*; looks like x0 y0 x1 y1: ",
    ),
    "corner and size": (
        second(target([[0.1, 0.6, 0.5, 0.3]])),
        ValueError,
        r"expected x0 = cx - w/2 in \[-0.001, 1.001\], got -0.15; .*; looks like x0 y0 w h: ",
    ),
    "either": (second(target([[0.0, 0.0, 0.5, 0.5]])), ValueError, r"looks like x0 y0 x1 y1 or x0 y0 w h"),
    "no width": (
        second(target([[0.5, 0.5, 0.0, 0.3]])),
        ValueError,
        r"expected w in \(0, 1\], got 0; .*; zero area: remove such boxes",
    ),
    "a negative height": (
        second(target([[0.5, 0.5, 0.2, -0.3]])),
        ValueError,
        r"expected h in \(0, 1\], got -0.3; .*; a negative size: the corners may be in the wrong order",
    ),
    "a row of zeros": (second(target([BOX, [0.0] * 4])), ValueError, r"\[1\]: .*; all zero looks like a padding row"),
    "a box wider than its image": (
        second(target([[0.5, 0.5, 1.2, 0.5]])),
        ValueError,
        r"expected w in \(0, 1\], got 1.2; .*; extends outside the image: clip",
    ),
    "a centre outside": (
        second(target([[1.05, 0.5, 0.1, 0.1]])),
        ValueError,
        r"expected cx in \[0, 1\], got 1.05; .*; extends outside the image: clip",
    ),
    "a corner outside": (
        second(target([[0.95, 0.5, 0.11, 0.1]])),
        ValueError,
        r"expected x1 = cx \+ w/2 in \[-0.001, 1.001\], got 1.005; .*; extends outside",
    ),
}


@pytest.mark.parametrize(("targets", "error", "message"), WRONG.values(), ids=WRONG)
def test_every_invalid_target_has_its_message(targets, error, message):
    with pytest.raises(error, match=message):
        validate_targets(targets, 2, 3)


@pytest.mark.parametrize(("targets", "error", "message"), WRONG.values(), ids=WRONG)
def test_loss_and_matcher_stop_before_any_kernel(targets, error, message):
    """The predictions are on the meta device, where they can be neither copied nor read."""
    logits, boxes = torch.zeros(1, 2, 5, 3, device="meta"), torch.zeros(1, 2, 5, 4, device="meta")
    with pytest.raises(error, match=message):
        SetLoss()((logits, boxes), targets)
    with pytest.raises(error, match=message):
        HungarianMatcher()(logits[0], boxes[0], targets)


@pytest.mark.parametrize(
    "box",
    [
        [0.5, 0.5, 1.0, 1.0],  # the whole image
        [0.0, 0.5, 0.002, 0.1],  # on the edge, a corner 1e-3 outside
        [0.95, 0.5, 0.102, 0.1],  # a corner 1e-3 outside on the other side
        [0.5, 0.5, 1e-6, 1e-6],
    ],
)
def test_boxes_on_the_limits_pass(box):
    assert validate_targets([target([box])], 1, 1).boxes.tolist() == torch.tensor([box]).tolist()


def test_joined_by_hand():
    targets = [target([BOX, BOX], torch.tensor([1, 0])), *targets_of([0]), target([[0.3, 0.3, 0.2, 0.2]])]
    joined = validate_targets(targets, 3, 2)
    assert joined.labels.tolist() == [1, 0, 0]
    assert joined.images.tolist() == [0, 0, 2]
    assert joined.counts == (2, 0, 1)
    assert joined.boxes.tolist() == torch.tensor([BOX, BOX, [0.3, 0.3, 0.2, 0.2]]).tolist()


def test_other_keys_and_other_precisions_are_unchanged():
    (wide,) = targets_of([3], dtype=torch.float64)
    joined = validate_targets([{**wide, "image_id": 7, "area": None}], 1, 7)
    assert joined.boxes.dtype == torch.float64
    assert torch.equal(joined.boxes, wide["boxes"])
    half = {**wide, "boxes": wide["boxes"].half()}
    assert validate_targets([half], 1, 7).boxes.dtype == torch.float32
    widened = SetLoss()(predictions(B=1), [{**wide, "boxes": wide["boxes"].half().float()}])
    assert torch.equal(SetLoss()(predictions(B=1), [half])["total"], widened["total"])
