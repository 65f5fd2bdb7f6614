"""What the folder of a training run says about its checkpoints, for their model cards, and the card in that folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conditional_detr.checkpoints.files import CONFIG
from conditional_detr.checkpoints.model_card import CARD, CURVES, CardDetails, is_generated, make_card
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.paths import expand_home
from conditional_detr.training.checkpoints import BEST, LAST, STATE, read_training_state
from conditional_detr.training.curves import read_log
from conditional_detr.training.logging import LOG
from conditional_detr.training.result import TrainResult

_RECIPE = (
    *("epochs", "batch_size", "accumulation", "processes", "lr", "backbone_lr", "weight_decay", "warmup"),
    *("schedule", "drop_at", "clip", "ema", "query_groups", "autocast", "seed", "augmentation"),
)


def write_card(model: DetectionTransformer, result: TrainResult) -> Path | None:
    """Write the model card of a run, ``README.md`` in its folder, about the best checkpoint, or else the last one.

    Args:
        model: the trained model.
        result: of the run.

    Returns:
        The card; None: there is one that somebody has written, and it stays.

    Raises:
        OSError: a file cannot be read or written.
    """
    card = result.folder / CARD
    if os.path.lexists(card) and not is_generated(card):
        return None
    checkpoint = result.best or result.last
    text = make_card(model, details_of_run(checkpoint), name=str(checkpoint))
    write_atomically({card: lambda path: path.write_text(text, encoding="utf-8")})
    return card


def checkpoint_of_run(weights: str) -> str:
    """Return the best checkpoint of a run's folder, or else the last one; anything else as it is."""
    folder = expand_home(weights)
    if (folder / CONFIG).exists() or not (folder / LAST / STATE).is_file():
        return weights
    return str(folder / (BEST if (folder / BEST / CONFIG).is_file() else LAST))


def written_card(checkpoint: Path) -> Path | None:
    """Return the card that somebody has written, beside a checkpoint or in the folder of its run."""
    run = checkpoint.absolute().parent
    folders = [checkpoint]
    if checkpoint.absolute().name in (BEST, LAST) and (run / LAST / STATE).is_file():
        folders.append(run)
    cards = (folder / CARD for folder in folders)
    return next((card for card in cards if card.is_file() and not is_generated(card)), None)


def details_of_run(checkpoint: Path) -> CardDetails:
    """Read the data, the recipe, the metrics and the curves of a checkpoint of a run.

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
        data=f"{state['settings']['images']} images with the classes above",
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
