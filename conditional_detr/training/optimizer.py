"""What a step does to the weights: groups of parameters, their rates, the moving average, and memory saved."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from conditional_detr.deploy.backbone import normalised_convolutions, pads_with_zeros
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.training.config import TrainConfig

_BACKBONE = "backbone."
_DROP = 0.1  # what is left of the rates after "step" stepped


def parameter_groups(
    model: ConditionalDETR, config: TrainConfig, other_queries: nn.Embedding | None = None
) -> list[dict[str, Any]]:
    """Return AdamW's groups: what trains of the backbone with its own rate, and all else that trains.

    Args:
        model: the model.
        config: the settings.
        other_queries: those of further groups.

    Raises:
        ValueError: nothing trains.
    """
    backbone: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (backbone if name.startswith(_BACKBONE) else others).append(parameter)
    if other_queries is not None:
        others.extend(parameter for parameter in other_queries.parameters() if parameter.requires_grad)
    groups = [(others, config.lr), (backbone, config.backbone_lr)]
    found = [{"params": group, "lr": rate, "initial_lr": rate} for group, rate in groups if group]
    if not found:
        raise ValueError("model: expected parameters that train, got none with requires_grad")
    return found


def rate_factor(config: TrainConfig, step: int, epochs: float) -> float:
    """Return what the learning rates are multiplied with.

    Args:
        config: the settings.
        step: how many steps were done, of all.
        epochs: how many epochs were done, with the part of the present one.
    """
    done = epochs / config.epochs
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine":
        return warm * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    if config.schedule == "step" and done >= config.drop_at:
        return warm * _DROP
    return warm


def moving_average(model: ConditionalDETR, decay: float) -> AveragedModel:
    """Return a copy of the model that follows it: after n updates by a part 1 - min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        torch._foreach_lerp_(list(averages), list(weights), 1 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=follow)
    return average.requires_grad_(False)


@contextmanager
def gradient_checkpointing(model: ConditionalDETR, wanted: bool) -> Iterator[None]:
    """Keep only the inputs of layers and backbone stages that train, and compute them again in the backward pass."""
    parts = [*model.encoder.layers, *model.decoder.layers, *model.backbone.body.children()] if wanted else []
    parts = [part for part in parts if any(parameter.requires_grad for parameter in part.parameters())]
    with _replaced({part: partial(checkpoint, part.forward, use_reentrant=False) for part in parts}):
        yield


@contextmanager
def folded_batch_norm(model: ConditionalDETR) -> Iterator[None]:
    """Let convolutions of the backbone do what the frozen BatchNorm behind them does: the maps are gone through once.

    Statistics do not train, so scaling the weights, which is cheap, has the same gradients as scaling the maps. Under
    autocast the maps then stay in its precision. A backbone that cannot be traced stays as it is.
    """
    try:
        pairs = normalised_convolutions(model.backbone.body)
    except ValueError:
        pairs = []
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for convolution, norm in pairs:
        if not pads_with_zeros(convolution):
            continue
        forwards |= {convolution: partial(_convolve, convolution, norm), norm: _leave}
    with _replaced(forwards):
        yield


@contextmanager
def linear_as_convolution(model: nn.Module) -> Iterator[None]:
    """Let oneDNN, which computes convolutions, compute the linear layers too, as convolutions of a map one cell wide.

    Matrix products in float32 go to another library, which on some CPUs takes twice as long, forwards and backwards.
    Elsewhere than on a CPU, in other precisions and under autocast, where that is not so, layers stay as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with _replaced({layer: partial(_multiply, layer, layer.forward) for layer in layers}):
        yield


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward each; in the end they have again what they had, of their class or their own."""
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


def _convolve(convolution: nn.Conv2d, norm: Any, x: Tensor) -> Tensor:
    """Convolve with scaled weights and the bias that is left."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    if convolution.bias is not None:
        bias = bias + convolution.bias * scale
    geometry = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
    return cast(Tensor, _ScaledConvolution.apply(x, convolution.weight, scale, bias, geometry))


def _multiply(layer: nn.Linear, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute a linear layer as a convolution of a map of (rows, 1) cells, if that is faster."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel():
        return product(x)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, D, rows, 1), channels last
    y = F.conv2d(rows, layer.weight[:, :, None, None], layer.bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class _ScaledConvolution(torch.autograd.Function):
    """A convolution with weights times a factor for each channel, which does not keep the product.

    Autograd would keep it for every convolution of the backbone: as much memory again as the backbone's weights.
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
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            x.to(gradient.dtype),  # under autocast, what the convolution saw
            (weight * factor).to(gradient.dtype),
            [len(scale)],
            *ctx.geometry[:3],
            False,  # not transposed
            [0, 0],
            ctx.geometry[3],
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]],
        )
        of_x = None if of_x is None else of_x.to(x.dtype)
        of_weight = None if of_weight is None else of_weight.to(weight.dtype) * factor
        of_bias = None if of_bias is None else of_bias.to(scale.dtype)
        return of_x, of_weight, None, of_bias, None


def _leave(x: Tensor) -> Tensor:
    """Do nothing: the convolution before has done it."""
    return x
