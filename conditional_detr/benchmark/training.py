"""A training step, and the criterion alone, against transformers': on the same weights, pixels and targets."""

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from conditional_detr.benchmark.engines import REFERENCE, transformers_network, write_weights
from conditional_detr.benchmark.measure import check
from conditional_detr.benchmark.timing import WARM_UP, Timing, check_rounds, in_turn, process_peak, warm_up
from conditional_detr.modeling.conditional_detr import ConditionalDETR, Output
from conditional_detr.set_prediction.losses import SetLoss
from conditional_detr.training.optimizer import folded_batch_norm, linear_as_convolution

OURS = "this library"
STEP, CRITERION = "step", "criterion"
OBJECTS = 7  # of an image: COCO's mean
LAYERS, IMAGES, QUERIES, CLASSES = 6, 8, 300, 91  # of the criterion's input, as with COCO

Targets: TypeAlias = list[dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TrainingMeasurement(Timing):
    """What was measured of one side, besides its :class:`Timing`.

    Attributes:
        work: "step" is forward, loss and backward; "criterion" is the loss with its matching, and backward.
        of: what it was done on, in words.
        loss: of a step before the rounds. Dropout draws other numbers on each side.
        trained: how many numbers got a gradient.
    """

    work: str
    of: str
    loss: float
    trained: int


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        call: computes gradients, lets go of them, and returns the loss.
        trained: how many numbers get a gradient.
    """

    call: Callable[[], float]
    trained: int


def measure_training(
    model: ConditionalDETR,
    *,
    size: tuple[int, int] = (512, 512),
    batch: int = 2,
    rounds: int = 7,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[TrainingMeasurement]:
    """Time a training step and the criterion alone, of transformers and of this library, on the model's device.

    Ours is the step as ``train`` does it, without AdamW. Both start from the model's weights, with its dropout and
    its frozen part of the backbone. The criterion reads ready outputs of COCO's size.

    Args:
        model: in float32; it stays as it is.
        size: height and width of the images.
        batch: images a step.
        rounds: how often each is timed.
        seed: of pixels, targets and the criterion's input.
        progress: told what is being done.

    Returns:
        transformers' step, ours, transformers' criterion, ours; each work compared with transformers'.

    Raises:
        ValueError: a device that neither is made for; no rounds.
        ModuleNotFoundError: transformers is not installed.
    """
    device = model.device
    check(REFERENCE, device.type)
    check_rounds(rounds, tuple(_STEPS))
    generator = torch.Generator().manual_seed(seed)
    pixels, targets = _images(model, size, batch, generator)
    criteria = _criteria(device, generator)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        steps = {}
        for name, make in _STEPS.items():
            progress(f"training step, {name}: getting ready")
            steps[name] = stack.enter_context(make(copy.deepcopy(model), Path(folder), pixels, targets))
        of = f"{size[0]} x {size[1]}, {batch} at a time"
        measurements = _measurements(STEP, of, steps, device, rounds, progress)
    of = f"{IMAGES} images, {QUERIES} queries, {CLASSES} classes, {LAYERS} layers, {OBJECTS} boxes an image"
    return measurements + _measurements(CRITERION, of, criteria, device, rounds, progress)


def peak_of_step(model: ConditionalDETR, name: str, *, size: tuple[int, int] = (512, 512), batch: int = 2) -> float:
    """Do steps of one side and return the most memory, in MB, that this process ever had, as Linux tells it.

    Args:
        model: in float32, on the CPU; it is trained in place, or loses its weights to transformers' network.
        name: of the side, "transformers" or "this library".
        size: height and width of the images.
        batch: images a step.

    Raises:
        OSError: another system than Linux.
        ValueError: another side.
        ModuleNotFoundError: transformers is not installed.
    """
    if name not in _STEPS:
        raise ValueError(f"side: expected one of {', '.join(_STEPS)}, got {name!r}")
    pixels, targets = _images(model, size, batch, torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder, _STEPS[name](model, Path(folder), pixels, targets) as work:
        for _ in range(WARM_UP + 1):
            work.call()
    return process_peak()


def _measurements(
    work: str, of: str, works: dict[str, Work], device: torch.device, rounds: int, progress: Callable[[str], None]
) -> list[TrainingMeasurement]:
    """Warm up, and time in turn."""
    warm = {}
    for name, one in works.items():
        progress(f"{work} of {of}: {name}: warming up")
        warm[name] = warm_up(one.call, device)
    calls = {name: one.call for name, one in works.items()}
    times = in_turn(calls, device, rounds=rounds, progress=lambda text: progress(f"{work} of {of}: {text}"))
    measurements = []
    for name, (loss, megabytes) in warm.items():
        same: dict[str, Any] = {"work": work, "of": of, "threads": torch.get_num_threads(), "megabytes": megabytes}
        measurements.append(TrainingMeasurement(engine=name, loss=loss, trained=works[name].trained, **same, **times[name]))
    return measurements


def _images(
    model: ConditionalDETR, size: tuple[int, int], batch: int, generator: torch.Generator
) -> tuple[Tensor, Targets]:
    """Draw pixels (B, 3, H, W) on the model's device, and their targets."""
    pixels = torch.randn(batch, 3, *size, generator=generator).to(model.device)
    return pixels, _targets(batch, model.config.num_classes, generator)


def _targets(batch: int, classes: int, generator: torch.Generator) -> Targets:
    """Draw labels (T,) and boxes (T, 4), cx cy w h inside the image, on the CPU as the loader gives them."""
    targets = []
    for _ in range(batch):
        sides = torch.rand(OBJECTS, 2, generator=generator) * 0.3 + 0.05
        centres = sides / 2 + torch.rand(OBJECTS, 2, generator=generator) * (1 - sides)
        labels = torch.randint(0, classes, (OBJECTS,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat((centres, sides), dim=1)})
    return targets


def _theirs(targets: Targets, device: torch.device) -> Targets:
    """Return targets under transformers' keys, where it wants them."""
    return [{"class_labels": target["labels"].to(device), "boxes": target["boxes"].to(device)} for target in targets]


def _criterion() -> SetLoss:
    """Return our loss with transformers' weight of the classes, so that the same number comes out."""
    return SetLoss(class_weight=1.0)


def _work(parameters: Iterable[Tensor], loss_of: Callable[[], Tensor]) -> Work:
    """Return what computes a loss and its gradients, and lets go of them."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]

    def call() -> float:
        loss = loss_of()
        loss.backward()
        for parameter in trained:
            parameter.grad = None
        return loss.item()

    return Work(call, sum(parameter.numel() for parameter in trained))


@contextmanager
def _our_step(model: ConditionalDETR, _: Path, pixels: Tensor, targets: Targets) -> Iterator[Work]:
    """Make ready a step as ``train`` does it; the model is used up."""
    model.train()
    model.backbone.to(memory_format=torch.channels_last)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    criterion = _criterion()
    with folded_batch_norm(model), linear_as_convolution(model):
        yield _work(model.parameters(), lambda: criterion(model(pixels), targets)["total"])


@contextmanager
def _their_step(model: ConditionalDETR, folder: Path, pixels: Tensor, targets: Targets) -> Iterator[Work]:
    """Make ready a step of transformers' network with the model's weights; the model is used up."""
    write_weights(model, folder)
    trains = {name: parameter.requires_grad for name, parameter in model.backbone.body.named_parameters()}
    model.to("meta")  # the weights of both would count as memory
    network = transformers_network(folder).to(pixels.device).train()
    network.config.auxiliary_loss = True
    for name, parameter in network.model.backbone.model.named_parameters():
        parameter.requires_grad_(trains[name])
    labels = _theirs(targets, pixels.device)
    yield _work(network.parameters(), lambda: network(pixel_values=pixels, labels=labels).loss)


Make: TypeAlias = Callable[[ConditionalDETR, Path, Tensor, Targets], AbstractContextManager[Work]]
_STEPS: dict[str, Make] = {REFERENCE: _their_step, OURS: _our_step}


def _criteria(device: torch.device, generator: torch.Generator) -> dict[str, Work]:
    """Make ready the losses of both sides, which read the same logits and boxes, and their backward."""
    from transformers import ConditionalDetrConfig
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

    shape = LAYERS, IMAGES, QUERIES
    logits = (torch.randn(*shape, CLASSES, generator=generator) * 3 - 3).to(device).requires_grad_()
    boxes = torch.randn(*shape, 4, generator=generator).sigmoid().to(device).requires_grad_()
    targets = _targets(IMAGES, CLASSES, generator)
    labels, criterion = _theirs(targets, device), _criterion()
    options: dict[str, Any] = {"num_labels": CLASSES, "decoder_layers": LAYERS, "auxiliary_loss": True}
    config = ConditionalDetrConfig(**options)
    last = logits[-1], labels, device, boxes[-1]

    def theirs() -> Tensor:
        return DeformableDetrForObjectDetectionLoss(*last, config, logits, boxes)[0]

    def ours() -> Tensor:
        return criterion(Output(logits, boxes), targets)["total"]

    return {REFERENCE: _work((logits, boxes), theirs), OURS: _work((logits, boxes), ours)}
