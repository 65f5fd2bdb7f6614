"""Settings of ``conditional-detr train`` that need the data or the run, and the run itself."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from conditional_detr.cli.console import INTERRUPTED, out, print_line
from conditional_detr.training.config import TrainConfig

if TYPE_CHECKING:
    from conditional_detr.data.dataset import AnnotatedData
    from conditional_detr.modeling.detection_transformer import DetectionTransformer
    from conditional_detr.set_prediction.losses import SetLoss
    from conditional_detr.training.result import TrainResult

AUTO = "auto"
_WEIGHT = re.compile(r"[\s,]*([^=]+)=([^\s,=]*)")  # class names may have spaces
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_SECONDS = re.compile(r"\d+(?:\.\d+)?")


def read_duration(text: str) -> float:
    """Return the seconds of a duration such as 2h, 1h30m, 90m, 45s or 3600.

    Raises:
        ValueError: it is of another form.
    """
    text = text.strip()
    found = _TIME.fullmatch(f"{text}s" if _SECONDS.fullmatch(text) else text)  # after h or m, a unit is needed
    if not text or found is None:
        raise ValueError(f"--time-limit: expected a duration such as 2h, 1h30m, 45s or 3600, got {text!r}")
    hours, minutes, seconds = (float(part or 0) for part in found.groups())
    if not (limit := 3600 * hours + 60 * minutes + seconds):
        raise ValueError(f"--time-limit: expected more than 0 seconds, got {text!r}")
    return limit


def read_batch_size(text: str) -> int | None:
    """Return the number of images; None: the largest that fits.

    Raises:
        ValueError: neither a number nor auto.
    """
    if text == AUTO:
        return None
    if not text.isdecimal():
        raise ValueError(f"--batch-size: expected a number of images, or auto, got {text!r}")
    return int(text)


def weighted_criterion(model: "DetectionTransformer", text: str) -> "SetLoss":
    """Return the model's loss with weights of classes, such as 'cat=2 dog=0.5'; those of all others are 1.

    Raises:
        ValueError: the text is of another form, or the model has no such class.
    """
    from conditional_detr.set_prediction.losses import SetLoss

    names = [name or "" for name in model.metadata.class_names]
    weights = dict.fromkeys(names, 1.0)
    shown = ", ".join(filter(None, names))
    if rest := _WEIGHT.sub("", text).strip(" ,"):
        raise ValueError(f"--class-weights: expected class=number with a class of {shown}, got {rest!r}")
    if not (given := _WEIGHT.findall(text)) or len({name for name, _ in given}) < len(given):
        raise ValueError(f"--class-weights: expected class=number, each class once, got {text!r}")
    for name, value in given:
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if math.isnan(weight) or name not in weights:
            raise ValueError(f"--class-weights: expected class=number with a class of {shown}, got '{name}={value}'")
        weights[name] = weight
    criterion = SetLoss.for_model(model)
    class_loss: Any = criterion.class_loss
    class_weights = tuple(weights[name] for name in names)
    return replace(criterion, class_loss=replace(class_loss, class_weights=class_weights))


def with_batch_size(
    model: "DetectionTransformer",
    data: "AnnotatedData",
    config: TrainConfig,
    criterion: "SetLoss | None",
    run: Path | None,
) -> TrainConfig:
    """Return settings with the largest batch that fits, or with that of the run to resume, if there is one."""
    from conditional_detr.training.batch_fitting import fit_batch_size
    from conditional_detr.training.checkpoints import read_training_state

    state = None if run is None else read_training_state(run, mmap=True)
    if state is not None:
        known = {name: state["settings"][name] for name in ("batch_size", "accumulation")}
        return replace(config, **known)
    fitted = fit_batch_size(model, data, config, criterion)
    print_line(fitted.report)
    return fitted.config


def run_training(
    model: "DetectionTransformer",
    train_data: "AnnotatedData",
    val_data: "AnnotatedData | None",
    config: TrainConfig,
    criterion: "SetLoss | None",
    output: Path,
    resume: bool,
    check: bool,
    trackers: Sequence[str],
) -> "TrainResult | None":
    """Train; return the result in the first process, None in the others."""
    from torch import distributed

    from conditional_detr.training.checkpoints import LAST, STATE
    from conditional_detr.training.loop import train

    try:
        options: dict[str, Any] = {"criterion": criterion, "resume": resume, "check": check, "trackers": trackers}
        result = train(model, train_data, val_data, config, folder=output, **options)
        first = not distributed.is_initialized() or distributed.get_rank() == 0
        return result if first else None
    except KeyboardInterrupt:
        saved = (output / LAST / STATE).exists()
        how = f"--resume continues from {output / LAST}" if saved else "there is no checkpoint yet"
        print_line(f"interrupted; {how}")
        raise typer.Exit(INTERRUPTED) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise OSError(f"a process that loads images ended: {error}") from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def show_result(model: "DetectionTransformer", result: "TrainResult") -> None:
    """Print the results of the run and their files; write its model card, whose failure is a warning."""
    from conditional_detr.training.card import write_card

    if result.stopped_early:
        out.print("stopped early: AP has not improved within the patience", markup=False)
    if result.best is not None:
        out.print(f"best AP {result.best_ap:.3f}: {result.best}", markup=False, soft_wrap=True)
    out.print(f"after {result.steps} steps: {result.last}", markup=False, soft_wrap=True)
    out.print(f"curves: {result.folder / 'curves.png'}", markup=False, soft_wrap=True)
    try:
        card = write_card(model, result)
    except (OSError, ValueError) as error:
        print_line(f"warning: no model card: {error}", style="yellow")
        return
    if card is not None:
        out.print(f"model card: {card}", markup=False, soft_wrap=True)
    else:
        print_line(f"{result.folder / 'README.md'} stays as it is: it is no generated model card")
