"""Checkpoints of a training run: weights in the published format, and the training state beside them.

``last`` holds the weights of the last checkpoint and the training state, ``best`` the weights with the best AP. All
files of a checkpoint are complete before the first one is moved into its folder, so a process that is killed leaves
the previous checkpoint intact. The training state is complete in itself, with the architecture and all settings: the
files beside it are not read on resume.
"""

import ast
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditional_detr.checkpoints.saving import write_tensors, writers_of
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.system.atomic_files import recover
from conditional_detr.training.record import ADDED, CHANGEABLE, differences

LAST = "last"
BEST = "best"
STATE = "training_state.pt"
FORMAT = 4
"""Format number of the training state. States of version 0.1.0 have none; older states are upgraded when read."""


@dataclass
class Progress:
    """Progress of a training run.

    Attributes:
        step: number of completed steps.
        epoch: number of completed epochs.
        batch: number of completed batches of the current epoch.
        best: best AP so far; None before the first evaluation.
        stale: number of evaluations since the best AP.
        history: a dict an epoch, as in :class:`~conditional_detr.training.run.TrainResult`.
        losses: loss of each completed step of the current epoch.
        seconds: duration of the run so far.
        ended: whether the time limit has ended the run.
        bad_images: dataset indices of the images that could not be read and were skipped, in the first process.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    stale: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    ended: bool = False
    bad_images: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all attributes, by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore all attributes from the result of :meth:`state_dict`; other keys are ignored."""
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.best, self.stale = state["best"], state["stale"]
        self.history, self.losses = list(state["history"]), list(state["losses"])
        self.bad_images = list(state.get("bad_images", ()))
        self.seconds, self.ended = float(state.get("seconds", 0.0)), bool(state.get("ended", False))

    def check(self, batches: int, accumulation: int) -> None:
        """Raise ValueError unless the numbers of steps, epochs and batches agree.

        Args:
            batches: number of batches of an epoch.
            accumulation: number of batches of a step.
        """
        steps = math.ceil(batches / accumulation)
        if self.batch > batches or self.step != self.epoch * steps + math.ceil(self.batch / accumulation):
            raise ValueError(
                f"step {self.step} after {self.epoch} epochs and {self.batch} batches, where an epoch has {batches}"
                f" batches and {steps} steps"
            )


def save_checkpoint(model: DetectionTransformer, folder: Path, state: Mapping[str, Any] | None = None) -> None:
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


def read_training_state(folder: Path, *, mmap: bool = False) -> dict[str, Any] | None:
    """Read the training state of a run.

    Args:
        folder: the folder of the run.
        mmap: read tensors only when they are used.

    Returns:
        The state, in the current format; None if there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds no training state, or one of a newer format.
    """
    path = folder / LAST / STATE
    recover(path.parent)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # unpickling raises errors of any type
        raise ValueError(f"{path}: expected a training state, got something else: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise ValueError(f"{path}: expected a training state, got {type(state).__name__}")
    number = state.get("format", 1)
    if not isinstance(number, int) or number not in range(1, FORMAT + 1):
        raise ValueError(f"{path}: expected a training state of format {FORMAT}, got format {number!r}")
    try:
        for upgrade in _UPGRADES[number - 1 :]:
            state = upgrade(state)
        _check_form(state)
    except (AttributeError, KeyError, RecursionError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a training state of format {number}, got {error!r}") from error
    return {**state, "settings": {**ADDED, **state["settings"]}}


def _check_form(state: Mapping[str, Any]) -> None:
    """Raise ValueError unless a state of the current format has all parts, each of its type."""
    parts: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("settings", "model", "optimizer", "scaler"), (dict,)),
        **dict.fromkeys(("step", "epoch", "batch", "stale"), (int,)),
        **dict.fromkeys(("history", "losses"), (list,)),
        "average": (dict, type(None)),
        "best": (float, int, type(None)),
    }
    settings: dict[str, tuple[type, ...]] = {"model": (str,), "architecture": (dict,), "classes": (list,)}
    settings |= dict.fromkeys(("seed", "epochs", "images"), (int,))
    for where, expected in ((state, parts), (state.get("settings", {}), settings)):
        for name, types in expected.items():
            value = where.get(name, KeyError(name))
            if not isinstance(value, types) or isinstance(value, bool):
                raise ValueError(f"{name}: {value!r}" if isinstance(value, KeyError) else f"{name}: a {type(value)}")
    if min(state[name] for name in ("step", "epoch", "batch", "stale")) < 0:
        raise ValueError("a negative count")
    for name in ("settings", "history", "losses", "bad_images", "category_ids", "initial_weights"):
        if not _is_plain(state.get(name)):
            raise ValueError(f"{name}: values of other types")
    if not isinstance(state.get("category_ids", []), list) or not isinstance(state.get("bad_images", []), list):
        raise ValueError("category_ids or bad_images: other values than lists")
    if not all(isinstance(loss, float) for loss in state["losses"]):
        raise ValueError("losses: other values than numbers")
    if not all(isinstance(entry, dict) for entry in state["history"]):
        raise ValueError("history: other entries than dicts")


def _is_plain(value: Any) -> bool:
    """Return whether a value consists of dicts with strings as keys, sequences, strings, numbers and None."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def compare_settings(state: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    """Check that a run resumes with the settings, the data and the architecture that it began with.

    A state of an older format lacks some of them; a warning lists those that could not be compared.

    Raises:
        ValueError: something differs and is not in ``CHANGEABLE``; the message lists all differences.
    """
    path = folder / LAST / STATE
    if changed := differences(state["settings"], settings):
        raise ValueError(
            f"{path}: expected the settings that this run began with, got {', '.join(changed)}; only"
            f" {', '.join(CHANGEABLE)} may change"
        )
    unknown = [name for name in settings if name not in state["settings"] and name not in CHANGEABLE]
    if unknown:
        warnings.warn(
            f"{path}: an earlier version wrote it, without {', '.join(unknown)}: these could not be compared",
            stacklevel=4,
        )


def _upgrade_names(state: dict[str, Any]) -> dict[str, Any]:
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


def _upgrade_architecture(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a training state of format 2, where architecture and classes are text, to format 3."""
    settings = dict(state["settings"])
    call: Any = ast.parse(settings["architecture"], mode="eval").body
    settings["architecture"] = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    settings["classes"] = list(ast.literal_eval(settings["classes"]))
    return {**state, "format": 3, "settings": settings}


def _upgrade_model(state: dict[str, Any]) -> dict[str, Any]:
    """Convert a training state of format 3, which knows only ConditionalDETR and the focal loss, to format 4."""
    settings = {**state["settings"], "model": ConditionalDETR.architecture}
    if "criterion" in settings:
        focal = r"class_loss=FocalLoss(alpha=\1, gamma=\2)"
        settings["criterion"] = re.sub(r"alpha=([^,]+), gamma=([^,)]+)", focal, settings["criterion"])
    return {**state, "format": 4, "settings": settings}


_UPGRADES: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
    _upgrade_names,
    _upgrade_architecture,
    _upgrade_model,
)
