"""Class scores of a query from its logits: an independent score for each class, or one distribution over the classes.

A network has one of these parts. The rows of its class head, the detections of its queries and the initial weights of
the class head follow from it.
"""

import math
from typing import Protocol

from torch import Tensor, nn

_PRIOR_PROBABILITY = 0.01  # score of every class before training (focal loss paper, section 4.1)


class ClassScores(Protocol):
    """How the logits of a class head become scores of classes."""

    def rows(self, num_classes: int) -> int:
        """Return the number of rows of a class head for C classes."""

    def num_classes(self, rows: int) -> int:
        """Return C for a class head of some rows."""

    def initialise(self, class_head: nn.Linear) -> None:
        """Initialise the class head of an untrained network, in place."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the scores (..., C) of logits (..., rows), in [0, 1]."""

    def best(self, logits: Tensor, reported: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the detections with the highest scores of each image.

        Args:
            logits: (B, N, rows).
            reported: (R,) int64, the classes to report.
            top_k: maximum number of detections per image.

        Returns:
            scores, labels and queries, (B, K) each, the highest score first.
        """


class SigmoidScores:
    """An independent score for each class, the sigmoid of its logit (focal loss paper, section 3).

    The head has one row per class. Detections are pairs of a query and a class, so a query may give several.
    """

    def rows(self, num_classes: int) -> int:
        """Return C."""
        return num_classes

    def num_classes(self, rows: int) -> int:
        """Return the number of rows."""
        return rows

    def initialise(self, class_head: nn.Linear) -> None:
        """Set the biases such that every score is the prior probability 0.01: -log(99)."""
        nn.init.constant_(class_head.bias, -math.log((1 - _PRIOR_PROBABILITY) / _PRIOR_PROBABILITY))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the sigmoid of logits (..., C)."""
        return logits.sigmoid()

    def best(self, logits: Tensor, reported: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best pairs of a query and a reported class; K = min(top_k, N·R)."""
        scores = logits[..., reported].sigmoid().flatten(1)  # (B, N·R)
        scores, pairs = scores.topk(min(top_k, scores.shape[1]))
        return scores, reported[pairs % reported.shape[0]], pairs // reported.shape[0]


class SoftmaxScores:
    """One distribution over the classes and "no object", the softmax of all logits (DETR paper, section 3.1).

    The last row of the head is "no object", which is never detected. A query gives one detection, of its best class.
    """

    def rows(self, num_classes: int) -> int:
        """Return C + 1."""
        return num_classes + 1

    def num_classes(self, rows: int) -> int:
        """Return the number of rows without that of "no object"."""
        return rows - 1

    def initialise(self, class_head: nn.Linear) -> None:
        """Leave the initialisation of ``nn.Linear``, as the authors of DETR do."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the softmax of logits (..., C + 1) without its last column."""
        return logits.softmax(-1)[..., :-1]

    def best(self, logits: Tensor, reported: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best class of the best queries; K = min(top_k, N).

        A query whose best class is not reported has the score 0.
        """
        scores, labels = self(logits).max(-1)  # (B, N)
        scores = scores * (labels[..., None] == reported).any(-1)
        scores, queries = scores.topk(min(top_k, scores.shape[1]))
        return scores, labels.gather(1, queries), queries
