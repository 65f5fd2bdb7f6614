"""One step of training: forward, loss, backward, clipping, update, moving average."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from conditional_detr.data.seeds import derive_seed
from conditional_detr.modeling.detection_transformer import DetectionTransformer, Output
from conditional_detr.set_prediction.losses import Normalisers, SetLoss
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loader import Batch
from conditional_detr.training.optimizer import (
    MakeOptimizer,
    create_optimizer,
    moving_average,
    rate_factor,
)
from conditional_detr.training.parts import freeze, parameter_groups
from conditional_detr.training.query_groups import QueryGroups

MicroBatches: TypeAlias = Sequence[tuple[list[int], Batch]]
"""The batches that one step accumulates, each with the dataset indices of its images."""

_NUMBERS = ("loss", "class", "l1", "giou", "norm")


class Stepper:
    """Model, optimizer, gradient scaler and moving average, which every step updates.

    Args:
        model: trained in place.
        config: the settings.
        criterion: the loss.
        accelerator: accelerate's, which synchronises the processes.
        describe: returns a description of an image by its dataset index, for error messages.
        make_optimizer: returns the optimizer of parameter groups; None: AdamW.

    Attributes:
        model: the model.
        grouped: the model with its additional query groups; None if there is one group.
        average: the moving average of the weights; None if the configuration has none.
        optimizer: updates the weights.
        scaler: scales the gradients of float16; disabled in other precisions.
    """

    def __init__(
        self,
        model: DetectionTransformer,
        config: TrainConfig,
        criterion: SetLoss,
        accelerator: Any,
        describe: Callable[[int], str],
        make_optimizer: MakeOptimizer | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.model, self.config, self.criterion, self.describe = model, config, criterion, describe
        if config.backbone_lr == 0:
            model.backbone.requires_grad_(False)
        freeze(model, config.freeze)
        model.train().to(self.device)
        model.backbone.to(memory_format=torch.channels_last)  # convolutions are faster in it
        groups = config.query_groups
        self.grouped = QueryGroups(model, groups, config.seed).to(self.device) if groups > 1 else None
        self.average = moving_average(model, config.ema) if config.ema else None
        trained = parameter_groups(model, config, None if self.grouped is None else self.grouped.others)
        self.optimizer = create_optimizer(trained, config, make_optimizer)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.autocast == "float16")
        self._wrapped: Any = None

    @property
    def eval_model(self) -> DetectionTransformer:
        """The model to evaluate and save: the moving average if there is one, else the model itself."""
        return self.model if self.average is None else cast(DetectionTransformer, self.average.module)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "moments": len(self.optimizer.state),
            "other_queries": None if self.grouped is None else self.grouped.others.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`.

        Raises:
            Exception: the state is not of such a stepper; of any type, as torch raises them.
        """
        self.model.load_state_dict(state["model"])
        settings = self._optimizer_settings()
        self.optimizer.load_state_dict(state["optimizer"])
        if (changed := self._optimizer_settings()) != settings:
            raise ValueError(f"settings of the optimizer {changed}, not {settings}")
        if len(self.optimizer.state) != state.get("moments", len(self.optimizer.state)):
            raise ValueError(
                f"the optimizer's state of {len(self.optimizer.state)} parameters, not {state['moments']}"
            )
        for parameter, values in self.optimizer.state.items() if type(self.optimizer) is torch.optim.AdamW else ():
            expected = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}  # AdamW's
            got = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in values.items()}
            if got != expected:
                raise ValueError(f"state of the optimizer {got}, not {expected}")
            steps, first, second = (torch.as_tensor(values[name]) for name in expected)
            finite = all(x.is_floating_point() and bool(x.isfinite().all()) for x in (steps, first, second))
            if not finite or not 1 <= steps <= state["step"] or bool((second < 0).any()):
                raise ValueError(f"state of the optimizer after step {steps}, or moments that are not finite")
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.grouped is not None:
            self.grouped.others.load_state_dict(state["other_queries"])

    def _optimizer_settings(self) -> list[dict[str, Any]]:
        """Return the settings of each parameter group, without the learning rate, which every step sets."""
        return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]

    def join_processes(self) -> None:
        """Prepare distributed training, after the weights are loaded: all processes copy those of the first one."""
        self._wrapped = self.accelerator.prepare_model(self.grouped or self.model)

    def train_step(self, batches: MicroBatches, *, step: int, epochs: float) -> dict[str, float]:
        """Update the weights once, by the gradients of the joined batch of all processes.

        Args:
            batches: the batches of the step.
            step: number of completed steps.
            epochs: number of completed epochs, including the fraction of the current one.

        Returns:
            A dict of loss, the weighted total; class, l1 and giou, unweighted, of the last layer; norm, of the
            gradients before clipping; and lr.

        Raises:
            ValueError: a loss or gradients that are not finite, before the weights are updated; or invalid targets.
                The message has the step and the images.
        """
        torch.manual_seed(derive_seed(self.config.seed, step, self.accelerator.process_index, bits=63))
        factor = rate_factor(self.config, step, epochs)
        for settings in self.optimizer.param_groups:
            settings["lr"] = settings["initial_lr"] * factor
        losses = self._backward(batches, step)
        self.scaler.unscale_(self.optimizer)
        trained = [parameter for settings in self.optimizer.param_groups for parameter in settings["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.clip or math.inf)
        means = self.accelerator.reduce(torch.cat((losses, norm[None])), reduction="mean").tolist()
        numbers = dict(zip(_NUMBERS, means, strict=True))
        self._check_finite(numbers, batches, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return {**numbers, "lr": self.config.lr * factor}

    def _backward(self, batches: MicroBatches, step: int) -> Tensor:
        """Compute the gradients of the joined batch; return its loss, and class, L1 and GIoU of the last layer (4,).

        Each batch's losses are divided by the normalisers of the joined batch, so that they add up.
        """
        criterion = self._criterion([targets for _, (*_, targets) in batches])
        added = []
        for i, (indices, batch) in enumerate(batches):
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._wrapped):
                losses = self._losses(criterion, batch, indices, step)
                self.scaler.scale(losses["total"]).backward()
            parts = [losses["total"], *(losses[name][-1] for name in ("class", "l1", "giou"))]
            added.append(torch.stack(parts).detach())
        return torch.stack(added).sum(0)

    def _criterion(self, targets: Sequence[Sequence[dict[str, Tensor]]]) -> SetLoss:
        """Return the criterion for the batches of a step, which are parts of a joined batch, and for its groups.

        The losses of several query groups are averaged: without boxes, their normalisers would not add up.
        """
        groups = self.config.query_groups
        if len(targets) == groups == 1:
            return self.criterion
        counts = [len(target["labels"]) for batch in targets for target in batch]
        one = self.criterion.normalisers_of(counts, self.model.config.num_queries, self.device)
        return replace(self.criterion, normalisers=Normalisers(*(groups * divisor for divisor in one)))

    def _losses(self, criterion: SetLoss, batch: Batch, indices: Sequence[int], step: int) -> dict[str, Tensor]:
        """Return the losses of a batch; an error message has its images."""
        pixels, padding, targets = batch
        pixels = pixels.to(self.device, self.model.dtype, non_blocking=True, memory_format=torch.channels_last)
        padding = None if padding is None else padding.to(self.device, non_blocking=True)
        precision = self.config.autocast
        dtype = getattr(torch, precision) if precision else None
        with torch.autocast(self.device.type, dtype=dtype, enabled=precision is not None):
            output = self._wrapped(pixels, padding)
        try:
            return self._of_groups(criterion, output, targets)
        except (TypeError, ValueError) as error:
            raise ValueError(f"step {step + 1}: {error}; {self._describe_images(indices)}") from error

    def _of_groups(self, criterion: SetLoss, output: Output, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses of all query groups, each of which is matched to all targets."""
        groups = self.config.query_groups
        try:
            return criterion(output, targets * groups)
        except ValueError as error:
            if groups == 1:
                raise
            raise ValueError(
                f"{error} (with {groups} query groups of {len(targets)} images each: images[{len(targets)}] is"
                " images[0] of the second group)"
            ) from error

    def _check_finite(self, numbers: dict[str, float], batches: MicroBatches, step: int) -> None:
        """Raise ValueError unless loss and gradients are finite; the scaler of float16 skips such gradients itself."""
        names = {"loss": "loss", "norm": "norm of the gradients"}
        if self.scaler.is_enabled():
            del names["norm"]
        for name, what in names.items():
            if not math.isfinite(numbers[name]):
                raise ValueError(
                    f"step {step + 1}: expected a finite {what}, got {numbers[name]}; training diverged: lower the"
                    " learning rate, clip gradients, or warm up;"
                    f" {self._describe_images([index for indices, _ in batches for index in indices])}"
                )

    def _describe_images(self, indices: Sequence[int]) -> str:
        """Return descriptions of a batch's images."""
        return ", ".join(f"images[{i}] is {self.describe(index)}" for i, index in enumerate(indices))
