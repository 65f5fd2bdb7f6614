"""Parameter groups, learning rates, the moving average of the weights, and faster or smaller backward passes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from conditional_detr.deploy.backbone import normalised_convolutions, pads_with_zeros
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.training.config import TrainConfig

MakeOptimizer: TypeAlias = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Creates the optimizer of parameter groups, dicts of params, lr and initial_lr."""

_DROP = 0.1  # factor of the learning rates after the step
_LONGEST_WARMUP = 0.1  # part of the time limit


def create_optimizer(
    groups: list[dict[str, Any]], config: TrainConfig, make: MakeOptimizer | None
) -> torch.optim.Optimizer:
    """Return AdamW, or what ``make`` returns.

    Raises:
        TypeError: that is no optimizer.
        ValueError: it has other parameters than the groups, or no ``initial_lr``, which each step scales.
    """
    if make is None:
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    if not callable(make):
        raise TypeError(f"optimizer: expected a function of parameter groups, got {type(make).__name__}")
    wanted = {id(parameter) for group in groups for parameter in group["params"]}
    optimizer = make(groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a function that returns a torch Optimizer, got {optimizer!r}")
    if {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} != wanted:
        raise ValueError("optimizer: expected one of all parameters of the groups, got one of others")
    if any("initial_lr" not in group for group in optimizer.param_groups):
        raise ValueError("optimizer: expected groups with initial_lr, as they were given, got groups without it")
    return optimizer


def have_equal_rates(first: TrainConfig, second: TrainConfig, steps: int, batches: int) -> bool:
    """Return whether the first steps have the same learning rates with two configurations.

    Args:
        first: a configuration, its warm-up fitted to its run.
        second: another one, of the same accumulation.
        steps: the number of steps to compare.
        batches: number of batches of an epoch.
    """
    steps_per_epoch = math.ceil(batches / first.accumulation)
    for step in range(steps):
        epoch, within = divmod(step, steps_per_epoch)
        epochs = epoch + within * first.accumulation / batches
        if rate_factor(first, step, epochs) != rate_factor(second, step, epochs):
            return False
    return True


def fit_warmup(config: TrainConfig, steps: int) -> TrainConfig:
    """Return the settings for a run of some steps: a warm-up of more than half of them becomes a tenth of them."""
    return config if config.time_limit or 2 * config.warmup <= steps else replace(config, warmup=math.ceil(steps / 10))


def rate_factor(config: TrainConfig, step: int, epochs: float) -> float:
    """Return the factor of the learning rates.

    Args:
        config: the settings.
        step: number of completed steps.
        epochs: number of completed epochs, including the fraction of the current one; with a time limit, the part of
            it that is used, times ``config.epochs``.
    """
    done = epochs / config.epochs
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.time_limit:  # the number of steps is unknown
        warm = min(1.0, max(warm, done / _LONGEST_WARMUP))
    if config.schedule == "cosine":
        return warm * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    if config.schedule == "step" and done >= config.drop_at:
        return warm * _DROP
    return warm


def moving_average(model: DetectionTransformer, decay: float) -> AveragedModel:
    """Return an exponential moving average of the model, with decay min(decay, (1 + n) / (10 + n)) after n updates."""

    @torch.no_grad()
    def update(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(list(averages), list(weights), 1 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=update)
    return average.requires_grad_(False)


@contextmanager
def gradient_checkpointing(model: DetectionTransformer, enabled: bool) -> Iterator[None]:
    """Store only the inputs of trainable layers and backbone stages; recompute the rest in the backward pass."""
    parts = [*model.encoder.layers, *model.decoder.layers, *model.backbone.body.children()] if enabled else []
    parts = [part for part in parts if any(parameter.requires_grad for parameter in part.parameters())]
    with _replaced_forwards({part: partial(checkpoint, part.forward, use_reentrant=False) for part in parts}):
        yield


@contextmanager
def folded_batch_norm(model: DetectionTransformer) -> Iterator[None]:
    """Fold each frozen BatchNorm of the backbone into the convolution before it, while the context is active.

    Its statistics are constant, so scaling the weights, which are small, gives the same gradients as scaling the
    feature maps. Under autocast, the feature maps then keep its precision. A backbone that cannot be traced is left
    unchanged.
    """
    try:
        pairs = normalised_convolutions(model.backbone.body)
    except ValueError:
        pairs = []
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for convolution, norm in pairs:
        if not pads_with_zeros(convolution):
            continue
        forwards |= {convolution: partial(_folded_convolution, convolution, norm), norm: _identity}
    with _replaced_forwards(forwards):
        yield


@contextmanager
def linear_as_convolution(model: nn.Module) -> Iterator[None]:
    """Compute linear layers as 1 x 1 convolutions, which oneDNN computes, while the context is active.

    PyTorch computes float32 matrix products with another library, which on some CPUs takes twice as long, forward and
    backward. On other devices, in other precisions and under autocast, layers are left unchanged.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with _replaced_forwards({layer: partial(_as_convolution, layer, layer.forward) for layer in layers}):
        yield


@contextmanager
def training_forwards(model: DetectionTransformer, config: TrainConfig) -> Iterator[None]:
    """Compute the forward and backward passes of training faster, or with less memory, while the context is active."""
    checkpointing = gradient_checkpointing(model, config.gradient_checkpointing)
    with folded_batch_norm(model), linear_as_convolution(model), checkpointing:
        yield


@contextmanager
def _replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules, and restore it at the end, whether it was the class's or the instance's own."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


def _folded_convolution(convolution: nn.Conv2d, norm: Any, x: Tensor) -> Tensor:
    """Compute a convolution with the BatchNorm folded into its weights and bias."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    if convolution.bias is not None:
        bias = bias + convolution.bias * scale
    geometry = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return cast(Tensor, _ScaledConvolution.apply(x, convolution.weight, scale, bias, geometry))


def _as_convolution(layer: nn.Linear, linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute a linear layer as a convolution of a feature map of height rows and width 1, if that is faster."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel():
        return linear(x)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, D, rows, 1), channels last
    y = F.conv2d(rows, layer.weight[:, :, None, None], layer.bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class _ScaledConvolution(torch.autograd.Function):
    """Convolution whose weights are scaled by output channel, without storing the scaled weights.

    Autograd would store them for every convolution, which takes as much memory as the weights of the backbone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, geometry: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = geometry
        return F.conv2d(x, weight * scale[:, None, None, None], bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        factor = scale[:, None, None, None]
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            gradient,
            x.to(gradient.dtype),  # the dtype of the convolution under autocast
            (weight * factor).to(gradient.dtype),
            [len(scale)],
            *ctx.geometry[:3],
            False,  # not transposed
            [0, 0],
            ctx.geometry[3],
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]],
        )
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype) * factor
        grad_bias = None if grad_bias is None else grad_bias.to(scale.dtype)
        return grad_x, grad_weight, None, grad_bias, None


def _identity(x: Tensor) -> Tensor:
    """Return the input: the convolution before has applied the BatchNorm."""
    return x
