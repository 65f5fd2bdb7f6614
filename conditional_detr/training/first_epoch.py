"""A check of the model after the first epoch, with advice if training is likely to fail."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from conditional_detr.data.dataset import Sample
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.set_prediction.matcher import Matcher
from conditional_detr.set_prediction.targets import validate_targets
from conditional_detr.training.loader import SampleDataset
from conditional_detr.training.validation import predict

IMAGES = 64  # number of images checked, evenly spaced in the dataset
_MATCHED_IOU = 0.5  # a box with a higher IoU counts as matched
_LOW_SCORE = 0.05  # initial scores of ConditionalDETR are 0.01; DETR first learns that all queries are "no object"
_LOW_IOU = 0.3  # mean best IoU of boxes that are unrelated to the targets
_FEW = 0.1  # fraction of matched targets


@dataclass(frozen=True)
class FirstEpochReport:
    """Predictions on training images after the first epoch, compared with the targets.

    Attributes:
        images: number of images checked.
        targets: number of targets in these images.
        matched: fraction of the targets whose query, as the matcher assigns it, has a box with IoU above 0.5.
        best_iou: mean over the targets of the best IoU with any query's box.
        right_class: fraction of the matched queries whose highest score is that of the target's class.
        top_score: highest score of all queries and classes.
        advice: the likely problem, or that none was found.
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
            f"after the first epoch, on {self.images} training images with {self.targets} targets:"
            f" matched with IoU > 0.5: {self.matched:.0%}, of these with the right class: {self.right_class:.0%};"
            f" mean best IoU {self.best_iou:.2f}; top score {self.top_score:.3f}\n{self.advice}"
        )


def check_first_epoch(
    model: DetectionTransformer,
    data: SampleDataset,
    matcher: Matcher,
    ap: float | None = None,
    bad_images: Collection[int] = frozenset(),
) -> FirstEpochReport:
    """Compare the model's predictions on some training images with their targets.

    Args:
        model: the model.
        data: the training data.
        matcher: assigns queries to targets.
        ap: validation AP, if it was measured.
        bad_images: indices of images that cannot be read and are left out.

    Returns:
        The comparison, with advice.
    """
    readable = [index for index in range(len(data)) if index not in bad_images]
    count = min(IMAGES, len(readable))
    compared = [_compare(model, data[readable[i * len(readable) // count]], matcher) for i in range(count)]
    best, matched, right = (torch.cat([part[k] for part in compared]) for k in range(3))
    top_score = max(float(part[3]) for part in compared)
    near = matched > _MATCHED_IOU
    report = FirstEpochReport(
        images=count,
        targets=len(best),
        matched=float(near.float().mean()) if len(best) else 0.0,
        best_iou=float(best.mean()) if len(best) else 0.0,
        right_class=float(right[near].float().mean()) if near.any() else 0.0,
        top_score=top_score,
        advice="",
    )
    return replace(report, advice=_advice(report, ap))


def _compare(model: DetectionTransformer, sample: Sample, matcher: Matcher) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return for one image the best IoU (T,), matched IoU (T',), whether the class is right (T',), top score ()."""
    target = sample[1]
    logits, boxes = predict(model, sample)  # (1, N, C), (1, N, 4)
    joined = validate_targets([target], 1, model.config.num_classes)
    (queries,), (targets,), _ = matcher.match(logits[None], boxes[None], joined)
    iou = box_iou(*(box_convert(x.float(), "cxcywh", "xyxy") for x in (boxes[0], target["boxes"])))  # (N, T)
    best = iou.max(0).values if iou.numel() else torch.zeros(0, dtype=torch.float32, device="cpu")
    scores = model.scores(logits)  # (1, N, C)
    right = scores[0, queries].argmax(-1) == target["labels"][targets]
    return best, iou[queries, targets], right, scores.max()


def _advice(report: FirstEpochReport, ap: float | None) -> str:
    """Return the problem that the numbers suggest."""
    if not report.targets:
        return (
            "The images have no targets, so there is nothing to learn. Run conditional-detr check-data on the dataset."
        )
    if report.top_score < _LOW_SCORE and report.best_iou < _LOW_IOU:
        return (
            "Neither scores nor boxes have improved: too few steps so far, or the learning rate is too low. Trained"
            " weights adapt within a few hundred steps; a transformer from scratch needs tens of epochs."
        )
    if report.top_score < _LOW_SCORE:
        return (
            "Boxes are close to the targets, but all scores are below 0.05: train for more steps, or raise the"
            " learning rate."
        )
    if report.best_iou < _LOW_IOU or report.matched < _FEW:
        return (
            "Scores rise, but boxes miss the targets: too few steps so far, or wrong boxes in the training data:"
            " x0 y0 w h instead of cx cy w h, normalised to another size than the visible image's, or not transformed"
            " with the image by an augmentation. conditional-detr check-data draws the boxes."
        )
    if report.right_class < 0.5:
        return (
            "Boxes are right, classes are not: too few steps so far, or labels that are not indices of the class head"
            " (0-based, in the order of the model's class names)."
        )
    if ap is not None and ap < 0.01:
        return (
            "The training images are learned, but the validation AP is 0: class names, box positions or preprocessing"
            " of the validation data differ from those of the training data."
        )
    return "No problem found."
