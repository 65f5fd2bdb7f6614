"""Advice before a run begins: the learning rate for its images a step, and the memory that is taken in any case."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conditional_detr.system.memory import free_memory, readable_bytes
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.steps import Stepper

_IMAGES, _RATE = 16, 1e-4  # images a step and learning rate of the paper
_FAR = 2.0  # ratio of a learning rate to the expected one that is worth a line


def advise(stepper: Stepper, config: TrainConfig, accelerator: Any) -> list[str]:
    """Return lines of advice, the first about memory.

    Args:
        stepper: model and optimizer of the run.
        config: the settings.
        accelerator: accelerate's.
    """
    taken = _bytes_of(stepper.model.parameters()) + training_bytes(stepper.model, config)
    on_gpu = accelerator.device.type == "cuda"
    free = torch.cuda.mem_get_info(accelerator.device)[0] if on_gpu else free_memory()
    left = f"; {readable_bytes(free)} are free" if math.isfinite(free) else ""
    lines = [
        f"memory: {readable_bytes(taken)} for weights, gradients and moments, images come on top{left}."
        " If it does not suffice: a smaller batch size with more accumulation, which trains the same, gradient"
        " checkpointing, autocast"
    ]
    images = config.batch_size * config.accumulation * accelerator.num_processes
    usual = usual_rate(images)
    if not usual / _FAR <= config.lr <= usual * _FAR:
        lines.append(
            f"learning rate: {config.lr:g} for {images} images a step; the paper's {_RATE:g} for {_IMAGES} images,"
            f" scaled by the square root, would be {usual:.1e}"
        )
    return lines


def usual_rate(images: int) -> float:
    """Return the paper's learning rate for another number of images a step: AdamW's scales with the square root."""
    return _RATE * math.sqrt(images / _IMAGES)


def training_bytes(model: nn.Module, config: TrainConfig) -> int:
    """Return the bytes that come on top of the weights: gradients, both moments of AdamW, the moving average."""
    trained = _bytes_of(p for p in model.parameters() if p.requires_grad)
    return 3 * trained + (_bytes_of(model.parameters()) if config.ema else 0)


def _bytes_of(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
