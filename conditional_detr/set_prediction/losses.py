"""The loss of a set of predictions: focal for the classes, L1 and GIoU for the boxes, at every decoder layer."""

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
from conditional_detr.set_prediction.targets import JoinedTargets, Target, move, validate_targets


@dataclass(frozen=True)
class SetLoss:
    """The loss between an output and targets, each target matched with one query at every decoder layer.

    Every layer counts alike: the layers before the last are the auxiliary losses, which only read what the forward
    computes anyway. There are no parameters, and no modes.

    Attributes:
        class_weight: of the focal loss in the total.
        l1_weight: of the L1 loss in the total.
        giou_weight: of the GIoU loss in the total.
        alpha: α of the focal loss, the weight of "this class" against "not this class".
        gamma: γ of the focal loss, its exponent.
        matcher: pairs queries with targets.

    Raises:
        TypeError: a coefficient that is no number, a matcher of another type.
        ValueError: a coefficient that is negative or not finite, or alpha outside [0, 1].
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
        """Compute the losses, in float32 where the output is in half precision.

        Sums over queries and classes are divided by the number of target boxes, at least 1. Under torch.distributed
        that is the mean over the processes, so that gradients averaged over them are those of the joined batch: every
        process has to call it.

        Args:
            output: logits (L, B, N, C) and boxes (L, B, N, 4) cx cy w h, of the model in either mode.
            targets: one an image, {"labels": (T,) int64, "boxes": (T, 4) cx cy w h in [0, 1] of the visible
                image}, on the CPU; elsewhere checking them waits for the device.

        Returns:
            "class", "l1", "giou": (L,) each, unweighted, the last decoder layer last; "total": the scalar to
            differentiate, all of them weighted.

        Raises:
            TypeError: no output; targets of the wrong type.
            ValueError: shapes that do not fit each other, targets that do not fit, predictions that are not finite.
        """
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(f"output: expected an Output of logits and boxes, got {type(output).__name__}")
        logits, boxes = output
        check_predictions(logits, boxes)
        if logits.dim() != 4:
            raise ValueError(f"logits: expected (L, B, N, C), got {tuple(logits.shape)}; of one layer, logits[None]")
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
        """Return each loss of each layer (L,), not yet divided by the number of boxes."""
        device = logits.device
        labels, wanted = joined.labels[matches.targets], joined.boxes[matches.targets].to(boxes.dtype)  # (L, K), 4
        places = torch.stack((matches.images.expand_as(labels), matches.queries, labels))
        (images, queries, labels), wanted = move(places, device), move(wanted, device)
        layers = torch.arange(len(logits), device=device)[:, None]
        found = boxes[layers, images, queries]  # (L, K, 4)
        giou = generalized_iou(*(box_convert(x, "cxcywh", "xyxy") for x in (found, wanted)))
        return {
            "class": focal_loss(logits, (layers, images, queries, labels), self.alpha, self.gamma),
            "l1": (found - wanted).abs().sum((1, 2)),
            "giou": (1 - giou).sum(1),
        }


def focal_loss(logits: Tensor, matched: tuple[Tensor, ...], alpha: float, gamma: float) -> Tensor:
    """Sum the focal loss of every layer: -α (1-p)^γ log p where query and class are matched, else -(1-α) p^γ log(1-p).

    Args:
        logits: (L, B, N, C), float32 or wider.
        matched: index into the logits, of (L, K) entries.
        alpha: α.
        gamma: γ.

    Returns:
        (L,).
    """
    return _FocalLoss.apply(logits, matched, alpha, gamma)


class _FocalLoss(torch.autograd.Function):
    """Value and derivative in one go, because they share their factors.

    The logits are the largest tensor of the loss: autograd would go through it three times as often. Almost no entry
    is matched, so all are computed as if none were, and the matched ones put in their place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matched: tuple[Tensor, ...], alpha: float, gamma: float) -> Tensor:
        """Sum (L, ...) to (L,)."""
        value, derivative = _negative_term(x, 1 - alpha, gamma)
        value[matched], turned = _negative_term(x[matched].neg(), alpha, gamma)  # the positive term is it at -x
        derivative[matched] = -turned
        ctx.save_for_backward(derivative)
        return value.flatten(1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Spread the gradient (L,) over the entries (L, ...)."""
        (derivative,) = ctx.saved_tensors
        return derivative * gradient.view(-1, *[1] * (derivative.dim() - 1)), None, None, None


def _negative_term(x: Tensor, weight: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return p^γ s and its derivative p^γ (γ q s + p), weighted, where p = σ(x), q = 1-p, s = softplus(x) = -log q.

    With s = p · log(q) / (q-1): a logarithm costs a fourth of the log1p in softplus, and loses nothing, because the
    rounding of q where it is near 1 cancels in the quotient (Kahan). All in place: memory is what takes time here.
    """
    limits = torch.finfo(x.dtype)
    p = x.sigmoid()
    q = x.neg().sigmoid_().clamp_(limits.tiny, 1 - limits.eps / 2)  # so that log(q) and q-1 are neither 0 nor infinite
    s = q.log().mul_(p).div_(q.sub_(1))
    torch.maximum(s, x, out=s)  # softplus is above x everywhere, and is x where q is cut off
    factor = (p**gamma).mul_(weight)
    derivative = q.add_(1).mul_(s).mul_(gamma).add_(p).mul_(factor)
    return s.mul_(factor), derivative


def boxes_per_process(count: int, device: torch.device) -> Tensor | float:
    """Return the number of boxes, at least 1; under torch.distributed its mean over the processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return max(count, 1.0)
    total = torch.tensor(float(count), device=device)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).clamp(min=1)
