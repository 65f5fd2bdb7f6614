"""Advice before a run begins: the learning rate for its images a step, and the memory that is taken in any case."""

import math
from typing import Any

import torch

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
    trained = sum(p.numel() * p.element_size() for group in stepper.optimizer.param_groups for p in group["params"])
    weights = sum(p.numel() * p.element_size() for p in stepper.model.parameters())
    taken = weights * (2 if config.ema else 1) + 3 * trained
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
