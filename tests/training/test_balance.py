"""Class-balanced sampling, weights of classes, and what an evaluation measures, against numbers worked by hand."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from conditional_detr import ConditionalDETR, SetLoss
from conditional_detr.data.batching import batches
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.modeling.detection_transformer import Output
from conditional_detr.set_prediction.class_losses import FocalLoss, SoftmaxLoss
from conditional_detr.set_prediction.matcher import HungarianMatcher
from conditional_detr.training import TrainConfig, train
from conditional_detr.training.sampling import balanced_probabilities
from conditional_detr.training.validation import measure
from helpers.training_runs import Rectangles, small_model, steps_of

QUIET = {"progress": False}
SHORT = TrainConfig(epochs=1, batch_size=2, workers=0)


class Labelled:
    """Images that have nothing but labels."""

    def __init__(self, *labels):
        self.image_labels = [torch.tensor(of_image) for of_image in labels]

    def __len__(self):
        return len(self.image_labels)


RARE = Labelled([0], [0, 0], [0], [0, 1], [])
"""Class 0 in four images, class 1 in one, and one image without targets."""


def test_probabilities_by_hand():
    """A fifth for the empty image; the classes share the rest, 2/5 each: class 0 gives 1/10 to each of four images."""
    expected = [1 / 10, 1 / 10, 1 / 10, 1 / 10 + 2 / 5, 1 / 5]
    assert balanced_probabilities(RARE) == pytest.approx(expected)
    parts = ConcatDataset([Subset(RARE, [3, 4]), Subset(RARE, [2, 0, 1])])
    assert balanced_probabilities(parts) == pytest.approx([1 / 2, 1 / 5, 1 / 10, 1 / 10, 1 / 10])
    with pytest.raises(TypeError, match=r"balanced: expected a dataset with image_labels, .*, got Rectangles"):
        balanced_probabilities(Rectangles(3))


def test_draws_have_the_expected_frequencies_and_follow_from_seed_and_epoch():
    """Each image's count of 5 x 2000 draws is binomial: within 5 standard deviations of n p."""
    p = balanced_probabilities(RARE)

    def draw(epoch, seed=0):
        order = batches(RARE, 2, seed=seed, epoch=epoch, probabilities=p)
        assert [len(batch) for batch in order].count(2) == 2
        return [index for batch in order for index in batch]

    counts = Counter(index for epoch in range(2000) for index in draw(epoch))
    n = 10_000
    for index, probability in enumerate(p):
        assert abs(counts[index] - n * probability) < 5 * np.sqrt(n * probability * (1 - probability)), index
    assert draw(3) == draw(3) != draw(4)


def test_a_balanced_run_resumes_to_the_same_steps(tmp_path):
    data = Rectangles(6)
    data.image_labels = [target["labels"] for _, target in data.samples]
    config = replace(SHORT, balanced=True, epochs=2, schedule="constant")
    train(small_model(), data, None, config, folder=tmp_path / "whole", **QUIET)
    train(small_model(), data, None, replace(config, epochs=1), folder=tmp_path / "parts", **QUIET)
    train(small_model(), data, None, config, folder=tmp_path / "parts", resume=True, **QUIET)
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    other = replace(config, balanced=False)
    with pytest.raises(ValueError, match="got balanced False, not True"):
        train(small_model(), data, None, other, folder=tmp_path / "parts", resume=True, **QUIET)


def test_labels_of_images_of_coco_data(tmp_path):
    from conditional_detr.data.dataset import CocoData

    data = CocoData(write_shapes(tmp_path, 4, seed=0, split="train", size=(64, 96)), tmp_path / "train")
    assert [labels.tolist() for labels in data.image_labels] == [data[i][1]["labels"].tolist() for i in range(4)]


# ---- weights of classes

LOG2 = 0.6931471805599453


def one_query():
    """Three queries with logits of 0; the first is matched with a target of class 1 at its own box."""
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])
    return boxes[None, None], [{"labels": torch.tensor([1]), "boxes": boxes[:1]}]


def test_weights_of_the_focal_loss_by_hand():
    """α/4 log 2 for the matched logit, (1-α)/4 log 2 for the five others; class 0 counts 3 times, class 1 10 times."""
    boxes, targets = one_query()
    logits = torch.zeros(1, 1, 3, 2, requires_grad=True)
    plain = SetLoss()(Output(logits, boxes), targets)
    assert plain["class"].item() == pytest.approx((0.25 + 5 * 0.75) / 4 * LOG2)
    weighted = SetLoss(class_loss=FocalLoss(class_weights=(3.0, 10.0)))(Output(logits, boxes), targets)
    assert weighted["class"].item() == pytest.approx((3 * 3 * 0.75 + 10 * (0.25 + 2 * 0.75)) / 4 * LOG2)
    (g,) = torch.autograd.grad(plain["class"].sum(), logits)
    (w,) = torch.autograd.grad(weighted["class"].sum(), logits)
    torch.testing.assert_close(w, g * torch.tensor([3.0, 10.0]))


def test_weights_of_the_softmax_loss_are_those_of_cross_entropy():
    """PyTorch's weighted sum, divided by the weights without those of the classes: 1 + 2 · 0.1."""
    boxes, targets = one_query()
    logits = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = SoftmaxLoss(class_weights=(3.0, 10.0))
    criterion = SetLoss(class_loss=loss, matcher=HungarianMatcher(0, 5, 2, loss))
    found = criterion(Output(logits, boxes), targets)["class"].sum()
    weights, classes = torch.tensor([3.0, 10.0, 0.1]), torch.tensor([1, 2, 2])
    expected = torch.nn.functional.cross_entropy(logits[0, 0], classes, weights, reduction="sum") / 1.2
    torch.testing.assert_close(found, expected)
    (g,), (e,) = torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(g, e)


def test_wrong_weights_of_classes(tmp_path):
    with pytest.raises(TypeError, match="class_weights: expected a tuple of numbers, one per class, got 2"):
        FocalLoss(class_weights=2)
    with pytest.raises(ValueError, match=r"class_weights\[1\]: expected at least 0, got -1"):
        SoftmaxLoss(class_weights=(1, -1))
    three = SetLoss(class_loss=FocalLoss(class_weights=(1, 2, 3)))
    with pytest.raises(ValueError, match="criterion: expected class_weights of all 2 classes of the model, got 3"):
        train(small_model(), Rectangles(2), folder=tmp_path, criterion=three, **QUIET)
    with pytest.raises(ValueError, match="class_weights: expected 2, one per class, got 3"):
        three(Output(torch.zeros(1, 1, 3, 2), one_query()[0]), one_query()[1])


def test_other_weights_are_refused_on_resume(tmp_path):
    config = replace(SHORT, schedule="constant")
    train(small_model(), Rectangles(2), None, config, folder=tmp_path, **QUIET)
    weighted = SetLoss(class_loss=FocalLoss(class_weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"got class_weights \(1\.0, 2\.0\), not None"):
        train(small_model(), Rectangles(2), None, config, folder=tmp_path, criterion=weighted, resume=True, **QUIET)


# ---- evaluations


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_validation_loss_is_that_of_one_joined_batch(batch_size):
    model, data = small_model().eval(), Rectangles(5)
    pixels = torch.stack([pixels for pixels, _ in data.samples])
    with torch.no_grad():
        expected = SetLoss()(model(pixels), [target for _, target in data.samples])["total"].item()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert measure(model.train(), data, batch_size, SetLoss())["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert model.training
    assert len(calls) == -(-5 // batch_size)  # AP and loss are of the same predictions


def test_ap_of_each_class_has_its_name(monkeypatch):
    """Detections that are the targets of class "blue" and none of "red": AP 1 and 0."""
    model, data = small_model(), Rectangles(6)
    targets = [target for _, target in data.samples]
    assert {label for target in targets for label in target["labels"].tolist()} == {0, 1}

    def perfect(_, samples):
        logits, boxes = torch.full((len(samples), 10, 2), -20.0), torch.full((len(samples), 10, 4), 0.01)
        for i, (_, (_, target)) in enumerate(samples):
            blue = target["boxes"][target["labels"] == 1]
            boxes[i, : len(blue)], logits[i, : len(blue), 1] = blue, 5.0
        return Output(logits[None], boxes[None])

    monkeypatch.setattr("conditional_detr.training.validation._predict", perfect)
    found = measure(model, data, 4, SetLoss())
    assert found["per_class"]["blue"] == pytest.approx(1.0)
    assert found["per_class"]["red"] == 0.0
    assert found["AP"] == pytest.approx(0.5)


def test_log_and_tensorboard_have_both(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(small_model(), Rectangles(2), Rectangles(3), SHORT, folder=tmp_path, **QUIET)
    (entry,) = result.history
    assert entry["per_class"].keys() == {"red", "blue"}
    assert entry["val_loss"] == pytest.approx(
        measure(ConditionalDETR.from_pretrained(result.last), Rectangles(3), 3, SetLoss())["val_loss"], rel=1e-4
    )
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Scalars("val/val_loss")[0].value == pytest.approx(entry["val_loss"], rel=1e-6)
    assert board.Scalars("val/per_class/red")[0].value == pytest.approx(entry["per_class"]["red"])
    assert (tmp_path / "curves.png").stat().st_size > 10_000
