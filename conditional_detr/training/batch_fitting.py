"""The largest batch that fits in memory, and the accumulation that keeps the images of a step."""

import copy
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from conditional_detr.data.dataset import Sample
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.set_prediction.losses import SetLoss
from conditional_detr.system.memory import free_memory, readable_bytes
from conditional_detr.training.advice import training_bytes
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loader import Batch, SampleDataset
from conditional_detr.training.optimizer import training_forwards
from conditional_detr.training.steps import Stepper
from conditional_detr.training.surroundings import make_accelerator

_SAMPLES = 16  # images whose sizes decide that of the trials
_USABLE = 0.8  # part of the free memory
_BACKWARD = 1.5  # peak of a step, as a multiple of what the forward pass keeps
_SIGNALLING = ("cuda", "xpu")  # devices that raise OutOfMemoryError; others take the system's memory


class FittedBatch(NamedTuple):
    """Settings with the batch size that fits.

    Attributes:
        config: the settings, of as many images a step as before.
        report: the batch size, and how it was found.
    """

    config: TrainConfig
    report: str


def fit_batch_size(
    model: DetectionTransformer, data: SampleDataset, config: TrainConfig, criterion: SetLoss | None = None
) -> FittedBatch:
    """Find the largest batch that fits in memory, of those that divide the images of a step.

    On a GPU, steps of a copy of the model are tried, from the largest batch down. A CPU gives no signal before memory
    is used up, so the need of a batch is estimated from what the forward pass keeps for an image, measured without
    gradient checkpointing. Images are as large as the largest of a few of the dataset.

    Args:
        model: stays as it is.
        data: the training data.
        config: the settings; batch_size x accumulation are the images a step.
        criterion: the loss; default: that of the model's paper.

    Raises:
        OSError: no image can be read.
        ValueError: not even a batch of one image fits on the GPU, or there are several processes.
    """
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(
            f"batch_size: expected a number with several processes, got auto with {accelerator.num_processes}"
        )
    criterion = SetLoss.for_model(model) if criterion is None else criterion
    images = config.batch_size * config.accumulation
    sizes = [size for size in range(1, images + 1) if images % size == 0]
    height, width, target = _largest_sample(data)

    def step(size: int) -> None:
        batch = (torch.zeros(size, 3, height, width, dtype=torch.float32, device="cpu"), None, [target] * size)
        _train_once(model, replace(config, batch_size=size, accumulation=1), criterion, accelerator, batch)

    with torch.random.fork_rng():
        if accelerator.device.type in _SIGNALLING:
            size, how = _try_sizes(sizes, step)
        else:
            size, how = _estimate(sizes, step, training_bytes(model, config))
    fitted = replace(config, batch_size=size, accumulation=images // size)
    return FittedBatch(fitted, f"batch size {size} x accumulation {images // size}, for {height} x {width}: {how}")


def _largest_sample(data: SampleDataset) -> tuple[int, int, dict[str, Any]]:
    """Return the largest height and width, and the longest target, of images that are evenly spaced in the dataset."""
    count = min(_SAMPLES, len(data))
    if not count:
        raise ValueError("data: expected at least one sample, got 0")
    samples: list[Sample] = []
    errors: list[Exception] = []
    for i in range(count):
        try:
            samples.append(data[i * len(data) // count])
        except (OSError, ValueError) as error:  # noqa: PERF203  # the run counts them
            errors.append(error)
    if not samples:
        raise OSError(f"batch_size: expected images to measure on, got {errors[0]}") from errors[0]
    height, width = (max(sides) for sides in zip(*(pixels.shape[1:] for pixels, _ in samples), strict=True))
    return height, width, max((target for _, target in samples), key=lambda target: len(target["labels"]))


def _train_once(
    model: DetectionTransformer, config: TrainConfig, criterion: SetLoss, accelerator: Any, batch: Batch
) -> None:
    """Train a copy of the model for one step."""
    copied = copy.deepcopy(model)
    stepper = Stepper(copied, config, criterion, accelerator, str)
    stepper.join_processes()
    with training_forwards(copied, config):
        stepper.train_step([(list(range(len(batch[0]))), batch)], step=0, epochs=0.0)


def _try_sizes(sizes: Sequence[int], step: Callable[[int], None]) -> tuple[int, str]:
    """Return the largest size whose step does not run out of memory."""
    failed: list[int] = []
    for size in reversed(sizes):
        try:
            step(size)
        except torch.OutOfMemoryError:
            failed.append(size)
        gc.collect()  # what an error's traceback held
        torch.cuda.empty_cache()
        if size not in failed:
            return size, "fits" + (f", {failed[-1]} does not" if failed else "")
    raise ValueError(
        "batch_size: expected memory for a step of one image, got none left; use gradient_checkpointing, autocast, or"
        " smaller images"
    )


def _estimate(sizes: Sequence[int], step: Callable[[int], None], fixed: float) -> tuple[int, str]:
    """Return the largest size whose estimated need is within the free memory, else 1."""
    kept = []
    for size in (1, 2):  # what is the same for all images, such as masks, cancels
        with _saved_bytes() as saved:
            step(size)
        kept.append(sum(saved.values()))
    image = _BACKWARD * (kept[1] - kept[0])
    free = free_memory()
    left = f", of {readable_bytes(free)} that are free" if math.isfinite(free) else "; the system tells no limit"
    size = max((size for size in sizes if fixed + image * size <= _USABLE * free), default=1)
    return size, (
        f"an estimate, as a CPU gives no signal when memory is used up: {readable_bytes(image)} an image and"
        f" {readable_bytes(fixed)} for gradients and moments{left}"
    )


@contextmanager
def _saved_bytes() -> Iterator[dict[int, int]]:
    """Collect the bytes of the memory blocks that are kept for backward while the context is active, by address."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = max(storage.nbytes(), saved.get(storage.data_ptr(), 0))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
