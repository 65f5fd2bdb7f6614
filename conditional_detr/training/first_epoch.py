"""A look at what was learned in the first epoch: if AP will be 0, what is probably wrong."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from conditional_detr.data.dataset import Sample
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.set_prediction.matcher import HungarianMatcher
from conditional_detr.training.loader import SampleDataset
from conditional_detr.training.validation import predict

IMAGES = 64  # looked at, spread over the data set
_NEAR = 0.5  # IoU from which a box is said to be the target's
_UNLEARNED = 0.05  # scores begin at 0.01
_APART = 0.3  # mean best IoU of boxes that have nothing to do with the targets
_FEW = 0.1  # matched share


@dataclass(frozen=True)
class FirstEpochReport:
    """What the model makes of training images after the first epoch.

    Attributes:
        images: how many were looked at.
        targets: objects on them.
        matched: share of the targets whose query, by the matcher, has a box of IoU above 0.5.
        best_iou: mean over the targets of the best IoU with any query's box.
        right_class: share of those matched that score highest in the target's class.
        top_score: the highest score of all.
        advice: what is probably wrong, or that nothing is.
    """

    images: int
    targets: int
    matched: float
    best_iou: float
    right_class: float
    top_score: float
    advice: str

    def __str__(self) -> str:
        return (
            f"after the first epoch, on {self.images} training images with {self.targets} objects:"
            f" matched with IoU > 0.5: {self.matched:.0%}, of the right class: {self.right_class:.0%};"
            f" mean best IoU {self.best_iou:.2f}; top score {self.top_score:.3f}\n{self.advice}"
        )


def check_first_epoch(
    model: ConditionalDETR, data: SampleDataset, matcher: HungarianMatcher, ap: float | None = None
) -> FirstEpochReport:
    """Compare what the model finds on some images with their targets.

    Args:
        model: the model.
        data: the training data.
        matcher: says which query answers for which target.
        ap: that of the validation data, if it was measured.
    """
    count = min(IMAGES, len(data))
    found = [_look(model, data[i * len(data) // count], matcher) for i in range(count)]
    best, matched, right = (torch.cat([part[k] for part in found]) for k in range(3))
    top_score = max(float(part[3]) for part in found)
    near = matched > _NEAR
    look = FirstEpochReport(
        images=count,
        targets=len(best),
        matched=float(near.float().mean()) if len(best) else 0.0,
        best_iou=float(best.mean()) if len(best) else 0.0,
        right_class=float(right[near].float().mean()) if near.any() else 0.0,
        top_score=top_score,
        advice="",
    )
    return replace(look, advice=_advice(look, ap))


def _look(model: ConditionalDETR, sample: Sample, matcher: HungarianMatcher) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return of one image: best IoU (T,), matched IoU (T',), whether its class is right (T',), top score ()."""
    target = sample[1]
    logits, boxes = predict(model, [sample])  # (1, N, C), (1, N, 4)
    pairs: Any = matcher(logits, boxes, [target])
    ((queries, places),) = pairs
    iou = box_iou(*(box_convert(x.float(), "cxcywh", "xyxy") for x in (boxes[0], target["boxes"])))  # (N, T)
    best = iou.max(0).values if iou.numel() else torch.zeros(0)
    right = logits[0, queries].argmax(-1) == target["labels"][places]
    return best, iou[queries, places], right, logits.sigmoid().max()


def _advice(look: FirstEpochReport, ap: float | None) -> str:
    """Say what the numbers suggest."""
    if not look.targets:
        return "No object on any of them: there is nothing to learn. conditional-detr check-data looks at a data set."
    if look.top_score < _UNLEARNED and look.best_iou < _APART:
        return (
            "Neither scores nor boxes have moved: too few steps so far, or too low a learning rate. Weights that were"
            " trained before learn in a few hundred steps, a transformer from scratch takes tens of epochs."
        )
    if look.top_score < _UNLEARNED:
        return "Boxes come near, but scores stay where they began, at 0.01: more steps or a higher learning rate."
    if look.best_iou < _APART or look.matched < _FEW:
        return (
            "Scores rise, but boxes are elsewhere: too few steps so far, or boxes that are not where the objects are:"
            " x0 y0 w h taken for cx cy w h, normalised to another size than the visible image's, or not moved with"
            " the image by an augmentation. conditional-detr check-data draws the boxes."
        )
    if look.right_class < 0.5:
        return (
            "Boxes are right, classes are not: too few steps so far, or labels that are not the rows of the class head"
            " (0-based, in the order of the model's class names)."
        )
    if ap is not None and ap < 0.01:
        return (
            "The training images are learned, but the validation AP is 0: its class names, the place of its boxes or"
            " its preprocessing differ from those of the training data."
        )
    return "Nothing looks wrong."
