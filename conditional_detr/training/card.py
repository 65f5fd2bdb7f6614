"""What the folder of a training run says about its checkpoints, for their model cards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conditional_detr.checkpoints.model_card import CURVES, CardDetails
from conditional_detr.training.checkpoints import BEST, LAST, read_training_state
from conditional_detr.training.curves import read_log
from conditional_detr.training.logging import LOG

_RECIPE = (
    *("images", "epochs", "batch_size", "accumulation", "processes", "lr", "backbone_lr", "weight_decay", "warmup"),
    *("schedule", "drop_at", "clip", "ema", "query_groups", "autocast", "seed", "augmentation"),
)


def details_of_run(checkpoint: Path) -> CardDetails:
    """Read the recipe, the metrics and the curves of a checkpoint of a run.

    Args:
        checkpoint: the folder ``best`` or ``last`` of a run.

    Returns:
        The details; without those whose files are missing, and empty ones for another folder.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file has other content than that of a run.
    """
    run = checkpoint.absolute().parent
    if checkpoint.absolute().name not in (BEST, LAST):
        return CardDetails()
    state = read_training_state(run, mmap=True)
    if state is None:
        return CardDetails()
    curves = run / CURVES
    return CardDetails(
        recipe={**_recipe(state["settings"]), "steps": state["step"]},
        evaluation=_metrics(run / LOG, checkpoint.absolute().name),
        curves=curves if curves.is_file() else None,
    )


def _recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that a reader needs to repeat it."""
    return {name.replace("_", " "): settings[name] for name in _RECIPE if settings.get(name) is not None}


def _metrics(log: Path, name: str) -> dict[str, Any]:
    """Return the metrics of a run's checkpoint on the validation data: of the best evaluation, or of the last one."""
    if not log.is_file():
        return {}
    evaluated = [entry for entry in read_log(log) if "AP" in entry]
    if not evaluated:
        return {}
    chosen = max(evaluated, key=lambda entry: entry["AP"]) if name == BEST else evaluated[-1]
    return {**chosen, "per_class": {label: {"AP": ap} for label, ap in chosen.get("per_class", {}).items()}}
