"""Compute the set loss: focal loss for classes, L1 and GIoU loss for boxes, at every decoder layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torchvision.ops import box_convert

from conditional_detr.modeling.conditional_detr import Output
from conditional_detr.modeling.layers import at_least_float32
from conditional_detr.set_prediction.boxes import generalized_iou
from conditional_detr.set_prediction.matcher import HungarianMatcher, Matches, check_coefficients, check_predictions
from conditional_detr.set_prediction.targets import JoinedTargets, Target, copy_to_device, validate_targets


@dataclass(frozen=True)
class SetLoss:
    """Loss between an output and targets, where each target is matched with one query at every decoder layer.

    All layers have equal weight: the layers before the last are the auxiliary losses, and need no extra forward
    computation. There are no parameters and no modes.

    Attributes:
        class_weight: weight of the focal loss in the total.
        l1_weight: weight of the L1 loss in the total.
        giou_weight: weight of the GIoU loss in the total.
        alpha: α of the focal loss, the weight of "this class" against "not this class".
        gamma: γ of the focal loss, its exponent.
        matcher: matches queries with targets.

    Raises:
        TypeError: a coefficient is not a number, or the matcher is not a HungarianMatcher.
        ValueError: a coefficient is negative or not finite, or alpha is outside [0, 1].
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    matcher: HungarianMatcher = field(default_factory=HungarianMatcher)

    def __post_init__(self) -> None:
        if not isinstance(self.matcher, HungarianMatcher):
            raise TypeError(f"matcher: expected a HungarianMatcher, got {type(self.matcher).__name__}")
        check_coefficients({f.name: getattr(self, f.name) for f in fields(self) if f.name != "matcher"})

    def __call__(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Compute the losses; half precision is computed in float32.

        Sums over queries and classes are divided by the number of target boxes, at least 1. Under torch.distributed
        this is the mean number over all processes, so that averaged gradients equal those of the joined batch: every
        process must call it.

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
        joined = validate_targets(targets, logits.shape[1], logits.shape[3])
        with torch.autocast(logits.device.type, enabled=False):
            logits, boxes = at_least_float32(logits), at_least_float32(boxes)
            count = boxes_per_process(len(joined.labels), logits.device)
            matches = self.matcher.match(logits, boxes, joined)
            losses = {name: sums / count for name, sums in self._sums(logits, boxes, joined, matches).items()}
            total = self.class_weight * losses["class"] + self.l1_weight * losses["l1"]
            total = (total + self.giou_weight * losses["giou"]).sum()
        return {**losses, "total": total}

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
            "class": focal_loss(logits, (layers, images, queries, labels), self.alpha, self.gamma),
            "l1": (predicted - target).abs().sum((1, 2)),
            "giou": (1 - giou).sum(1),
        }


def focal_loss(logits: Tensor, matched: tuple[Tensor, ...], alpha: float, gamma: float) -> Tensor:
    """Sum the focal loss of every layer: -α (1-p)^γ log p where query and class are matched, else -(1-α) p^γ log(1-p).

    Args:
        logits: (L, B, N, C), float32 or wider.
        matched: index of the matched logits, tensors of (L, K) per dimension.
        alpha: α.
        gamma: γ.

    Returns:
        (L,).
    """
    return _FocalLoss.apply(logits, matched, alpha, gamma)


class _FocalLoss(torch.autograd.Function):
    """Compute value and derivative together, because they share their factors.

    The logits are the largest tensor of the loss, and autograd would read it three times as often. Almost no logit is
    matched, so all are first computed as unmatched, and the matched ones are then replaced.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matched: tuple[Tensor, ...], alpha: float, gamma: float) -> Tensor:
        """Sum (L, ...) to (L,)."""
        value, derivative = _negative_term(x, 1 - alpha, gamma)
        value[matched], negated = _negative_term(x[matched].neg(), alpha, gamma)  # the positive term, at -x
        derivative[matched] = -negated
        ctx.save_for_backward(derivative)
        return value.flatten(1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Multiply the derivative (L, ...) by the gradient (L,)."""
        (derivative,) = ctx.saved_tensors
        return derivative * gradient.view(-1, *[1] * (derivative.dim() - 1)), None, None, None


def _negative_term(x: Tensor, weight: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return p^γ s and its derivative p^γ (γ q s + p), weighted, where p = σ(x), q = 1-p, s = softplus(x) = -log q.

    s = p · log(q) / (q-1): a logarithm costs a fourth of the log1p in softplus and is as exact, because the rounding
    error of q near 1 cancels in the quotient (Kahan). All operations are in place, because memory limits the speed.
    """
    limits = torch.finfo(x.dtype)
    p = x.sigmoid()
    q = x.neg().sigmoid_().clamp_(limits.tiny, 1 - limits.eps / 2)  # log(q) and q-1 stay finite and nonzero
    s = q.log().mul_(p).div_(q.sub_(1))
    torch.maximum(s, x, out=s)  # softplus > x everywhere, and equals x where q is clamped
    factor = (p**gamma).mul_(weight)
    derivative = q.add_(1).mul_(s).mul_(gamma).add_(p).mul_(factor)
    return s.mul_(factor), derivative


def boxes_per_process(count: int, device: torch.device) -> Tensor | float:
    """Return the number of boxes, at least 1; under torch.distributed the mean over all processes, at least 1."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return max(count, 1.0)
    total = torch.tensor(float(count), dtype=torch.float32, device=device)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).clamp(min=1)
