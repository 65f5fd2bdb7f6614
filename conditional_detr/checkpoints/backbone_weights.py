"""Weights for the backbone alone: what a transformer without weights of its own is trained on."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from conditional_detr.checkpoints.files import WEIGHT_SUFFIXES, read_tensors
from conditional_detr.checkpoints.tensor_checks import some
from conditional_detr.modeling.conditional_detr import ConditionalDETR

_IGNORED = ".num_batches_tracked"  # BatchNorm's counter, which a frozen one has no use for


class BackboneReport(NamedTuple):
    """What a file of backbone weights held.

    Attributes:
        filled: names of the backbone's parameters and buffers that were filled: all of them.
        left_over: the file's tensors that the backbone does not have, such as a classifier or stages that were cut off.
    """

    filled: tuple[str, ...]
    left_over: tuple[str, ...]


def load_backbone_weights(model: ConditionalDETR, path: str | Path) -> BackboneReport:
    """Fill the backbone from a file with the weights of a classifier, and leave everything else as it is.

    The file has timm's names, which for ResNets are torchvision's, too. It may hold more than the backbone, such as the
    classifier and stages that were cut off; what it holds of the backbone's own stages must fit, all of it. Where
    BatchNorm was folded into the convolutions, which then have biases, the frozen BatchNorm becomes the addition of
    that bias.

    Args:
        model: whose backbone is filled, in place.
        path: a ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.npz`` file.

    Returns:
        What was filled, and what of the file was not used.

    Raises:
        OSError: the file is not there.
        TypeError: no ConditionalDETR.
        ValueError: it is none of these, or damaged, or its tensors do not fit, or they are of a deeper network, or the
            model is an optimised copy; the model is then as before.
    """
    if not isinstance(model, ConditionalDETR):
        raise TypeError(f"model: expected a ConditionalDETR, got {type(model).__name__}")
    path = Path(path)
    backbone = model.backbone.body
    described: Any = getattr(backbone, "feature_info", None)
    if described is None:
        raise ValueError(
            "model: expected a plain model, got one whose backbone is none of timm's, such as an optimised copy"
        )
    state = backbone.state_dict()
    tensors = {name: tensor for name, tensor in _read(path).items() if not name.endswith(_IGNORED)}
    found = {_flat(name): tensor for name, tensor in tensors.items()}
    folded = _folded_biases(backbone, found)
    for norm, (bias, eps) in folded.items():
        found |= {_flat(f"{norm}.{name}"): value for name, value in _addition_of(found[bias].float(), eps).items()}
    missing = [name for name in state if _flat(name) not in found]
    misshaped, infinite = [], []
    for name in state.keys() - set(missing):
        stored, expected = found[_flat(name)], tuple(state[name].shape)
        if stored.shape != expected or not stored.is_floating_point():
            misshaped.append(f"{name}: expected {expected} floating point, got {tuple(stored.shape)} {stored.dtype}")
        elif not stored.isfinite().all():
            infinite.append(name)
    used = {_flat(name) for name in state} | {bias for bias, _ in folded.values()}
    left_over = tuple(name for name in tensors if _flat(name) not in used)
    stages = tuple(_flat(f"{stage['module']}.") for stage in described.info[: model.config.backbone_stage + 1])
    deeper = [name for name in left_over if _flat(name).startswith(stages)]
    kinds = {"missing": missing, "of another shape": sorted(misshaped), "not finite": sorted(infinite)}
    kinds |= {"left over, in stages that the backbone has": deeper}
    if any(kinds.values()):
        told = "".join(f"\n  {kind}: {some(names)}" for kind, names in kinds.items() if names)
        raise ValueError(f"{path}: does not fit the backbone {model.config.backbone!r}:{told}")
    backbone.load_state_dict({name: found[_flat(name)] for name in state})
    return BackboneReport(tuple(state), left_over)


def _flat(name: str) -> str:
    """Return a name without dots: timm writes stages_0 for stages.0 in backbones that give maps."""
    return name.replace(".", "_")


def _read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, by its own names."""
    if path.suffix != ".npz":
        if path.suffix not in WEIGHT_SUFFIXES:
            raise ValueError(f"{path}: expected a {', '.join(WEIGHT_SUFFIXES)} or .npz file")
        return read_tensors(path)
    try:
        # opened here: numpy leaves a file that it cannot read open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (AttributeError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated, or not an npz file of numbers: {error}") from error


def _folded_biases(backbone: nn.Module, found: dict[str, Tensor]) -> dict[str, tuple[str, float]]:
    """Return, for each frozen BatchNorm folded into the convolution before it, the name of that bias, and its eps."""
    folded: dict[str, tuple[str, float]] = {}
    bias = None
    for path, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            bias = _flat(f"{path}.bias") if module.bias is None else None
        elif hasattr(module, "running_var") and bias in found:
            own = [name for name in module.state_dict() if _flat(f"{path}.{name}") in found]
            folded |= {} if own else {path: (bias, float(module.eps))}
    return folded


def _addition_of(bias: Tensor, eps: float) -> dict[str, Tensor]:
    """Return what a frozen BatchNorm holds that adds a bias and does nothing else."""
    one, zero = torch.ones_like(bias), torch.zeros_like(bias)
    return {"weight": one, "bias": bias, "running_mean": zero, "running_var": one - eps}
