"""What a run leaves on disk, so that it can go on: weights in the published format, and the state beside them.

``last`` holds the weights of the last checkpoint and the state of the training, ``best`` the weights with the best AP.
All files of a checkpoint are whole before the first is moved to its place, so a process that is killed leaves those
that were there. The state has everything in itself: a run goes on from it whatever the weights beside it are.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from conditional_detr.checkpoints.saving import write_tensors, writers_of
from conditional_detr.modeling.conditional_detr import ConditionalDETR

LAST = "last"
BEST = "best"
STATE = "training_state.pt"
CHANGEABLE = ("workers", "save_every", "epochs", "patience", "evaluate_every", "gradient_checkpointing")
"""Settings that a run may change when it goes on; all others would change what follows from what was done."""


def save_checkpoint(model: ConditionalDETR, folder: Path, state: Mapping[str, Any] | None = None) -> None:
    """Write weights in the published format, and a state beside them; all of it or nothing.

    Raises:
        OSError: a file cannot be written.
        ValueError: weights that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers = writers_of(model, folder)
    if state is not None:
        writers[folder / STATE] = partial(torch.save, state)
    write_tensors(writers)


def load_training_state(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the state that a run left, and check that it is to go on in the same way.

    Args:
        folder: of the run.
        settings: of the run that is to go on.

    Returns:
        The state; None if there is none.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that holds no state, or settings that differ from those it was made with.
    """
    path = folder / LAST / STATE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # of unpickling: of any kind
        raise ValueError(f"{path}: expected the state of a training run, got something else: {error}") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise ValueError(f"{path}: expected the state of a training run, got {type(state).__name__}")
    before = state["settings"]
    changed = [name for name in before if name not in CHANGEABLE and settings.get(name) != before[name]]
    if changed:
        got = ", ".join(f"{name} {settings.get(name)!r}, not {before[name]!r}" for name in changed)
        raise ValueError(
            f"{path}: expected the settings that this run began with, got {got}; only {', '.join(CHANGEABLE)} may change"
        )
    return state
