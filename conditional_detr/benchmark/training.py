"""Measure a training step and the criterion of this library and transformers, on the same weights and inputs."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from conditional_detr.benchmark.engines import REFERENCE, transformers_network, write_weights
from conditional_detr.benchmark.measure import check
from conditional_detr.benchmark.timing import (
    WARM_UP,
    Timing,
    check_rounds,
    process_peak_memory,
    time_in_rounds,
    warm_up,
)
from conditional_detr.modeling.detection_transformer import DetectionTransformer, Output
from conditional_detr.set_prediction.losses import SetLoss
from conditional_detr.training.optimizer import folded_batch_norm, linear_as_convolution

OURS = "this library"
STEP, CRITERION = "step", "criterion"
BOXES = 7  # target boxes per image, the mean of COCO
LAYERS, IMAGES, QUERIES, CLASSES = 6, 8, 300, 91  # shape of the criterion's input, as on COCO
_LOSSES = {"conditional_detr": "ConditionalDetrForObjectDetection", "detr": "ForObjectDetection"}
"""Names of transformers' losses."""

Targets: TypeAlias = list[dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TrainingMeasurement(Timing):
    """Measurement of one library's training step or criterion, with its :class:`Timing`.

    Attributes:
        kind: "step": forward, loss and backward; "criterion": the loss with matching, and backward.
        inputs: description of the inputs.
        loss: loss before the first round. The libraries draw different dropout masks.
        gradients: number of values that receive a gradient.
    """

    kind: str
    inputs: str
    loss: float
    gradients: int


@dataclass(frozen=True)
class Workload:
    """Function to time.

    Attributes:
        call: computes gradients, frees them, and returns the loss.
        gradients: number of values that receive a gradient.
    """

    call: Callable[[], float]
    gradients: int


def measure_training(
    model: DetectionTransformer,
    *,
    size: tuple[int, int] = (512, 512),
    batch: int = 2,
    rounds: int = 7,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[TrainingMeasurement]:
    """Time a training step and the criterion of transformers and of this library, on the model's device.

    This library's step is that of ``train``, without the optimizer. Both libraries use the model's weights, dropout
    and frozen backbone layers. The criterion gets random outputs of COCO's size.

    Args:
        model: the model in float32; it is not changed.
        size: image height and width.
        batch: images per step.
        rounds: number of timed calls.
        seed: random seed of pixels, targets and the criterion's input.
        progress: called with a description of the current step.

    Returns:
        transformers' step, this library's step, transformers' criterion, this library's criterion. Speedups are
        relative to transformers.

    Raises:
        ValueError: an unsupported device, or no rounds.
        ModuleNotFoundError: transformers is not installed.
    """
    device = model.device
    check(REFERENCE, device.type)
    check_rounds(rounds, tuple(_STEPS))
    generator = torch.Generator().manual_seed(seed)
    pixels, targets = _images(model, size, batch, generator)
    criteria = _criteria(model, generator)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        steps = {}
        for name, prepare in _STEPS.items():
            progress(f"training step, {name}: preparing")
            steps[name] = stack.enter_context(prepare(copy.deepcopy(model), Path(folder), pixels, targets))
        inputs = f"{size[0]} x {size[1]}, batch size {batch}"
        measurements = _measurements(STEP, inputs, steps, device, rounds, progress)
    inputs = f"{IMAGES} images, {QUERIES} queries, {CLASSES} classes, {LAYERS} layers, {BOXES} boxes per image"
    return measurements + _measurements(CRITERION, inputs, criteria, device, rounds, progress)


def step_peak_memory(
    model: DetectionTransformer, name: str, *, size: tuple[int, int] = (512, 512), batch: int = 2
) -> float:
    """Run training steps of one library and return the peak memory of this process in MB.

    Args:
        model: the model in float32, on the CPU; it cannot be used afterwards.
        name: "transformers" or "this library".
        size: image height and width.
        batch: images per step.

    Raises:
        OSError: the system is not Linux.
        ValueError: an unknown library.
        ModuleNotFoundError: transformers is not installed.
    """
    if name not in _STEPS:
        raise ValueError(f"library: expected one of {', '.join(_STEPS)}, got {name!r}")
    pixels, targets = _images(model, size, batch, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, _STEPS[name](model, Path(folder), pixels, targets) as workload:
        for _ in range(WARM_UP + 1):
            workload.call()
    return process_peak_memory()


def _measurements(
    kind: str,
    inputs: str,
    workloads: dict[str, Workload],
    device: torch.device,
    rounds: int,
    progress: Callable[[str], None],
) -> list[TrainingMeasurement]:
    """Warm up and time the workloads of both libraries; return their measurements."""
    warm = {}
    for name, workload in workloads.items():
        progress(f"{kind} on {inputs}: {name}: warming up")
        warm[name] = warm_up(workload.call, device)
    calls = {name: workload.call for name, workload in workloads.items()}
    times = time_in_rounds(calls, device, rounds=rounds, progress=lambda text: progress(f"{kind} on {inputs}: {text}"))
    same: dict[str, Any] = {"kind": kind, "inputs": inputs, "threads": torch.get_num_threads()}
    measurements = []
    for name, (loss, megabytes) in warm.items():
        own: dict[str, Any] = {"loss": loss, "gradients": workloads[name].gradients, "megabytes": megabytes}
        measurements.append(TrainingMeasurement(engine=name, **own, **same, **times[name]))
    return measurements


def _images(
    model: DetectionTransformer, size: tuple[int, int], batch: int, generator: torch.Generator
) -> tuple[Tensor, Targets]:
    """Return random pixels (B, 3, H, W) on the model's device, and random targets."""
    pixels = torch.randn(batch, 3, *size, generator=generator).to(model.device)
    return pixels, _targets(batch, model.config.num_classes, generator)


def _targets(batch: int, classes: int, generator: torch.Generator) -> Targets:
    """Return random labels (T,) and boxes (T, 4), cx cy w h inside the image, on the CPU as from the data loader."""
    targets = []
    for _ in range(batch):
        sides = torch.rand(BOXES, 2, generator=generator) * 0.3 + 0.05
        centres = sides / 2 + torch.rand(BOXES, 2, generator=generator) * (1 - sides)
        labels = torch.randint(0, classes, (BOXES,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat((centres, sides), dim=1)})
    return targets


def _transformers_targets(targets: Targets, device: torch.device) -> Targets:
    """Return targets with transformers' keys, on the device."""
    return [{"class_labels": target["labels"].to(device), "boxes": target["boxes"].to(device)} for target in targets]


def _criterion(model: DetectionTransformer) -> SetLoss:
    """Return this library's loss with transformers' class weight, so that both compute the same loss."""
    return replace(SetLoss.for_model(model), class_weight=1.0)


def _workload(parameters: Iterable[Tensor], loss_of: Callable[[], Tensor]) -> Workload:
    """Return a workload that computes a loss and the gradients of the parameters."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]

    def call() -> float:
        loss = loss_of()
        loss.backward()
        for parameter in trainable:
            parameter.grad = None
        return loss.item()

    return Workload(call, sum(parameter.numel() for parameter in trainable))


@contextmanager
def _step(model: DetectionTransformer, _: Path, pixels: Tensor, targets: Targets) -> Iterator[Workload]:
    """Prepare a training step of this library. The model cannot be used afterwards."""
    model.train()
    model.backbone.to(memory_format=torch.channels_last)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    criterion = _criterion(model)
    with folded_batch_norm(model), linear_as_convolution(model):
        yield _workload(model.parameters(), lambda: criterion(model(pixels), targets)["total"])


@contextmanager
def _transformers_step(
    model: DetectionTransformer, folder: Path, pixels: Tensor, targets: Targets
) -> Iterator[Workload]:
    """Prepare a training step of transformers with the model's weights. The model cannot be used afterwards."""
    write_weights(model, folder)
    trainable = {name: parameter.requires_grad for name, parameter in model.backbone.body.named_parameters()}
    model.to("meta")  # otherwise the weights of both would count as memory
    network = transformers_network(folder).to(pixels.device).train()
    network.config.auxiliary_loss = True
    for name, parameter in network.model.backbone.model.named_parameters():
        parameter.requires_grad_(trainable[name])
    labels = _transformers_targets(targets, pixels.device)
    yield _workload(network.parameters(), lambda: network(pixel_values=pixels, labels=labels).loss)


Prepare: TypeAlias = Callable[[DetectionTransformer, Path, Tensor, Targets], AbstractContextManager[Workload]]
_STEPS: dict[str, Prepare] = {REFERENCE: _transformers_step, OURS: _step}


def _criteria(model: DetectionTransformer, generator: torch.Generator) -> dict[str, Workload]:
    """Return the workloads of both libraries' criteria for a model's architecture, on the same logits and boxes."""
    from transformers import AutoConfig
    from transformers.loss.loss_utils import LOSS_MAPPING

    shape, rows, device = (LAYERS, IMAGES, QUERIES), model.scores.rows(CLASSES), model.device
    logits = (torch.randn(*shape, rows, generator=generator) * 3 - 3).to(device).requires_grad_()
    boxes = torch.randn(*shape, 4, generator=generator).sigmoid().to(device).requires_grad_()
    targets = _targets(IMAGES, CLASSES, generator)
    labels, criterion = _transformers_targets(targets, device), _criterion(model)
    options: dict[str, Any] = {"num_labels": CLASSES, "decoder_layers": LAYERS, "auxiliary_loss": True}
    config = AutoConfig.for_model(model.architecture, **options)
    loss: Any = LOSS_MAPPING[_LOSSES[model.architecture]]
    last = logits[-1], labels, device, boxes[-1]

    def of_transformers() -> Tensor:
        return loss(*last, config, logits, boxes)[0]

    def of_this_library() -> Tensor:
        return criterion(Output(logits, boxes), targets)["total"]

    return {REFERENCE: _workload((logits, boxes), of_transformers), OURS: _workload((logits, boxes), of_this_library)}
