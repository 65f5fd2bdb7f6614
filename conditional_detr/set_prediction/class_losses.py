"""Class losses: how the logits of a class head are compared with targets, in the loss and in the matching cost.

A loss and its matcher have one of these parts: :class:`FocalLoss` for independent scores of the classes, or
:class:`SoftmaxLoss` for one distribution over the classes and "no object".
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SMALLEST_PROBABILITY = 1e-8  # the authors' bound: a class with score 0 costs 18.4 instead of infinity


class ClassLoss(Protocol):
    """Compare logits with the classes of targets.

    Attributes:
        least: smallest value of a normaliser.
    """

    least: ClassVar[float]

    def num_classes(self, rows: int) -> int:
        """Return C, the number of possible labels, for logits of a class head with some rows."""

    def cost(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the cost of each target's class with each query of its image.

        Args:
            logits: (L, B, N, rows), float32 or wider.
            images: (K,) int64, index of each target's image.
            labels: (K,) int64.

        Returns:
            (K, L, N).
        """

    def sums(self, logits: Tensor, matched: tuple[Tensor, ...]) -> Tensor:
        """Sum the loss of every layer.

        Args:
            logits: (L, B, N, rows), float32 or wider.
            matched: index of the matched logits, tensors of (L, K) per dimension; the last one is the labels.

        Returns:
            (L,).
        """

    def normaliser(self, boxes: int, matched: int, queries: int) -> float:
        """Return the divisor of the sums, before the mean over processes.

        Args:
            boxes: number of targets.
            matched: number of targets that are matched; fewer, where an image has more targets than queries.
            queries: number of queries of all images.
        """


@dataclass(frozen=True)
class FocalLoss:
    """Focal loss of independent scores: -α (1-p)^γ log p for the target's class, else -(1-α) p^γ log(1-p).

    The sum over queries and classes is divided by the number of target boxes, at least 1.

    Attributes:
        alpha: α, the weight of "this class" against "not this class".
        gamma: γ, the exponent.
        class_weights: a factor of each class's loss, of both of its terms; None: 1 for all.

    Raises:
        TypeError: a coefficient is not a number.
        ValueError: a coefficient is negative or not finite, or alpha is above 1.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    class_weights: tuple[float, ...] | None = field(default=None, repr=False)
    least: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_coefficients({"alpha": self.alpha, "gamma": self.gamma})
        _check_class_weights(self.class_weights)

    def num_classes(self, rows: int) -> int:
        """Return the number of rows."""
        return rows

    def cost(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of "this class" minus that of "not this class" (K, L, N), as the authors do.

        q = 1-p is computed as a sigmoid, so that both logarithms are as exact as a log-sigmoid, and bounded.
        """
        x = logits[:, images, :, labels]  # (K, L, N)
        p, q = x.sigmoid(), (-x).sigmoid()
        this = self.alpha * q**self.gamma * -(p + _SMALLEST_PROBABILITY).log()
        other = (1 - self.alpha) * p**self.gamma * -(q + _SMALLEST_PROBABILITY).log()
        return this - other

    def sums(self, logits: Tensor, matched: tuple[Tensor, ...]) -> Tensor:
        """Sum over queries and classes: (L,)."""
        return _FocalSum.apply(logits, matched, self.alpha, self.gamma, _weights(self.class_weights, logits))

    def normaliser(self, boxes: int, matched: int, queries: int) -> float:
        """Return the number of boxes."""
        return float(boxes)


@dataclass(frozen=True)
class SoftmaxLoss:
    """Cross-entropy over the classes and "no object", the last row of the class head (DETR paper, section 3.1).

    The target of a query that is not matched is "no object". The loss is the weighted mean over all queries.

    Attributes:
        no_object: weight of the queries whose target is "no object"; the others have weight 1.
        class_weights: a factor of the loss of queries whose target is of a class; None: 1 for all. The
            divisor of the weighted mean is that of weights of 1.

    Raises:
        TypeError: the weight is not a number.
        ValueError: the weight is negative or not finite.
    """

    no_object: float = 0.1
    class_weights: tuple[float, ...] | None = field(default=None, repr=False)
    least: ClassVar[float] = 1e-6  # reached only if all weights are 0, and so is the sum

    def __post_init__(self) -> None:
        check_coefficients({"no_object": self.no_object})
        _check_class_weights(self.class_weights)

    def num_classes(self, rows: int) -> int:
        """Return the number of rows without that of "no object"."""
        return rows - 1

    def cost(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return -p (K, L, N), with p the softmax at the target's class."""
        return -logits.softmax(-1)[:, images, :, labels]

    def sums(self, logits: Tensor, matched: tuple[Tensor, ...]) -> Tensor:
        """Sum the weighted cross-entropy over queries: (L,)."""
        return _SoftmaxSum.apply(logits, matched, self.no_object, _weights(self.class_weights, logits[..., 1:]))

    def normaliser(self, boxes: int, matched: int, queries: int) -> float:
        """Return the sum of the weights of all queries."""
        return matched + self.no_object * (queries - matched)


def check_coefficients(coefficients: dict[str, Any]) -> None:
    """Raise TypeError or ValueError unless all are numbers, finite and not negative, and alpha is at most 1."""
    for name, value in coefficients.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not (0 <= value < math.inf) or (name == "alpha" and value > 1):
            raise ValueError(f"{name}: expected {'0..1' if name == 'alpha' else 'at least 0'}, got {value}")


def _check_class_weights(weights: Any) -> None:
    """Raise TypeError or ValueError unless weights are None or a tuple of numbers of at least 0."""
    if weights is None:
        return
    if not isinstance(weights, tuple):
        raise TypeError(f"class_weights: expected a tuple of numbers, one per class, got {weights!r}")
    check_coefficients({f"class_weights[{i}]": weight for i, weight in enumerate(weights)})


def _weights(weights: tuple[float, ...] | None, logits: Tensor) -> Tensor | None:
    """Return the weights of the classes as a tensor (C,); logits: (..., C), of the classes alone.

    Raises:
        ValueError: there are more or fewer weights than classes.
    """
    if weights is None:
        return None
    if len(weights) != logits.shape[-1]:
        raise ValueError(f"class_weights: expected {logits.shape[-1]}, one per class, got {len(weights)}")
    return logits.new_tensor(weights)


class _FocalSum(torch.autograd.Function):
    """Compute value and derivative together, because they share their factors.

    The logits are the largest tensor of the loss, and autograd would read it three times as often. Almost no logit is
    matched, so all are first computed as unmatched, and the matched ones are then replaced.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, matched: tuple[Tensor, ...], alpha: float, gamma: float, weights: Tensor | None
    ) -> Tensor:
        """Sum (L, ...) to (L,)."""
        value, derivative = _negative_term(x, 1 - alpha, gamma)
        value[matched], negated = _negative_term(x[matched].neg(), alpha, gamma)  # the positive term, at -x
        derivative[matched] = -negated
        if weights is not None:
            value, derivative = value.mul_(weights), derivative.mul_(weights)
        ctx.save_for_backward(derivative)
        return value.flatten(1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Multiply the derivative (L, ...) by the gradient (L,)."""
        return _chain(ctx.saved_tensors[0], gradient), None, None, None, None


class _SoftmaxSum(torch.autograd.Function):
    """Compute value and derivative together, from one softmax of the largest tensor of the loss.

    Almost no query is matched, so all are first computed as "no object", and the matched ones are then replaced.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matched: tuple[Tensor, ...], no_object: float, weights: Tensor | None) -> Tensor:
        """Sum (L, B, N, C + 1) to (L,)."""
        queries, labels = matched[:-1], matched[-1]
        p = x.softmax(-1)
        normaliser = x.amax(-1) - p.amax(-1).log()  # log Σ exp(x): the largest p is never near 0
        value = (normaliser - x[..., -1]).mul_(no_object)
        of_class = 1.0 if weights is None else weights[labels]
        value[queries] = (normaliser[queries] - x[matched]) * of_class
        of_matched, label = p[queries], labels[..., None]  # (L, K, C + 1), (L, K, 1)
        of_matched.scatter_(-1, label, of_matched.gather(-1, label) - 1)
        derivative = p.mul_(no_object)
        derivative[..., -1] -= no_object
        derivative[queries] = of_matched if weights is None else of_matched * weights[label]
        ctx.save_for_backward(derivative)
        return value.flatten(1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Multiply the derivative (L, ...) by the gradient (L,)."""
        return _chain(ctx.saved_tensors[0], gradient), None, None, None


def _chain(derivative: Tensor, gradient: Tensor) -> Tensor:
    """Multiply the derivative (L, ...) by the gradient (L,)."""
    return derivative * gradient.view(-1, *[1] * (derivative.dim() - 1))


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
