"""Assign queries to targets at minimum total cost, for every image at every decoder layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.layers import at_least_float32
from conditional_detr.modeling.scores import ClassScores, SigmoidScores, SoftmaxScores
from conditional_detr.set_prediction.boxes import generalized_iou
from conditional_detr.set_prediction.class_losses import ClassLoss, FocalLoss, SoftmaxLoss, check_coefficients
from conditional_detr.set_prediction.targets import JoinedTargets, Target, copy_to_device, validate_targets

Pairs = list[tuple[Tensor, Tensor]]
"""Query indices and target indices of each image, int64, on the CPU, in the order of the queries."""

_OF_SCORES: dict[type[ClassScores], tuple[float, ClassLoss]] = {
    SigmoidScores: (2.0, FocalLoss()),
    SoftmaxScores: (1.0, SoftmaxLoss()),
}
"""Coefficient and class loss of the papers, by the class scores of a network."""


class Matches(NamedTuple):
    """The pairs of all images at all decoder layers, K per layer, on the CPU.

    Attributes:
        queries: (L, K) int64, index of the query in its image.
        targets: (L, K) int64, index into the joined targets.
        images: (K,) int64, index of each pair's image; the same at every layer.
    """

    queries: Tensor
    targets: Tensor
    images: Tensor


class Matcher(Protocol):
    """Anything that pairs queries with targets, for :class:`~conditional_detr.set_prediction.losses.SetLoss`."""

    def match(self, logits: Tensor, boxes: Tensor, targets: JoinedTargets) -> Matches:
        """Pair queries with targets, as many at each layer, without gradients.

        A target may have several queries, and a query at most one target. The losses are divided by the number of
        targets, not of pairs.

        Args:
            logits: (L, B, N, C), float32 or wider.
            boxes: (L, B, N, 4), cx cy w h.
            targets: the validated targets.
        """


@dataclass(frozen=True)
class HungarianMatcher:
    """Match queries with targets at minimum total cost (paper, section 3.1).

    The cost of a pair is a weighted sum of three terms: the class cost, which the class loss defines; the L1 distance
    of the boxes cx cy w h; and -GIoU.

    Attributes:
        class_cost: coefficient of the class cost.
        l1_cost: coefficient of the L1 distance.
        giou_cost: coefficient of -GIoU.
        class_loss: the class loss, of the kind that the network's class scores need.

    Raises:
        TypeError: a coefficient is not a number.
        ValueError: a coefficient is negative or not finite, or all three are 0.
    """

    class_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    class_loss: ClassLoss = field(default_factory=FocalLoss)

    def __post_init__(self) -> None:
        check_coefficients({name: getattr(self, name) for name in ("class_cost", "l1_cost", "giou_cost")})
        if not any((self.class_cost, self.l1_cost, self.giou_cost)):
            raise ValueError("expected class_cost, l1_cost or giou_cost above 0, got 0 for all three")

    @classmethod
    def for_model(cls, model: DetectionTransformer) -> "HungarianMatcher":
        """Return the matcher of the model's paper.

        ConditionalDETR: focal cost, coefficients 2, 5, 2. DETR: minus the score of the class, coefficients 1, 5, 2.
        """
        class_cost, class_loss = _OF_SCORES[type(model.scores)]
        return cls(class_cost=class_cost, class_loss=class_loss)

    def __call__(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Pairs | list[Pairs]:
        """Match a batch, without gradients; half precision is computed in float32.

        Args:
            logits: (B, N, C), or (L, B, N, C) for several decoder layers at once.
            boxes: (B, N, 4), or (L, B, N, 4), cx cy w h.
            targets: one per image, {"labels": (T,) int64, "boxes": (T, 4) cx cy w h in [0, 1]}.

        Returns:
            B pairs (query indices, target indices), each (min(N, T),) int64 on the CPU; for several layers L such
            lists.

        Raises:
            TypeError: predictions are not floating point tensors, or targets have the wrong type.
            ValueError: shapes do not fit each other, targets are invalid, or predictions are not finite.
        """
        check_predictions(logits, boxes)
        joined = validate_targets(targets, logits.shape[-3], self.class_loss.num_classes(logits.shape[-1]))
        if logits.dim() == 4:
            return _per_image(self.match(logits, boxes, joined), joined)
        return _per_image(self.match(logits[None], boxes[None], joined), joined)[0]

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: JoinedTargets) -> Matches:
        """Match all layers (L, B, N, ·) with validated targets, with a single copy to the host.

        Raises:
            ValueError: predictions are not finite.
        """
        with torch.autocast(logits.device.type, enabled=False):
            cost = self.cost(logits, boxes, targets)  # (K, L, N)
            # A sum shows NaN and infinity, and is cheap to compute and to copy.
            sums = torch.stack([x.sum((2, 3), dtype=cost.dtype) for x in (logits, boxes)])  # (2, L, B)
            on_host = torch.cat((cost.flatten(), sums.flatten())).cpu()
        cost, sums = on_host[: cost.numel()].view(cost.shape), on_host[cost.numel() :]
        if not sums.isfinite().all():
            _raise_if_not_finite(logits, boxes)
        return _assign(cost.numpy(), targets.counts)

    def cost(self, logits: Tensor, boxes: Tensor, targets: JoinedTargets) -> Tensor:
        """Compute the cost of each target with each query of its image.

        Args:
            logits: (L, B, N, C).
            boxes: (L, B, N, 4) cx cy w h.
            targets: K in total.

        Returns:
            (K, L, N), float32 or wider, on the device of the predictions.
        """
        labels, images = copy_to_device(torch.stack((targets.labels, targets.images)), logits.device)
        classes = self.class_loss.cost(at_least_float32(logits), images, labels)  # (K, L, N)
        predicted = at_least_float32(boxes).transpose(0, 1)  # (B, L, N, 4)
        target = copy_to_device(targets.boxes.to(predicted.dtype), logits.device)[:, None, None]  # (K, 1, 1, 4)
        l1 = (predicted[images] - target).abs().sum(-1)
        corners = box_convert(predicted, "cxcywh", "xyxy")[images]
        giou = generalized_iou(corners, box_convert(target, "cxcywh", "xyxy"))
        return self.class_cost * classes + self.l1_cost * l1 - self.giou_cost * giou


def check_matches(matches: Matches, layers: int, num_queries: int, joined: JoinedTargets) -> None:
    """Check that pairs are of queries and targets of the same images, and each query is in one pair at most.

    Raises:
        TypeError: they are no Matches of int64 tensors on the CPU.
        ValueError: the pairs are others.
    """
    if not isinstance(matches, Matches) or not all(
        isinstance(indices, Tensor) and indices.dtype == torch.int64 and indices.device.type == "cpu"
        for indices in matches
    ):
        raise TypeError(f"matcher: expected Matches of int64 tensors on the CPU, got {matches!r}")
    queries, targets, images = matches
    if not queries.shape == targets.shape == (layers, len(images)):
        got = f"{tuple(queries.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"matcher: expected queries and targets {(layers, len(images))}, got {got}")
    for name, indices, count in (("queries", queries, num_queries), ("targets", targets, len(joined.labels))):
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
            got = f"{int(indices.min())}..{int(indices.max())}"
            raise ValueError(f"matcher: expected {name} in 0..{count - 1}, got {got}")
    if not torch.equal(joined.images[targets], images.expand_as(targets)):
        raise ValueError("matcher: expected pairs of a query and a target of the same image, got others")
    for layer, pairs in enumerate(images * num_queries + queries):
        if len(pairs.unique()) < len(pairs):
            raise ValueError(f"matcher: expected each query in at most one pair, got one in several at layer {layer}")


def check_predictions(logits: Tensor, boxes: Tensor) -> None:
    """Raise TypeError or ValueError unless logits are (B, N, C) or (L, B, N, C) floats and boxes match them."""
    for name, value in (("logits", logits), ("boxes", boxes)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a floating point tensor, got {got}")
    if logits.dim() not in (3, 4) or 0 in logits.shape:
        raise ValueError(
            f"logits: expected (B, N, C) or (L, B, N, C) without empty dimensions, got {tuple(logits.shape)}"
        )
    if boxes.shape != (*logits.shape[:-1], 4):
        raise ValueError(
            f"boxes: expected {(*logits.shape[:-1], 4)} for logits {tuple(logits.shape)}, got {tuple(boxes.shape)}"
        )
    if boxes.device != logits.device:
        raise ValueError(f"boxes: expected the device of the logits, {logits.device}, got {boxes.device}")


def _assign(cost: np.ndarray, counts: tuple[int, ...]) -> Matches:
    """Solve the assignment of every image at every layer from the costs (K, L, N)."""
    from scipy.optimize import linear_sum_assignment

    layers, num_queries = cost.shape[1:]
    sizes = [min(count, num_queries) for count in counts]
    queries, targets = np.empty((2, layers, sum(sizes)), dtype=np.int64)
    start = end = 0
    for count, size in zip(counts, sizes, strict=True):
        for layer in range(layers if count else 0):
            rows, columns = linear_sum_assignment(cost[start : start + count, layer].T)
            queries[layer, end : end + size], targets[layer, end : end + size] = rows, columns + start
        start, end = start + count, end + size
    images = torch.from_numpy(np.arange(len(sizes)).repeat(sizes))
    return Matches(torch.from_numpy(queries), torch.from_numpy(targets), images)


def _per_image(matches: Matches, joined: JoinedTargets) -> list[Pairs]:
    """Split matches by layer and image, with target indices that start at 0 in each image."""
    sizes = matches.images.bincount(minlength=len(joined.counts)).tolist()
    counts = torch.tensor(joined.counts, dtype=torch.int64, device="cpu")
    starts = counts.cumsum(0) - counts
    indices = matches.targets - starts[matches.images]
    per_image = zip(matches.queries.split(sizes, 1), indices.split(sizes, 1), strict=True)
    layers = [list(zip(queries.unbind(), targets.unbind(), strict=True)) for queries, targets in per_image]
    return [list(pairs) for pairs in zip(*layers, strict=True)]


def _raise_if_not_finite(logits: Tensor, boxes: Tensor) -> None:
    """Raise ValueError that lists images, heads and layers; return if only the sums overflowed."""
    problems: dict[int, list[str]] = {}
    for head, values in (("class head's logits", logits), ("box head's boxes", boxes)):
        not_finite = ~values.isfinite().flatten(2).all(2)  # (L, B)
        for image in not_finite.any(0).nonzero().flatten().tolist():
            layers = ", ".join(str(layer) for layer in not_finite[:, image].nonzero().flatten().tolist())
            kind = "NaN" if values[:, image].isnan().any() else "infinity"
            problems.setdefault(image, []).append(f"{kind} in the {head} at decoder layer {layers}")
    if not problems:
        return
    image, *others = sorted(problems)
    also = f"; also not finite: {', '.join(f'images[{i}]' for i in others)}" if others else ""
    raise ValueError(
        f"images[{image}]: expected finite predictions for this image, got {' and '.join(problems[image])}{also};"
        " training diverged, or float16 overflowed: lower the learning rate, clip gradients, or use bfloat16"
    )
