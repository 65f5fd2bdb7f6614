"""The training loop: steps, epochs, evaluation and checkpoints, in one process or in several with the same code.

Steps depend only on the training state and the settings: random numbers of a step follow from seed and step, the order
and the augmentation of the images from seed and epoch. On a CPU, a resumed run therefore computes the same numbers as
an uninterrupted one, to the last bit.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from conditional_detr.data.dataset import batches
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.set_prediction.losses import SetLoss
from conditional_detr.system.atomic_files import remove_unfinished
from conditional_detr.system.shutdown import ShutdownRequest
from conditional_detr.training.checkpoints import BEST, LAST, STATE, Progress, load_training_state, save_checkpoint
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.first_epoch import FirstEpochReport, check_first_epoch
from conditional_detr.training.loader import SampleDataset, load_batches
from conditional_detr.training.logging import RunLogger
from conditional_detr.training.optimizer import folded_batch_norm, gradient_checkpointing, linear_as_convolution
from conditional_detr.training.steps import Stepper
from conditional_detr.training.validation import measure

_UNSAVED = 60.0  # seconds since the last checkpoint after which one is written before an evaluation


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


def train(
    model: ConditionalDETR,
    train_data: SampleDataset,
    val_data: SampleDataset | None = None,
    config: TrainConfig | None = None,
    *,
    folder: str | Path,
    criterion: SetLoss | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train a model.

    Several processes, started by torchrun or ``accelerate launch``, train together on the joined batch. They need a
    shared file system: the first process writes, all processes read. Accelerate chooses the device;
    ACCELERATE_USE_CPU=1 selects the CPU.

    After Ctrl-C or SIGTERM, the run finishes the current step, writes a checkpoint and raises KeyboardInterrupt. A
    second signal stops it at once.

    Args:
        model: trained in place; parameters without ``requires_grad`` stay frozen. Afterwards it is in eval mode and
            has the weights of ``last``.
        train_data: images and targets: :class:`~conditional_detr.data.dataset.CocoData` or any map-style dataset of
            such samples.
        val_data: the data that AP is measured on; None: no evaluation.
        config: the settings; default: the paper's.
        folder: where the run writes all its files; created if missing.
        criterion: the loss; default: the paper's.
        resume: resume from the checkpoint in the folder; without one, start a new run.
        progress: print a line an epoch to stderr, and show a progress bar on a terminal.

    Returns:
        The result; ``from_pretrained(result.best or result.last)`` is the trained model.

    Raises:
        FileExistsError: the folder has a checkpoint, and ``resume`` is False.
        ModuleNotFoundError: a package that training needs is not installed.
        OSError: a file cannot be read or written; the message has the last good checkpoint.
        TypeError: an argument of the wrong type.
        ValueError: invalid targets, a loss that is not finite (the message has the step, the images and the last good
            checkpoint), or a checkpoint of other settings.
    """
    if not isinstance(model, ConditionalDETR):
        raise TypeError(f"model: expected a ConditionalDETR, got {type(model).__name__}")
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config: expected a TrainConfig, got {type(config).__name__}")
    run = _Run(model, train_data, val_data, config, Path(folder), criterion or SetLoss())
    run.prepare(resume)
    with (
        run.logging(progress),
        folded_batch_norm(model),
        linear_as_convolution(model),
        gradient_checkpointing(model, config.gradient_checkpointing),
        ShutdownRequest() as shutdown,
    ):
        run.train_epochs(shutdown)
    return run.finish()


class _Run:
    """A training run: model, data, progress and files."""

    def __init__(
        self,
        model: ConditionalDETR,
        train_data: SampleDataset,
        val_data: SampleDataset | None,
        config: TrainConfig,
        folder: Path,
        criterion: SetLoss,
    ) -> None:
        self.accelerator = _accelerator()
        self.train_data, self.val_data, self.config, self.folder = train_data, val_data, config, folder
        self.stepper = Stepper(model, config, criterion, self.accelerator, self._describe)
        self.progress = Progress()
        self.first_epoch: FirstEpochReport | None = None
        self.logger: RunLogger | None = None
        self.saved_step: int | None = None
        self.saved_at = self.epoch_began = time.monotonic()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by name."""
        model = self.stepper.model
        others = {
            "criterion": self.stepper.criterion,
            "architecture": model.config,
            "classes": model.metadata.class_names,
        }
        images, processes = len(self.train_data), self.accelerator.num_processes
        described = {name: repr(value) for name, value in others.items()}
        return {**asdict(self.config), **described, "images": images, "processes": processes}

    def prepare(self, resume: bool) -> None:
        """Load the training state of a resumed run, and prepare distributed training."""
        if not resume and (self.folder / LAST / STATE).exists():
            raise FileExistsError(
                f"{self.folder}: expected a folder without a checkpoint, got one with the checkpoint of a run; resume"
                " that run, or use another folder"
            )
        state = load_training_state(self.folder, self.settings) if resume else None
        if state is not None:
            self.stepper.load_state_dict(state)
            self.progress.load_state_dict(state)
            self.saved_step = self.progress.step
        if self.accelerator.is_main_process:
            for folder in (self.folder, self.folder / LAST, self.folder / BEST):
                remove_unfinished(folder)
        self.stepper.join_processes()

    @contextlib.contextmanager
    def logging(self, shown: bool) -> Iterator[None]:
        """Log the run while the context is active, in the first process only."""
        if not self.accelerator.is_main_process:
            yield
            return
        total = math.ceil(len(self._batches(0)) / self.config.accumulation) * self.config.epochs
        done = {"step": self.progress.step, "epoch": self.progress.epoch}
        with RunLogger(self.folder, **done, total=total, shown=shown) as self.logger:
            yield

    def train_epochs(self, shutdown: ShutdownRequest) -> None:
        """Train the remaining epochs; error messages have the checkpoint to resume from."""
        try:
            while self.progress.epoch < self.config.epochs and not self.stopped_early:
                self._train_epoch(shutdown)
                self._end_epoch()
                self._stop_if_requested(shutdown)
        except (OSError, ValueError) as error:
            where = "there is no checkpoint yet"
            if self.saved_step is not None:
                where = f"the last good checkpoint is {self.folder / LAST}, of step {self.saved_step}"
            raise (OSError if isinstance(error, OSError) else ValueError)(f"{error}; {where}") from error

    @property
    def stopped_early(self) -> bool:
        """Whether AP has not improved for ``patience`` evaluations."""
        return 0 < self.config.patience <= self.progress.stale

    def finish(self) -> TrainResult:
        """Load the saved weights into the model, set eval mode and return the result."""
        model, average, progress = self.stepper.model, self.stepper.average, self.progress
        if average is not None:
            model.load_state_dict(average.module.state_dict())
        model.eval()
        return TrainResult(
            folder=self.folder,
            last=self.folder / LAST,
            best=None if progress.best is None else self.folder / BEST,
            best_ap=progress.best,
            steps=progress.step,
            history=tuple(progress.history),
            first_epoch=self.first_epoch,
            stopped_early=self.stopped_early,
        )

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return the sample indices of each batch of an epoch, for this process."""
        sharing = {"rank": self.accelerator.process_index, "processes": self.accelerator.num_processes}
        return batches(self.train_data, self.config.batch_size, seed=self.config.seed, epoch=epoch, **sharing)

    def _train_epoch(self, shutdown: ShutdownRequest) -> None:
        """Train the remaining steps of the current epoch."""
        progress = self.progress
        self.epoch_began = time.monotonic()
        if hasattr(self.train_data, "set_epoch"):
            self.train_data.set_epoch(progress.epoch)
        plan = self._batches(progress.epoch)
        remaining = plan[progress.batch :]
        pin = self.accelerator.device.type == "cuda"
        loaded = load_batches(self.train_data, remaining, self.config, progress.epoch, pin=pin)
        indexed = zip(remaining, loaded, strict=True)
        while group := list(islice(indexed, self.config.accumulation)):
            epochs = progress.epoch + progress.batch / len(plan)
            numbers = self.stepper.train_step(group, step=progress.step, epochs=epochs)
            progress.step, progress.batch = progress.step + 1, progress.batch + len(group)
            progress.losses.append(numbers["loss"])
            if self.logger is not None:
                self.logger.log_step({"step": progress.step, "epoch": progress.epoch, **numbers})
            if progress.step % self.config.save_every == 0:
                self._save()
            self._stop_if_requested(shutdown)

    def _stop_if_requested(self, shutdown: ShutdownRequest) -> None:
        """Save and raise KeyboardInterrupt in all processes if any of them has a shutdown request."""
        requested = torch.tensor(float(shutdown.requested), device=self.accelerator.device)
        if self.accelerator.reduce(requested, reduction="mean").item() == 0:
            return
        if self.saved_step != self.progress.step:
            self._save()
        self._report(f"stopped after step {self.progress.step}; resume from {self.folder / LAST}")
        raise KeyboardInterrupt

    def _describe(self, index: int) -> str:
        """Return the index of a training image and, if the dataset has it, its description."""
        described = getattr(self.train_data, "describe", None)
        return f"image {index}" if described is None else f"image {index}, {described(index)}"

    def _end_epoch(self) -> None:
        """Evaluate, check the first epoch, log and save."""
        progress, number = self.progress, self.progress.epoch
        entry: dict[str, Any] = {"step": progress.step, "epoch": number}
        entry["mean_loss"] = math.fsum(progress.losses) / max(len(progress.losses), 1)
        evaluate = (number + 1) % self.config.evaluate_every == 0 or number + 1 == self.config.epochs
        better = False
        if self.val_data is not None and evaluate:
            if time.monotonic() - self.saved_at > _UNSAVED:
                self._save()
            entry |= measure(self.stepper.eval_model, self.val_data, self.config.batch_size)
            better = progress.best is None or entry["AP"] > progress.best
            progress.best, progress.stale = (entry["AP"], 0) if better else (progress.best, progress.stale + 1)
        entry["seconds"] = time.monotonic() - self.epoch_began
        progress.history.append(entry)
        if number == 0 and self.accelerator.is_main_process:
            self.first_epoch = check_first_epoch(
                self.stepper.model, self.train_data, self.stepper.criterion.matcher, entry.get("AP")
            )
            self._report(str(self.first_epoch))
        if self.logger is not None:
            self.logger.log_epoch(entry, epochs=self.config.epochs, best=progress.best)
        progress.epoch, progress.batch, progress.losses = number + 1, 0, []
        if better and self.accelerator.is_main_process:
            save_checkpoint(self.stepper.eval_model, self.folder / BEST)
        self._save()

    def _save(self) -> None:
        """Write the last checkpoint, in the first process only."""
        if self.accelerator.is_main_process:
            state = self.stepper.state_dict() | self.progress.state_dict() | {"settings": self.settings}
            save_checkpoint(self.stepper.eval_model, self.folder / LAST, state)
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()

    def _report(self, text: str) -> None:
        if self.logger is not None:
            self.logger.report(text)


def _accelerator() -> Any:
    """Return an Accelerator, after checking that all packages for training are installed."""
    try:
        import matplotlib  # noqa: F401  # checked before training, because it is first used at the end
        import tensorboard  # noqa: F401
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"training needs {error.name}, which is not installed: pip install 'conditional-detr[train]'"
        ) from error
    return Accelerator(mixed_precision="no")  # TrainConfig.autocast alone decides the precision
