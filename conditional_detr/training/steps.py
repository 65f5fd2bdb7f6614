"""One step of training: forward, loss, backward, clipping, update, moving average."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from conditional_detr.modeling.conditional_detr import ConditionalDETR, Output
from conditional_detr.set_prediction.losses import SetLoss, boxes_per_process
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loader import Batch, derive_seed
from conditional_detr.training.optimizer import moving_average, parameter_groups, rate_factor
from conditional_detr.training.query_groups import QueryGroups

MicroBatches: TypeAlias = Sequence[tuple[list[int], Batch]]
"""The batches of one step, each with the places of its images in the data set."""

_NUMBERS = ("loss", "class", "l1", "giou", "norm")


class Stepper:
    """What changes with every step.

    Args:
        model: trained in place.
        config: the settings.
        criterion: the loss.
        accelerator: accelerate's, which joins the processes.
        describe: names an image of the data set by its place, for messages.

    Attributes:
        model: the model.
        grouped: the model with the groups of queries that only training has; None if it has one group.
        average: the moving average of its weights; None if there is none.
        optimizer: AdamW.
        scaler: of float16's gradients; of other precisions it does nothing.
    """

    def __init__(
        self,
        model: ConditionalDETR,
        config: TrainConfig,
        criterion: SetLoss,
        accelerator: Any,
        describe: Callable[[int], str],
    ) -> None:
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.model, self.config, self.criterion, self.describe = model, config, criterion, describe
        if config.backbone_lr == 0:
            model.backbone.requires_grad_(False)
        model.train().to(self.device)
        model.backbone.to(memory_format=torch.channels_last)  # in which convolutions are faster
        several = config.query_groups > 1
        self.grouped = QueryGroups(model, config.query_groups, config.seed).to(self.device) if several else None
        self.average = moving_average(model, config.ema) if config.ema else None
        trained = parameter_groups(model, config, None if self.grouped is None else self.grouped.others)
        self.optimizer = torch.optim.AdamW(trained, weight_decay=config.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.autocast == "float16")
        self._wrapped: Any = None

    @property
    def eval_model(self) -> ConditionalDETR:
        """The model to evaluate and to save: the moving average, or where there is none the model itself."""
        return self.model if self.average is None else cast(ConditionalDETR, self.average.module)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "other_queries": None if self.grouped is None else self.grouped.others.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.grouped is not None:
            self.grouped.others.load_state_dict(state["other_queries"])

    def join_processes(self) -> None:
        """Get ready for steps, once the weights are what they shall be: all processes take the first one's."""
        self._wrapped = self.accelerator.prepare_model(self.grouped or self.model)

    def train_step(self, group: MicroBatches, *, step: int, epochs: float) -> dict[str, float]:
        """Do a step on the joined batch of a group, of all processes.

        Args:
            group: the batches.
            step: how many steps were done.
            epochs: how many epochs were done, with the part of the present one.

        Returns:
            loss, the total; class, l1 and giou, unweighted, of the last layer; norm, of the gradients before they are
            clipped; lr.

        Raises:
            ValueError: a loss or gradients that are not finite, before they reach the weights; targets that do not
                fit. The message names step and images.
        """
        torch.manual_seed(derive_seed(self.config.seed, step, self.accelerator.process_index))
        factor = rate_factor(self.config, step, epochs)
        for settings in self.optimizer.param_groups:
            settings["lr"] = settings["initial_lr"] * factor
        losses = self._backward(group, step)
        self.scaler.unscale_(self.optimizer)
        trained = [parameter for settings in self.optimizer.param_groups for parameter in settings["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.clip or math.inf)
        told = self.accelerator.reduce(torch.cat((losses, norm[None])), reduction="mean").tolist()
        numbers = dict(zip(_NUMBERS, told, strict=True))
        self._check_finite(numbers, group, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return {**numbers, "lr": self.config.lr * factor}

    def _backward(self, group: MicroBatches, step: int) -> Tensor:
        """Compute the gradients of the joined batch; returns its loss, and class, L1 and GIoU of the last layer (4,).

        A loss is divided by its batch's number of boxes, that of the joined batch by all: so each counts by its share.
        """
        shares: list[Any] = [1.0]
        if len(group) > 1:
            counts = [sum(len(target["labels"]) for target in targets) for _, (*_, targets) in group]
            total = boxes_per_process(sum(counts), self.device)
            shares = [boxes_per_process(count, self.device) / total for count in counts]
        found = []
        for place, ((indices, batch), share) in enumerate(zip(group, shares, strict=True)):
            last = place == len(group) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self._wrapped):
                losses = self._losses(batch, indices, step)
                self.scaler.scale(losses["total"] * share).backward()
            parts = [losses["total"], *(losses[name][-1] for name in ("class", "l1", "giou"))]
            found.append(torch.stack(parts).detach() * share)
        return torch.stack(found).sum(0)

    def _losses(self, batch: Batch, indices: Sequence[int], step: int) -> dict[str, Tensor]:
        """Return the losses of a batch; an error names its images."""
        pixels, padding, targets = batch
        pixels = pixels.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        padding = None if padding is None else padding.to(self.device, non_blocking=True)
        precision = self.config.autocast
        dtype = getattr(torch, precision) if precision else None
        with torch.autocast(self.device.type, dtype=dtype, enabled=precision is not None):
            output = self._wrapped(pixels, padding)
        try:
            return self._mean_over_groups(output, targets)
        except (TypeError, ValueError) as error:
            raise ValueError(f"step {step + 1}: {error}; {self._names(indices)}") from error

    def _mean_over_groups(self, output: Output, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the losses, their mean over the groups of queries if there are several."""
        groups = self.config.query_groups
        if groups == 1:
            return self.criterion(output, targets)
        try:
            losses = self.criterion(output, targets * groups)
        except ValueError as error:
            raise ValueError(
                f"{error} (of {groups} groups of queries, each with {len(targets)} images: images[{len(targets)}] is"
                " images[0] in the second)"
            ) from error
        # the criterion divides by the boxes of all groups together, at least 1: where there are none, by too little
        count = sum(len(target["labels"]) for target in targets)
        joined, each = (boxes_per_process(n, self.device) for n in (groups * count, count))
        return {name: loss * (joined / (groups * each)) for name, loss in losses.items()}

    def _check_finite(self, numbers: dict[str, float], group: MicroBatches, step: int) -> None:
        """Raise ValueError unless loss and gradients are finite; float16's scaler passes over gradients by itself."""
        names = {"loss": "loss", "norm": "norm of the gradients"}
        if self.scaler.is_enabled():
            del names["norm"]
        for name, what in names.items():
            if not math.isfinite(numbers[name]):
                raise ValueError(
                    f"step {step + 1}: expected a finite {what}, got {numbers[name]}; training diverged: lower the"
                    " learning rate, clip gradients, or warm up;"
                    f" {self._names([index for indices, _ in group for index in indices])}"
                )

    def _names(self, indices: Sequence[int]) -> str:
        """Say which images of the data set those of a batch are."""
        return ", ".join(f"images[{place}] is {self.describe(index)}" for place, index in enumerate(indices))
