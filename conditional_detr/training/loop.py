"""Training: steps, epochs, evaluation and checkpoints, in one process or in many with the same code.

Nothing depends on what ran before but the state: what is drawn in a step follows from seed and step, the images of
an epoch and their augmentation from seed and epoch. So a run that goes on from a checkpoint computes, on a CPU, the
same numbers to the last bit as one that was never stopped.
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
from conditional_detr.training.checkpoints import BEST, LAST, STATE, load_training_state, save_checkpoint
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.first_epoch import FirstEpochReport, check_first_epoch
from conditional_detr.training.loader import SampleDataset, load_batches
from conditional_detr.training.logging import RunLogger
from conditional_detr.training.optimizer import folded_batch_norm, gradient_checkpointing, linear_as_convolution
from conditional_detr.training.steps import Stepper
from conditional_detr.training.validation import measure

_UNSAVED = 60.0  # seconds of work that an evaluation does not put at risk
_PLACE = ("step", "epoch", "batch", "best", "stale", "history", "losses")


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        folder: of the run: ``log.jsonl``, ``curves.png``, ``tensorboard`` and the two below.
        last: weights of the last step and the state to go on from.
        best: weights with the best AP; None without validation data.
        best_ap: their AP.
        steps: how many steps were done.
        history: a dict an epoch: epoch, step, mean_loss, seconds, and where it was evaluated COCO's twelve numbers.
        first_epoch: what was learned in the first epoch; None if this process did not go through it.
        stopped_early: whether AP had not risen for as long as the patience lasts.
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

    Several processes, of torchrun or ``accelerate launch``, train together as one with the joined batch. They need
    one file system, where the first writes and all read. Accelerate chooses the device; ACCELERATE_USE_CPU=1 says CPU.

    Ctrl-C and SIGTERM stop after the present step with a checkpoint, and raise KeyboardInterrupt; the second time, at
    once.

    Args:
        model: trained in place; parameters without ``requires_grad`` stay. In the end it is in eval mode and holds
            the weights that ``last`` does.
        train_data: images and targets: :class:`~conditional_detr.data.dataset.CocoData` or any map-style data set
            of such samples.
        val_data: what AP is measured on after epochs; None: nothing.
        config: the settings; default: the paper's.
        folder: made if missing; where everything of this run is written.
        criterion: the loss; default: the paper's.
        resume: go on from the checkpoint in the folder; where there is none, begin.
        progress: show a line an epoch on stderr, and on a terminal a bar.

    Returns:
        What it came to; ``from_pretrained(result.best or result.last)`` is the trained model.

    Raises:
        FileExistsError: the folder has a checkpoint, and ``resume`` is not set.
        ModuleNotFoundError: the packages for training are not installed.
        OSError: something cannot be read or written; the message names the last good checkpoint.
        TypeError: an argument of the wrong type.
        ValueError: targets that do not fit, a loss that is not finite (the message names step, images and the last
            good checkpoint), or a checkpoint that was made with other settings.
    """
    if not isinstance(model, ConditionalDETR):
        raise TypeError(f"model: expected a ConditionalDETR, got {type(model).__name__}")
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise TypeError(f"config: expected a TrainConfig, got {type(config).__name__}")
    run = _Run(model, train_data, val_data, config, Path(folder), criterion or SetLoss())
    run.begin(resume)
    with (
        run.telling(progress),
        folded_batch_norm(model),
        linear_as_convolution(model),
        gradient_checkpointing(model, config.gradient_checkpointing),
        ShutdownRequest() as stop,
    ):
        run.go(stop)
    return run.finish()


class _Run:
    """A run: what it trains, and how far it is."""

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
        self.step = self.epoch = self.batch = 0  # how many were done, the batches in the present epoch
        self.best: float | None = None
        self.stale = 0  # evaluations since the best
        self.history: list[dict[str, Any]] = []
        self.losses: list[float] = []  # of the present epoch
        self.first_epoch: FirstEpochReport | None = None
        self.logger: RunLogger | None = None
        self.saved_step: int | None = None
        self.saved_at = self.began = time.monotonic()

    @property
    def settings(self) -> dict[str, Any]:
        """What a state was made with."""
        model = self.stepper.model
        others = {
            "criterion": self.stepper.criterion,
            "architecture": model.config,
            "classes": model.metadata.class_names,
        }
        images, processes = len(self.train_data), self.accelerator.num_processes
        described = {name: repr(value) for name, value in others.items()}
        return {**asdict(self.config), **described, "images": images, "processes": processes}

    def begin(self, resume: bool) -> None:
        """Load what is to go on, and get ready for several processes."""
        if not resume and (self.folder / LAST / STATE).exists():
            raise FileExistsError(
                f"{self.folder}: holds the checkpoint of a run: expected resume to go on with it, or another folder"
            )
        state = load_training_state(self.folder, self.settings) if resume else None
        if state is not None:
            self.stepper.load_state_dict(state)
            for name in _PLACE:
                setattr(self, name, state[name])
            self.saved_step = self.step
        if self.accelerator.is_main_process:
            for folder in (self.folder, self.folder / LAST, self.folder / BEST):
                remove_unfinished(folder)
        self.stepper.join_processes()

    @contextlib.contextmanager
    def telling(self, progress: bool) -> Iterator[None]:
        """Keep a journal, in the first process."""
        if not self.accelerator.is_main_process:
            yield
            return
        steps = math.ceil(len(self._batches(0)) / self.config.accumulation) * self.config.epochs
        with RunLogger(self.folder, step=self.step, epoch=self.epoch, total=steps, shown=progress) as self.logger:
            yield

    def go(self, stop: ShutdownRequest) -> None:
        """Go through the epochs that are left; errors tell where to go on."""
        try:
            while self.epoch < self.config.epochs and not self.stopped_early:
                self._train_epoch(stop)
                self._end_epoch()
                self._stop_if_asked(stop)
        except (OSError, ValueError) as error:
            where = "there is no checkpoint yet"
            if self.saved_step is not None:
                where = f"the last good checkpoint is {self.folder / LAST}, of step {self.saved_step}"
            raise (OSError if isinstance(error, OSError) else ValueError)(f"{error}; {where}") from error

    @property
    def stopped_early(self) -> bool:
        """Whether AP has not risen for too long."""
        return 0 < self.config.patience <= self.stale

    def finish(self) -> TrainResult:
        """Leave the model as it was saved, and say what became of it."""
        model, average = self.stepper.model, self.stepper.average
        if average is not None:
            model.load_state_dict(average.module.state_dict())
        model.eval()
        best = None if self.best is None else self.folder / BEST
        done = self.folder, self.folder / LAST, best, self.best, self.step, tuple(self.history)
        return TrainResult(*done, self.first_epoch, self.stopped_early)

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return the images of each batch of an epoch, in this process."""
        sharing = {"rank": self.accelerator.process_index, "processes": self.accelerator.num_processes}
        return batches(self.train_data, self.config.batch_size, seed=self.config.seed, epoch=epoch, **sharing)

    def _train_epoch(self, stop: ShutdownRequest) -> None:
        """Do the steps of an epoch that are left."""
        self.began = time.monotonic()
        if hasattr(self.train_data, "set_epoch"):
            self.train_data.set_epoch(self.epoch)
        plan = self._batches(self.epoch)
        left = plan[self.batch :]
        fed = load_batches(self.train_data, left, self.config, self.epoch, pin=self.accelerator.device.type == "cuda")
        named = zip(left, fed, strict=True)
        while group := list(islice(named, self.config.accumulation)):
            numbers = self.stepper.train_step(group, step=self.step, epochs=self.epoch + self.batch / len(plan))
            self.step, self.batch = self.step + 1, self.batch + len(group)
            self.losses.append(numbers["loss"])
            if self.logger is not None:
                self.logger.log_step({"step": self.step, "epoch": self.epoch, **numbers})
            if self.step % self.config.save_every == 0:
                self._save()
            self._stop_if_asked(stop)

    def _stop_if_asked(self, stop: ShutdownRequest) -> None:
        """Save and raise KeyboardInterrupt if any process was asked to stop: all have to agree."""
        asked = torch.tensor(float(stop.requested), device=self.accelerator.device)
        if self.accelerator.reduce(asked, reduction="mean").item() == 0:
            return
        if self.saved_step != self.step:
            self._save()
        self._report(f"stopped after step {self.step}; resume goes on from {self.folder / LAST}")
        raise KeyboardInterrupt

    def _describe(self, index: int) -> str:
        """Name an image of the training data, by its file where it has one."""
        described = getattr(self.train_data, "describe", None)
        return f"image {index}" if described is None else f"image {index}, {described(index)}"

    def _end_epoch(self) -> None:
        """Evaluate, look at the first epoch, and save."""
        number = self.epoch
        entry: dict[str, Any] = {"step": self.step, "epoch": number}
        entry["mean_loss"] = math.fsum(self.losses) / max(len(self.losses), 1)
        evaluate = (number + 1) % self.config.evaluate_every == 0 or number + 1 == self.config.epochs
        better = False
        if self.val_data is not None and evaluate:
            if time.monotonic() - self.saved_at > _UNSAVED:
                self._save()
            entry |= measure(self.stepper.eval_model, self.val_data, self.config.batch_size)
            better = self.best is None or entry["AP"] > self.best
            self.best, self.stale = (entry["AP"], 0) if better else (self.best, self.stale + 1)
        entry["seconds"] = time.monotonic() - self.began
        self.history.append(entry)
        if number == 0 and self.accelerator.is_main_process:
            self.first_epoch = check_first_epoch(
                self.stepper.model, self.train_data, self.stepper.criterion.matcher, entry.get("AP")
            )
            self._report(str(self.first_epoch))
        if self.logger is not None:
            self.logger.log_epoch(entry, epochs=self.config.epochs, best=self.best)
        self.epoch, self.batch, self.losses = number + 1, 0, []
        if better and self.accelerator.is_main_process:
            save_checkpoint(self.stepper.eval_model, self.folder / BEST)
        self._save()

    def _save(self) -> None:
        """Write the last checkpoint, in the first process."""
        if self.accelerator.is_main_process:
            state = self.stepper.state_dict() | {name: getattr(self, name) for name in (*_PLACE, "settings")}
            save_checkpoint(self.stepper.eval_model, self.folder / LAST, state)
        self.saved_step, self.saved_at = self.step, time.monotonic()

    def _report(self, text: str) -> None:
        if self.logger is not None:
            self.logger.report(text)


def _accelerator() -> Any:
    """Return accelerate's view of this process and its device."""
    try:
        import matplotlib  # noqa: F401  # before hours of work, not after
        import tensorboard  # noqa: F401
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"training needs {error.name}, which is not installed: pip install 'conditional-detr[train]'"
        ) from error
    return Accelerator(mixed_precision="no")  # the loop casts by itself, so that settings alone decide
