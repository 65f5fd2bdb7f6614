"""A training run: its steps, epochs, evaluations and checkpoints."""

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conditional_detr.data.batching import batches
from conditional_detr.data.image_cache import ImageCache
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.set_prediction.losses import SetLoss
from conditional_detr.system.atomic_files import remove_unfinished
from conditional_detr.system.shutdown import ShutdownRequest
from conditional_detr.training.advice import advise
from conditional_detr.training.bad_images import BadImages
from conditional_detr.training.callbacks import Callback, Callbacks
from conditional_detr.training.checkpoints import (
    BEST,
    LAST,
    Progress,
    compare_settings,
    read_training_state,
    save_checkpoint,
)
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.consistency import check_images, describe_shared_images, parts_of
from conditional_detr.training.first_epoch import FirstEpochReport, check_first_epoch
from conditional_detr.training.loader import BatchLoader, InputTimes, LoadedBatch, SampleDataset
from conditional_detr.training.logging import RunLogger
from conditional_detr.training.optimizer import MakeOptimizer, fit_warmup, have_equal_rates
from conditional_detr.training.record import describe_run
from conditional_detr.training.result import TrainResult
from conditional_detr.training.run_folder import check_folder, locked
from conditional_detr.training.sampling import balanced_probabilities
from conditional_detr.training.steps import Stepper
from conditional_detr.training.surroundings import in_first_process, make_accelerator
from conditional_detr.training.time_limit import Clock
from conditional_detr.training.trackers import Trackers
from conditional_detr.training.validation import measure
from conditional_detr.training.validation_images import draw_validation

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

_UNSAVED = 60.0  # seconds since the last checkpoint after which one is written before an evaluation


class Run:
    """A training run: model, data, progress and files."""

    def __init__(
        self,
        model: DetectionTransformer,
        train_data: SampleDataset,
        val_data: SampleDataset | None,
        config: TrainConfig,
        folder: Path,
        criterion: SetLoss,
        callbacks: Sequence[Callback],
        make_optimizer: MakeOptimizer | None,
        trackers: "Sequence[str | GeneralTracker]",
    ) -> None:
        self.accelerator, self.trackers = make_accelerator(), Trackers(trackers)
        val_images, processes = 0 if val_data is None else len(val_data), self.accelerator.num_processes
        self.clock, self.saving = Clock(config.time_limit, val_images, processes), 0.0
        self.train_data, self.val_data, self.config, self.folder = train_data, val_data, config, folder
        self.probabilities = balanced_probabilities(train_data) if config.balanced else None
        self.steps_per_epoch = math.ceil(len(self._batches(0)) / config.accumulation)
        fitted = fit_warmup(config, self.steps_per_epoch * config.epochs)
        self.stepper = Stepper(model, fitted, criterion, self.accelerator, self._describe, make_optimizer)
        self.progress = Progress()
        self.bad_images = BadImages(self.progress, config.max_bad_images, self._describe)
        hooks = Callbacks(callbacks)
        self.settings = describe_run(
            model,
            train_data,
            val_data,
            config,
            criterion,
            processes=processes,
            optimizer=type(self.stepper.optimizer).__name__,
            callbacks=hooks.names,
        )
        self.callbacks = hooks if self.accelerator.is_main_process else Callbacks(())
        self.initial_weights: str | None = None
        self.first_epoch: FirstEpochReport | None = None
        self.logger: RunLogger | None = None
        self.saved_step: int | None = None
        self.saved_at = self.epoch_began = time.monotonic()
        self.input, self.warned = InputTimes(), False

    def prepare(self, resume: bool, check: bool, stack: contextlib.ExitStack) -> None:
        """Lock the folder, load the state of a resumed run, check the images, join the processes, start the trackers.

        Args:
            resume: whether to resume from a checkpoint in the folder.
            check: whether to check the images.
            stack: finishes the trackers and releases the lock.
        """

        def open_folder() -> None:
            check_folder(self.folder, resume=resume)
            stack.enter_context(locked(self.folder))
            check_folder(self.folder, resume=resume)  # again: another process may just have ended
            for folder in (self.folder, self.folder / LAST, self.folder / BEST):
                remove_unfinished(folder)

        in_first_process(self.accelerator, open_folder)
        state = read_training_state(self.folder) if resume else None
        if state is None:
            self.initial_weights = self.stepper.model.weights_digest()
        else:
            self._load(state)
        if check and not self.finished:
            limit = self.config.max_bad_images
            in_first_process(self.accelerator, lambda: check_images(self.train_data, self.val_data, limit))
        self.stepper.join_processes()
        tracking = self.trackers.running(self.settings, self.folder)
        in_first_process(self.accelerator, lambda: stack.enter_context(tracking))

    @contextlib.contextmanager
    def logging(self, shown: bool) -> Iterator[None]:
        """Log the run while the context is active, in the first process only."""
        if not self.accelerator.is_main_process:
            yield
            return
        total = None if self.config.time_limit else self.steps_per_epoch * self.config.epochs
        done = {"step": self.progress.step, "epoch": self.progress.epoch}
        with RunLogger(self.folder, **done, total=total, trackers=self.trackers, shown=shown) as self.logger:
            for part in parts_of(self.train_data):
                if isinstance(cache := getattr(part, "cache", None), ImageCache):
                    self._report(str(cache))
            if not self.finished:
                self._report("\n".join(advise(self.stepper, self.config, self.accelerator)))
                self._report(describe_shared_images(self.train_data, self.val_data))
            if self.stepper.config.warmup != self.config.warmup:
                fitted, wanted = self.stepper.config.warmup, self.config.warmup
                self._report(f"warm-up of {fitted} steps instead of {wanted}: the whole run has {total} steps")
            with self.callbacks.running(self.stepper.model, self.settings, self.folder):
                yield

    def train_epochs(self, shutdown: ShutdownRequest) -> None:
        """Train the remaining epochs; error messages have the checkpoint to resume from."""
        if self.finished:
            why = "AP stopped improving" if self.stopped_early else f"all {self.config.epochs} epochs are done"
            why = "its time limit is over" if self.progress.ended else why
            self._report(f"the run is finished: {why}; nothing to train")
            self._save()
        pin, parts = self.accelerator.device.type == "cuda", parts_of(self.train_data)
        loader = BatchLoader(self.train_data, self.config, parts=parts, pin=pin, skip=self.bad_images.skip)
        try:
            with loader:
                while not self.finished:
                    self._train_epoch(loader, shutdown)
                    self._end_epoch()
                    self._stop_if_requested(shutdown)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(*error.args or (f"stopped at once; {self._last_checkpoint}",)) from None
        except (OSError, ValueError) as error:
            message = f"{error}; {self._last_checkpoint}"
            raise (OSError if isinstance(error, OSError) else ValueError)(message) from error
        except Exception as error:  # of a dataset, a data worker or the device: the type stays
            error.args = (f"{error}; {self._last_checkpoint}",)
            raise

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        done = not self.config.time_limit and self.progress.epoch >= self.config.epochs
        return done or self.progress.ended or self.stopped_early

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

    @property
    def _last_checkpoint(self) -> str:
        """The last good checkpoint, for messages."""
        if self.saved_step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.folder / LAST}, of step {self.saved_step}"

    def _load(self, state: dict[str, Any]) -> None:
        """Load a training state, after comparing its settings with those of this run."""
        compare_settings(state, self.settings, self.folder)
        before, count = state["settings"], len(self._batches(0))
        try:
            self.stepper.load_state_dict(state)
            self.progress.load_state_dict(state)
            self.clock.before = self.progress.seconds
            if self.accelerator.is_main_process:
                self.callbacks.load_state_dict(state.get("callbacks", []))
                self.trackers.ids = dict(state.get("trackers", {}))
            self.progress.check(count, self.config.accumulation)
            known = {field.name: before[field.name] for field in fields(TrainConfig) if field.name in before}
            old = fit_warmup(TrainConfig(**known), self.steps_per_epoch * before["epochs"])
        except Exception as error:  # torch raises errors of any type
            raise ValueError(
                f"{self.folder / LAST}: expected the training state of this model, got {error}"
            ) from error
        steps, epochs = self.progress.step, self.config.epochs
        timed = bool(self.config.time_limit)  # its rates do not depend on the number of epochs
        if self.accelerator.is_main_process and not (
            timed or have_equal_rates(old, self.stepper.config, steps, count)
        ):
            warnings.warn(
                f"epochs: got {epochs}, not {before['epochs']} as before: the first {steps} steps had other learning"
                f" rates than those of a run of {epochs} epochs, so the weights will differ from such a run's",
                stacklevel=4,
            )
        self.initial_weights = state.get("initial_weights")
        if self.settings["validation"] is None:  # of an evaluation that may follow later
            self.settings["validation"] = state["settings"].get("validation")
        self.saved_step = self.progress.step

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return the sample indices of each batch of an epoch, for this process."""
        options: dict[str, Any] = {"seed": self.config.seed, "epoch": epoch, "probabilities": self.probabilities}
        options |= {"rank": self.accelerator.process_index, "processes": self.accelerator.num_processes}
        return batches(self.train_data, self.config.batch_size, **options)

    def _train_epoch(self, loader: BatchLoader, shutdown: ShutdownRequest) -> None:
        """Train the remaining steps of the current epoch."""
        progress = self.progress
        self.epoch_began, self.input = time.monotonic(), InputTimes()
        plan = self._batches(progress.epoch)
        loaded = loader.load(plan[progress.batch :], progress.epoch, self.input.record)
        self._train_batches(loaded, len(plan), shutdown)

    def _train_batches(self, loaded: Iterator[LoadedBatch], count: int, shutdown: ShutdownRequest) -> None:
        """Train on the remaining batches of an epoch of ``count`` batches."""
        progress = self.progress
        while (part := self._shared(self.clock.part)) < 1 and (group := self._next_group(loaded)):
            began = time.monotonic()
            epochs = part * self.config.epochs if self.config.time_limit else progress.epoch + progress.batch / count
            numbers = self.stepper.train_step(group, step=progress.step, epochs=epochs)
            progress.step, progress.batch = progress.step + 1, progress.batch + len(group)
            progress.losses.append(numbers["loss"])
            self.clock.add_step(sum(len(indices) for indices, _ in group), time.monotonic() - began)
            if self.logger is not None:
                entry = {"step": progress.step, "epoch": progress.epoch, **numbers}
                self.logger.log_step(entry)
                self.callbacks.step(entry)
            if progress.step % self.config.save_every == 0:
                self._save()
            self._stop_if_requested(shutdown)

    def _shared(self, value: float) -> float:
        """Return the mean of the processes' values, each of its own clock, so that all decide alike."""
        if not self.config.time_limit or self.accelerator.num_processes == 1:
            return value
        values = torch.tensor(value, dtype=torch.float32, device=self.accelerator.device)
        return float(self.accelerator.reduce(values, reduction="mean"))

    def _next_group(self, loaded: Iterator[LoadedBatch]) -> list[LoadedBatch]:
        """Return the batches of the next step, and record the time of waiting for them."""
        began = time.monotonic()
        group = list(islice(loaded, self.config.accumulation))
        self.input.waiting += time.monotonic() - began
        return group

    def _stop_if_requested(self, shutdown: ShutdownRequest) -> None:
        """Save and raise KeyboardInterrupt in all processes if any of them has a shutdown request."""
        requested = torch.tensor(float(shutdown.requested), dtype=torch.float32, device=self.accelerator.device)
        if self.accelerator.reduce(requested, reduction="mean").item() == 0:
            return
        if self.saved_step != self.progress.step:
            self._save()
        message = f"stopped after step {self.progress.step}; resume from {self.folder / LAST}"
        self._report(message)
        raise KeyboardInterrupt(message)

    def _describe(self, index: int) -> str:
        """Return the index of a training image and, if the dataset has it, its description."""
        described = getattr(self.train_data, "describe", None)
        return f"image {index}" if described is None else f"image {index}, {described(index)}"

    def _end_epoch(self) -> None:
        """Evaluate, check the first epoch, log and save."""
        progress, number = self.progress, self.progress.epoch
        if not self.warned and (slow := self.input.explain(time.monotonic() - self.epoch_began, self.config.workers)):
            self.warned = True
            warnings.warn(slow, stacklevel=3)
        entry: dict[str, Any] = {"step": progress.step, "epoch": number}
        entry["mean_loss"] = math.fsum(progress.losses) / max(len(progress.losses), 1)
        began, ended = time.monotonic(), self._shared(self.clock.part) >= 1
        last = ended if self.config.time_limit else number + 1 == self.config.epochs
        evaluate = (number + 1) % self.config.evaluate_every == 0 and self._shared(self.clock.evaluates) > 0.5
        evaluate = evaluate or last
        better = False
        if self.val_data is not None and evaluate:
            if time.monotonic() - self.saved_at > _UNSAVED:
                self._save()
            entry |= measure(self.stepper.eval_model, self.val_data, self.config.batch_size, self.stepper.criterion)
            entry |= self.callbacks.metrics(self.stepper.eval_model, self.val_data, entry)
            better = progress.best is None or entry["AP"] > progress.best
            progress.best, progress.stale = (entry["AP"], 0) if better else (progress.best, progress.stale + 1)
        entry["seconds"] = time.monotonic() - self.epoch_began
        progress.history.append(entry)
        self.bad_images.share(self.accelerator)
        if number == 0 and self.accelerator.is_main_process:
            matcher = self.stepper.criterion.matcher
            self.first_epoch = check_first_epoch(
                self.stepper.model, self.train_data, matcher, entry.get("AP"), bad_images=progress.bad_images
            )
            self._report(str(self.first_epoch))
        if self.logger is not None:
            speed = {"images_per_second_loaded": self.input.rate(self.config.workers), "waited": self.input.waiting}
            epochs = None if self.config.time_limit else self.config.epochs
            self.logger.log_epoch({**entry, **speed}, epochs=epochs, best=progress.best)
            if better and self.val_data is not None:
                try:
                    self.logger.log_images(draw_validation(self.stepper.eval_model, self.val_data), progress.step)
                except Exception as error:  # images to look at must not end a training before it saves
                    step = progress.step
                    warnings.warn(f"no validation images in TensorBoard at step {step}: {error}", stacklevel=3)
            self.callbacks.epoch(self.stepper.eval_model, entry)
        if not ended:
            progress.epoch, progress.batch, progress.losses = number + 1, 0, []
        if evaluate:
            self.clock.add_closing(time.monotonic() - began + self.saving)
            progress.ended = self._shared(self.clock.part) >= 1
        if better and self.accelerator.is_main_process:
            save_checkpoint(self.stepper.eval_model, self.folder / BEST)
        self._save()

    def _save(self) -> None:
        """Write the last checkpoint, in the first process only."""
        began, self.progress.seconds = time.monotonic(), self.clock.seconds
        if self.accelerator.is_main_process:
            state = self.stepper.state_dict() | self.progress.state_dict()
            state |= {"settings": self.settings, "initial_weights": self.initial_weights}
            state |= {"callbacks": self.callbacks.state_dict(), "trackers": self.trackers.ids}
            state["category_ids"] = list(self.stepper.model.metadata.category_ids)
            save_checkpoint(self.stepper.eval_model, self.folder / LAST, state)
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()
        self.saving = self.saved_at - began

    def _report(self, text: str) -> None:
        if self.logger is not None:
            self.logger.report(text)
