"""Result of a training run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conditional_detr.training.first_epoch import FirstEpochReport


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        folder: the folder of the run, with ``log.jsonl``, ``curves.png``, ``tensorboard``, ``last`` and ``best``.
        last: checkpoint of the last step, with the training state to resume from.
        best: checkpoint with the best AP; None without validation data.
        best_ap: AP of ``best``.
        steps: number of completed steps.
        history: a dict an epoch: epoch, step, mean_loss, seconds and, if it was evaluated, COCO's twelve metrics.
        first_epoch: the check after the first epoch; None if this process did not train the first epoch.
        stopped_early: whether training stopped because AP had not improved for ``patience`` evaluations.
    """

    folder: Path
    last: Path
    best: Path | None
    best_ap: float | None
    steps: int
    history: tuple[dict[str, Any], ...]
    first_epoch: FirstEpochReport | None
    stopped_early: bool
