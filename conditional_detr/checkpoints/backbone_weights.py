"""Load pretrained weights into the backbone only, before the transformer is trained from scratch."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from conditional_detr.checkpoints.tensor_checks import abbreviate, copy_values
from conditional_detr.checkpoints.tensor_files import WEIGHT_SUFFIXES, read_tensors
from conditional_detr.modeling.detection_transformer import DetectionTransformer

_IGNORED = ".num_batches_tracked"  # BatchNorm's counter; frozen BatchNorm does not use it


class BackboneReport(NamedTuple):
    """Result of loading backbone weights.

    Attributes:
        loaded: names of the backbone's parameters and buffers; all of them are loaded.
        unused: names of the file's tensors that the backbone does not have, such as the classifier or later stages.
    """

    loaded: tuple[str, ...]
    unused: tuple[str, ...]


def load_backbone_weights(model: DetectionTransformer, path: str | Path) -> BackboneReport:
    """Load the weights of an image classifier into the backbone, and leave the rest of the model unchanged.

    The file uses timm's names, which for ResNets are also torchvision's. It may contain more than the backbone, such
    as the classifier and later stages; all its tensors in the backbone's own stages must fit. If BatchNorm was folded
    into the convolutions, which then have biases, the frozen BatchNorm adds that bias and does nothing else.

    Args:
        model: the model whose backbone is loaded, in place.
        path: a ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.npz`` file.

    Returns:
        The names that were loaded, and the names in the file that were not used.

    Raises:
        OSError: the file does not exist.
        TypeError: the model is not a ConditionalDETR or DETR.
        ValueError: the file is of another kind or damaged, its tensors do not fit or are of a deeper network, or the
            model is an optimised copy; the model is then unchanged.
    """
    if not isinstance(model, DetectionTransformer):
        raise TypeError(f"model: expected a ConditionalDETR or DETR, got {type(model).__name__}")
    path = Path(path)
    backbone = model.backbone.body
    feature_info: Any = getattr(backbone, "feature_info", None)
    if feature_info is None:
        raise ValueError(
            "model: expected a plain model, got one whose backbone is not from timm, such as an optimised copy"
        )
    state = backbone.state_dict()
    tensors = {name: tensor for name, tensor in _read(path).items() if not name.endswith(_IGNORED)}
    stored = {_flat(name): tensor for name, tensor in tensors.items()}
    folded = _folded_biases(backbone, stored)
    for norm, (bias, eps) in folded.items():
        stored |= {_flat(f"{norm}.{name}"): value for name, value in _bias_only(stored[bias].float(), eps).items()}
    missing = [name for name in state if _flat(name) not in stored]
    wrong_shape, infinite, copies = [], [], {}
    for name in sorted(state.keys() - set(missing)):
        tensor, expected = stored[_flat(name)], tuple(state[name].shape)
        if tensor.shape != expected or not tensor.is_floating_point():
            wrong_shape.append(f"{name}: expected {expected} floating point, got {tuple(tensor.shape)} {tensor.dtype}")
            continue
        copies[name] = torch.empty(expected, dtype=torch.float32, device="cpu")
        if not copy_values(tensor, copies[name]):
            infinite.append(name)
    used = {_flat(name) for name in state} | {bias for bias, _ in folded.values()}
    unused = tuple(name for name in tensors if _flat(name) not in used)
    stages = tuple(_flat(f"{stage['module']}.") for stage in feature_info.info[: model.config.backbone_stage + 1])
    deeper = [name for name in unused if _flat(name).startswith(stages)]
    problems = {"missing": missing, "wrong shape": wrong_shape, "not finite": infinite}
    problems |= {"unexpected, in stages that the backbone has": deeper}
    if any(problems.values()):
        listed = "".join(f"\n  {problem}: {abbreviate(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"{path}: does not fit the backbone {model.config.backbone!r}:{listed}")
    for name, tensor in state.items():
        copy_values(copies[name], tensor) if tensor.device.type == "cpu" else tensor.copy_(copies[name])
    return BackboneReport(tuple(state), unused)


def _flat(name: str) -> str:
    """Return a name with underscores for dots: timm's feature extractors have stages_0 for stages.0."""
    return name.replace(".", "_")


def _read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, by the names in the file."""
    if path.suffix != ".npz":
        if path.suffix not in WEIGHT_SUFFIXES:
            raise ValueError(f"{path}: expected a {', '.join(WEIGHT_SUFFIXES)} or .npz file")
        return read_tensors(path)
    try:
        # opened here, because numpy does not close a file that it cannot read
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (AttributeError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: truncated, or not an npz file of numeric arrays: {error}") from error


def _folded_biases(backbone: nn.Module, stored: dict[str, Tensor]) -> dict[str, tuple[str, float]]:
    """Return the convolution's bias name and the eps of each frozen BatchNorm that was folded into a convolution."""
    folded: dict[str, tuple[str, float]] = {}
    bias = None
    for path, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            bias = _flat(f"{path}.bias") if module.bias is None else None
        elif hasattr(module, "running_var") and bias in stored:
            own = [name for name in module.state_dict() if _flat(f"{path}.{name}") in stored]
            folded |= {} if own else {path: (bias, float(module.eps))}
    return folded


def _bias_only(bias: Tensor, eps: float) -> dict[str, Tensor]:
    """Return the tensors of a frozen BatchNorm that only adds a bias."""
    one, zero = torch.ones_like(bias), torch.zeros_like(bias)
    return {"weight": one, "bias": bias, "running_mean": zero, "running_var": one - eps}
