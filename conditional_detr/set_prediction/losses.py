"""Compute the set loss: a class loss, L1 and GIoU loss for boxes, at every decoder layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torchvision.ops import box_convert

from conditional_detr.modeling.detection_transformer import DetectionTransformer, Output
from conditional_detr.modeling.layers import at_least_float32
from conditional_detr.set_prediction.boxes import generalized_iou
from conditional_detr.set_prediction.class_losses import ClassLoss, FocalLoss, check_coefficients
from conditional_detr.set_prediction.matcher import (
    HungarianMatcher,
    Matcher,
    Matches,
    check_matches,
    check_predictions,
)
from conditional_detr.set_prediction.targets import JoinedTargets, Target, copy_to_device, validate_targets


class Normalisers(NamedTuple):
    """Divisors of the sums of the losses: those of the class loss, and the number of boxes.

    Attributes:
        of_classes: divisor of the class loss.
        boxes: divisor of the L1 and the GIoU loss.
    """

    of_classes: Tensor | float
    boxes: Tensor | float


@dataclass(frozen=True)
class SetLoss:
    """Loss between an output and targets, where each target is matched with one query at every decoder layer.

    All layers have equal weight: the layers before the last are the auxiliary losses, and need no extra forward
    computation. There are no parameters and no modes.

    Attributes:
        class_weight: weight of the class loss in the total.
        l1_weight: weight of the L1 loss in the total.
        giou_weight: weight of the GIoU loss in the total.
        class_loss: the class loss, of the kind that the network's class scores need.
        matcher: matches queries with targets: a HungarianMatcher, whose class loss must be for the same rows of the
            class head, or any :class:`~conditional_detr.set_prediction.matcher.Matcher`.
        normalisers: divisors of a larger batch, from :meth:`normalisers_of`, so that the losses of its parts add up;
            None: those of each batch.

    Raises:
        TypeError: a weight is not a number, or the matcher has no ``match``.
        ValueError: a weight is negative or not finite, or the matcher's class loss is of another kind.
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    class_loss: ClassLoss = field(default_factory=FocalLoss)
    matcher: Matcher = field(default_factory=HungarianMatcher)
    normalisers: Normalisers | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(getattr(self.matcher, "match", None)):
            got = type(self.matcher).__name__
            raise TypeError(f"matcher: expected a HungarianMatcher, or an object with match(), got {got}")
        check_coefficients({name: getattr(self, name) for name in ("class_weight", "l1_weight", "giou_weight")})
        if not isinstance(self.matcher, HungarianMatcher):
            return
        if self.class_loss.num_classes(2) != self.matcher.class_loss.num_classes(2):
            kind, other = type(self.class_loss).__name__, type(self.matcher.class_loss).__name__
            raise ValueError(f"matcher: expected one with the class loss {kind}, got {other}")

    @classmethod
    def for_model(cls, model: DetectionTransformer) -> "SetLoss":
        """Return the loss of the model's paper, with its matcher.

        ConditionalDETR: focal loss with weights 2, 5, 2. DETR: cross-entropy over the classes and "no object", the
        latter with weight 0.1, and weights 1, 5, 2.
        """
        matcher = HungarianMatcher.for_model(model)
        return cls(class_weight=matcher.class_cost, class_loss=matcher.class_loss, matcher=matcher)

    def __call__(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Compute the losses; half precision is computed in float32.

        The sums of the L1 and GIoU losses are divided by the number of target boxes, at least 1, and that of the class
        loss by its own normaliser. Under torch.distributed these are means over all processes, so that averaged
        gradients equal those of the joined batch: every process must call it.

        Args:
            output: logits (L, B, N, C) and boxes (L, B, N, 4) cx cy w h, of the model in train or eval mode.
            targets: one per image, {"labels": (T,) int64, "boxes": (T, 4) cx cy w h in [0, 1] of the visible
                image}, on the CPU; on another device, validation waits for the device.

        Returns:
            "class", "l1", "giou": (L,) each, unweighted, the last decoder layer last; "total": the weighted sum, a
            scalar to differentiate.

        Raises:
            TypeError: the output is not an Output, or targets have the wrong type.
            ValueError: shapes do not fit each other, targets are invalid, or predictions are not finite.
        """
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(f"output: expected an Output of logits and boxes, got {type(output).__name__}")
        logits, boxes = output
        check_predictions(logits, boxes)
        if logits.dim() != 4:
            raise ValueError(f"logits: expected (L, B, N, C), got {tuple(logits.shape)}; for one layer: logits[None]")
        joined = validate_targets(targets, logits.shape[1], self.class_loss.num_classes(logits.shape[3]))
        with torch.autocast(logits.device.type, enabled=False):
            logits, boxes = at_least_float32(logits), at_least_float32(boxes)
            divisors = self.normalisers or self.normalisers_of(joined.counts, logits.shape[2], logits.device)
            matches = self._match(logits, boxes, joined)
            sums = self._sums(logits, boxes, joined, matches)
            losses = {
                name: x / (divisors.of_classes if name == "class" else divisors.boxes) for name, x in sums.items()
            }
            total = self.class_weight * losses["class"] + self.l1_weight * losses["l1"]
            total = (total + self.giou_weight * losses["giou"]).sum()
        return {**losses, "total": total}

    def normalisers_of(self, counts: Sequence[int], num_queries: int, device: torch.device) -> Normalisers:
        """Return the divisors of the losses of a batch; under torch.distributed, every process must call it.

        Args:
            counts: number of targets of each image.
            num_queries: N.
            device: the device of the outputs.
        """
        matched = sum(min(count, num_queries) for count in counts)
        amounts = (self.class_loss.normaliser(sum(counts), matched, num_queries * len(counts)), float(sum(counts)))
        return Normalisers(*mean_over_processes(amounts, (self.class_loss.least, 1.0), device))

    def _match(self, logits: Tensor, boxes: Tensor, joined: JoinedTargets) -> Matches:
        """Return the matcher's pairs; those of a matcher that is not ours are checked."""
        with torch.no_grad():
            matches = self.matcher.match(logits, boxes, joined)
        if not isinstance(self.matcher, HungarianMatcher):
            check_matches(matches, len(logits), logits.shape[2], joined)
        return matches

    def _sums(self, logits: Tensor, boxes: Tensor, joined: JoinedTargets, matches: Matches) -> dict[str, Tensor]:
        """Return each loss of each layer (L,), before the division by the number of boxes."""
        device = logits.device
        labels, target = joined.labels[matches.targets], joined.boxes[matches.targets].to(boxes.dtype)  # (L, K), 4
        indices = torch.stack((matches.images.expand_as(labels), matches.queries, labels))
        (images, queries, labels), target = copy_to_device(indices, device), copy_to_device(target, device)
        layers = torch.arange(len(logits), device=device)[:, None]
        predicted = boxes[layers, images, queries]  # (L, K, 4)
        giou = generalized_iou(*(box_convert(x, "cxcywh", "xyxy") for x in (predicted, target)))
        return {
            "class": self.class_loss.sums(logits, (layers, images, queries, labels)),
            "l1": (predicted - target).abs().sum((1, 2)),
            "giou": (1 - giou).sum(1),
        }


def mean_over_processes(
    amounts: Sequence[float], least: Sequence[float], device: torch.device
) -> Sequence[Tensor | float]:
    """Return amounts, at least ``least`` of each; under torch.distributed their means over all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [max(amount, smallest) for amount, smallest in zip(amounts, least, strict=True)]
    total = torch.tensor([*amounts, *least], dtype=torch.float32, device=device)
    total, smallest = total.chunk(2)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).maximum(smallest).unbind()
