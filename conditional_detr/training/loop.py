"""The training loop: steps, epochs, evaluation and checkpoints, in one process or in several with the same code.

Steps depend only on the training state and the settings: random numbers of a step follow from seed and step, the order
and the augmentation of the images from seed and epoch. On a CPU, a resumed run therefore computes the same numbers as
an uninterrupted one, to the last bit.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.set_prediction.losses import SetLoss
from conditional_detr.system.shutdown import ShutdownRequest
from conditional_detr.system.torch_settings import plain_torch_settings
from conditional_detr.training.callbacks import Callback
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.consistency import (
    check_criterion,
    check_modules,
    check_preprocessing,
    check_reading_ahead,
    match_classes,
)
from conditional_detr.training.loader import SampleDataset
from conditional_detr.training.optimizer import MakeOptimizer, training_forwards
from conditional_detr.training.result import TrainResult
from conditional_detr.training.run import Run

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


def train(
    model: DetectionTransformer,
    train_data: SampleDataset,
    val_data: SampleDataset | None = None,
    config: TrainConfig | None = None,
    *,
    folder: str | Path,
    criterion: SetLoss | None = None,
    callbacks: Sequence[Callback] = (),
    optimizer: MakeOptimizer | None = None,
    trackers: "Sequence[str | GeneralTracker]" = (),
    resume: bool = False,
    check: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train a model.

    Several processes, started by torchrun or ``accelerate launch``, train together on the joined batch. They need a
    shared file system: the first process writes, all processes read. Accelerate chooses the device;
    ACCELERATE_USE_CPU=1 selects the CPU.

    After Ctrl-C or SIGTERM, also to all processes of a group, the run finishes the current step, writes a checkpoint
    and raises KeyboardInterrupt. A second signal stops it at once. Every error has the last good checkpoint.

    If a dataset has ``class_names``, its labels are matched with the model's classes by name, in any order; each name
    must be that of exactly one class of the model. If it has ``preprocessing``, that must be the model's. Labels of
    any other dataset are rows of the class head.

    Args:
        model: trained in place; parameters without ``requires_grad`` stay frozen. Afterwards it is in eval mode and
            has the weights of ``last``.
        train_data: images and targets: :class:`~conditional_detr.data.dataset.CocoData`,
            :class:`~conditional_detr.data.parquet.ParquetData`, or any map-style dataset of such samples.
        val_data: the data that AP is measured on; None: no evaluation.
        config: the settings; default: the paper's.
        folder: where the run writes all its files; created if missing.
        criterion: the loss; default: that of the model's paper.
        callbacks: hooks of steps, evaluations and epochs; a resumed run needs callbacks of the same classes.
        optimizer: returns the optimizer of parameter groups, dicts of params, lr and initial_lr, which it must keep:
            each step sets lr to a part of initial_lr. Default: AdamW with the weight decay of ``config``.
        trackers: experiment trackers that get the numbers of ``log.jsonl`` and the settings: names of those that
            accelerate has, such as "wandb", "mlflow" and "comet_ml", or objects of its GeneralTracker. A resumed run
            continues in these three; any other tracker starts again.
        resume: resume from the checkpoint in the folder; without one, start a new run. The model then gets the
            weights of the checkpoint. Settings, data, preprocessing, augmentation, criterion and architecture must be
            those that the run began with, except for workers, epochs and intervals. With another number of epochs, a
            warning reports that the completed steps had other learning rates than those of such a run.
        check: read the headers of all images before the first step, and compare their sizes with the annotations.
        progress: print a line an epoch to stderr, and show a progress bar on a terminal.

    Returns:
        The result; ``from_pretrained(result.best or result.last)`` is the trained model.

    Raises:
        FileExistsError: the folder has a checkpoint, a log or curves, and ``resume`` is False; or it has weights
            without the training state to resume from.
        ModuleNotFoundError: a package that training or a tracker needs is not installed.
        OSError: a file cannot be read or written, another process trains in the folder, or a tracker cannot start.
        RuntimeError: a data worker died.
        TypeError: an argument of the wrong type.
        ValueError: invalid targets, a loss that is not finite (the message has the step and the images), a checkpoint
            of other settings, a dataset of other classes or preprocessing, or a model that checkpoints cannot store.
    """
    if not isinstance(model, DetectionTransformer):
        inner = next((name for name in ("module", "_orig_mod") if hasattr(model, name)), None)  # type: ignore[unreachable]
        hint = "" if inner is None else f"; pass its model.{inner}"
        raise TypeError(f"model: expected a ConditionalDETR or DETR, got {type(model).__name__}{hint}")
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config: expected a TrainConfig, got {type(config).__name__}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder for the run, got a file")
    train_data = match_classes(model, train_data, "train_data")
    val_data = None if val_data is None else match_classes(model, val_data, "val_data")
    for name, data in (("train_data", train_data), ("val_data", val_data)):
        if data is not None:
            check_preprocessing(model, data, name)
    check_reading_ahead(train_data)
    check_modules(model, folder)
    criterion = SetLoss.for_model(model) if criterion is None else criterion
    check_criterion(model, criterion)
    with plain_torch_settings(), ExitStack() as stack:
        run = Run(model, train_data, val_data, config, folder, criterion, callbacks, optimizer, trackers)
        run.prepare(resume, check, stack)
        with (
            run.logging(progress),
            training_forwards(model, config),
            ShutdownRequest() as shutdown,
        ):
            run.train_epochs(shutdown)
        return run.finish()
