"""Validate training targets before any kernel runs.

The target of one image is ``{"labels": (T,) int64, "boxes": (T, 4)}``: labels are rows of the class head, boxes are
cx cy w h in [0, 1] of the visible image. T may be 0 and may differ between images. Other keys are ignored.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from conditional_detr.modeling.layers import at_least_float32

Target: TypeAlias = Mapping[str, Tensor]

CORNER_TOLERANCE = 1e-3  # distance that a corner may be outside the image, because annotations are rounded
_ROUNDING = 1e-6  # of float32, so that a corner exactly at the tolerance passes
_FIELDS = ("cx", "cy", "w", "h", "x0 = cx - w/2", "y0 = cy - h/2", "x1 = cx + w/2", "y1 = cy + h/2")
_RANGES = ("[0, 1]", "[0, 1]", "(0, 1]", "(0, 1]", *("[-0.001, 1.001]",) * 4)


class JoinedTargets(NamedTuple):
    """The targets of all images, concatenated: K in total, on the CPU.

    Attributes:
        labels: (K,) int64.
        boxes: (K, 4) cx cy w h, float32 or wider.
        images: (K,) int64, index of each target's image.
        counts: number of targets of each image.
    """

    labels: Tensor
    boxes: Tensor
    images: Tensor
    counts: tuple[int, ...]


def validate_targets(targets: Sequence[Target], num_images: int, num_classes: int) -> JoinedTargets:
    """Validate the targets of a batch and concatenate them.

    Targets on the CPU are validated without waiting for a device; targets on a device are first copied, which waits.

    Args:
        targets: one per image.
        num_images: B.
        num_classes: C; labels are 0..C-1.

    Returns:
        The joined targets.

    Raises:
        TypeError: targets are not a list of dicts of tensors, or a tensor has the wrong dtype.
        ValueError: the number of targets differs from the number of images, a key is missing, a shape is wrong, a
            label is not a row of the class head, or a box is outside its image. The message contains image, box,
            field, value and the likely cause.
    """
    if not isinstance(targets, list | tuple):
        raise TypeError(
            f"targets: expected a list of dicts, one per image, got {type(targets).__name__};"
            " for one image pass [target]"
        )
    if len(targets) != num_images:
        raise ValueError(f"targets: expected one per image, {num_images}, got {len(targets)}")
    for image, target in enumerate(targets):
        _check_form(target, f"targets[{image}]")
    joined = _join(targets)
    _check_labels(joined, num_classes)
    _check_boxes(joined)
    return joined


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device, on CUDA without waiting for queued kernels."""
    return x.to(device, non_blocking=device.type == "cuda")


def _check_form(target: Target, name: str) -> None:
    """Check keys, types, dtypes, shapes and counts of one image's target."""
    if not isinstance(target, Mapping):
        raise TypeError(f"{name}: expected a dict of labels and boxes, got {type(target).__name__}")
    if missing := [key for key in ("labels", "boxes") if key not in target]:
        also = "; the key for transformers' class_labels is labels" if "class_labels" in target else ""
        raise ValueError(
            f"{name}: expected the keys labels and boxes, got {sorted(map(str, target))}{also}: no {missing[0]}"
        )
    labels, boxes = target["labels"], target["boxes"]
    for key, value in (("labels", labels), ("boxes", boxes)):
        if not isinstance(value, Tensor):
            raise TypeError(f'{name}["{key}"]: expected a tensor, got {type(value).__name__}')
    if labels.dtype != torch.int64:
        raise TypeError(f'{name}["labels"]: expected int64, got {labels.dtype}; labels.long() converts whole numbers')
    if labels.dim() != 1:
        cause = "; looks like one-hot rows: labels.argmax(1)" if labels.dim() == 2 and labels.shape[1] > 1 else ""
        raise ValueError(f'{name}["labels"]: expected the shape (T,), got {tuple(labels.shape)}{cause}')
    if not boxes.is_floating_point():
        raise TypeError(
            f'{name}["boxes"]: expected floating point cx cy w h in [0, 1], got {boxes.dtype};'
            " whole numbers look like pixels: divide by the image's width and height"
        )
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f'{name}["boxes"]: expected the shape (T, 4), got {tuple(boxes.shape)}{_shape_cause(boxes)}')
    if len(labels) != len(boxes):
        raise ValueError(f"{name}: expected as many labels as boxes, got {len(labels)} labels and {len(boxes)} boxes")


def _shape_cause(boxes: Tensor) -> str:
    """Return the likely cause of a shape other than (T, 4)."""
    if boxes.numel() == 0:
        return "; for no boxes pass torch.zeros(0, 4)"
    if boxes.shape == (4,):
        return "; looks like one box: boxes[None]"
    if boxes.dim() == 2 and boxes.shape[0] == 4:
        return "; looks transposed: boxes.T"
    return ""


def _join(targets: Sequence[Target]) -> JoinedTargets:
    """Concatenate the targets of all images on the CPU."""
    if not targets:
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        return JoinedTargets(none, torch.zeros(0, 4, dtype=torch.float32, device="cpu"), none, ())
    labels = torch.cat([target["labels"].detach().cpu() for target in targets])
    boxes = at_least_float32(torch.cat([target["boxes"].detach().cpu() for target in targets]))
    counts = tuple(len(target["labels"]) for target in targets)
    images = torch.arange(len(counts), device="cpu").repeat_interleave(
        torch.tensor(counts, dtype=torch.int64, device="cpu")
    )
    return JoinedTargets(labels, boxes, images, counts)


def _check_labels(joined: JoinedTargets, num_classes: int) -> None:
    """Raise ValueError unless every label is a row of the class head."""
    wrong = (joined.labels < 0) | (joined.labels >= num_classes)
    if not wrong.any():
        return
    image, index = _first(wrong, joined)
    label = int(joined.labels[wrong][0])
    cause = "labels are 0-based rows of the class head, not the dataset's category ids"
    if label < 0:
        cause = "looks like a padding row: pass only real boxes of each image"
    raise ValueError(
        f'targets[{image}]["labels"][{index}]: expected 0..{num_classes - 1},'
        f" got label {label} with {num_classes} classes; {cause}"
    )


def _check_boxes(joined: JoinedTargets) -> None:
    """Raise ValueError unless every box is cx cy w h, has an area and is inside its image."""
    centre, size = joined.boxes[:, :2], joined.boxes[:, 2:]
    values = torch.cat((joined.boxes, centre - size / 2, centre + size / 2), dim=1)  # (K, 8), as _FIELDS
    tolerance = CORNER_TOLERANCE + _ROUNDING
    low = values.new_tensor([0, 0, 0, 0, *(-tolerance,) * 4])
    high = values.new_tensor([1, 1, 1, 1, *(1 + tolerance,) * 4])
    valid = (values >= low) & (values <= high)  # false where NaN
    valid[:, 2:4] &= size > 0
    wrong = ~valid.all(dim=1)
    if not wrong.any():
        return
    image, index = _first(wrong, joined)
    field = int(valid[wrong][0].int().argmin())
    box = ", ".join(f"{number:.6g}" for number in joined.boxes[wrong][0].tolist())
    raise ValueError(
        f'targets[{image}]["boxes"][{index}]: expected {_FIELDS[field]} in {_RANGES[field]},'
        f" got {float(values[wrong][0, field]):.6g}; the box is cx cy w h = [{box}];"
        f" {_box_cause(joined.boxes[wrong][0], joined.boxes[joined.images == image])}"
    )


def _box_cause(box: Tensor, boxes: Tensor) -> str:
    """Return the likely cause of a wrong box (4,), given all boxes (T, 4) of its image."""
    if not box.isfinite().all():
        return "a value that is not finite comes from reading or augmentation"
    if not box.any():
        return "all zero looks like a padding row: pass only real boxes of each image"
    if boxes.abs().max() > 2:
        return "looks like pixels: divide by the image's width and height"
    if box[2:].min() == 0:
        return "zero area: remove such boxes"
    if box[2:].min() < 0:
        return "a negative size: the corners may be in the wrong order"
    a, b = boxes[:, :2], boxes[:, 2:]
    inside = bool((boxes >= 0).all()) and bool((boxes <= 1).all())
    forms = {"x0 y0 x1 y1": inside and bool((a < b).all()), "x0 y0 w h": inside and bool((a + b <= 1).all())}
    if any(forms.values()):
        guess = " or ".join(form for form, fits in forms.items() if fits)
        return f"looks like {guess}: torchvision.ops.box_convert converts it to cx cy w h"
    return "extends outside the image: clip its corners to the image"


def _first(wrong: Tensor, joined: JoinedTargets) -> tuple[int, int]:
    """Return the image of the first wrong target of (K,), and the target's index in that image."""
    position = int(wrong.int().argmax())
    image = int(joined.images[position])
    return image, position - sum(joined.counts[:image])
