"""Checkpoints of a training run: weights in the published format, and the training state beside them.

``last`` holds the weights of the last checkpoint and the training state, ``best`` the weights with the best AP. All
files of a checkpoint are complete before the first one is moved into its folder, so a process that is killed leaves
the previous checkpoint intact. The training state is complete in itself: the weights beside it are not read on resume.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditional_detr.checkpoints.saving import write_tensors, writers_of
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.system.atomic_files import recover

LAST = "last"
BEST = "best"
STATE = "training_state.pt"
FORMAT = 2
"""Format number of the training state. States of version 0.1.0 have none; they are upgraded when they are read."""
CHANGEABLE = ("workers", "save_every", "epochs", "patience", "evaluate_every", "gradient_checkpointing")
"""Settings that may change on resume. Any other setting would change the numbers of the run."""


@dataclass
class Progress:
    """Progress of a training run.

    Attributes:
        step: number of completed steps.
        epoch: number of completed epochs.
        batch: number of completed batches of the current epoch.
        best: best AP so far; None before the first evaluation.
        stale: number of evaluations since the best AP.
        history: a dict an epoch, as in :class:`~conditional_detr.training.loop.TrainResult`.
        losses: loss of each completed step of the current epoch.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all attributes, by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all attributes from the result of :meth:`state_dict`; other keys are ignored."""
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.best, self.stale = state["best"], state["stale"]
        self.history, self.losses = list(state["history"]), list(state["losses"])


def save_checkpoint(model: ConditionalDETR, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write weights in the published format, and optionally a training state; all files or none.

    Raises:
        OSError: a file cannot be written.
        ValueError: weights that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers = writers_of(model, folder)
    if state is not None:
        writers[folder / STATE] = partial(torch.save, {"format": FORMAT, **state})
    write_tensors(writers)


def load_training_state(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the training state of a run, and check that the settings still match.

    Args:
        folder: the folder of the run.
        settings: the settings of the resumed run.

    Returns:
        The state, in the current format; None if there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds no training state, or one of a newer format; or a setting differs from that of the
            run and is not in ``CHANGEABLE``.
    """
    path = folder / LAST / STATE
    recover(path.parent)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # unpickling raises errors of any type
        raise ValueError(f"{path}: expected a training state, got something else: {error}") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise ValueError(f"{path}: expected a training state, got {type(state).__name__}")
    if "format" not in state:
        state = _upgrade(state)
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: expected a training state of format {FORMAT}, got format {state['format']!r}")
    before = state["settings"]
    changed = [name for name in before if name not in CHANGEABLE and settings.get(name) != before[name]]
    if changed:
        got = ", ".join(f"{name} {settings.get(name)!r}, not {before[name]!r}" for name in changed)
        raise ValueError(
            f"{path}: expected the settings that this run began with, got {got}; only {', '.join(CHANGEABLE)} may"
            " change"
        )
    return state


def _upgrade(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a training state of version 0.1.0, which has no format number, to format 2."""

    def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace("backbone.trunk.", "backbone.body.", 1): tensor for name, tensor in weights.items()}

    average = state["average"]
    return {
        **state,
        "format": 2,
        "model": rename(state["model"]),
        "average": None if average is None else rename(average),
        "settings": {"images" if name == "pictures" else name: value for name, value in state["settings"].items()},
    }
