"""Load a model from a checkpoint in any name format.

Every tensor of the file is used exactly once and every parameter is filled; otherwise loading raises an error.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conditional_detr.checkpoints.files import CONFIG, PREPROCESSOR, Checkpoint, open_checkpoint
from conditional_detr.checkpoints.head_replacement import replace_heads
from conditional_detr.checkpoints.hf_config import (
    NOT_IN_SHAPES,
    default_metadata,
    read_arguments,
    read_config,
    read_metadata,
)
from conditional_detr.checkpoints.key_maps import KeyMap, Source, detect_key_map, source_of
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.checkpoints.tensor_checks import abbreviate, allocate, copy_values
from conditional_detr.modeling.architectures import ARCHITECTURES, plain_class
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import LoadReport, Metadata
from conditional_detr.system.console import printable

_log = logging.getLogger(__name__)
_MASKS = re.compile(r"(^|\.)(mask_head|bbox_attention)\.")  # of DETR's segmentation models
_IGNORED = ".num_batches_tracked"  # BatchNorm's counter; frozen BatchNorm does not use it


def from_pretrained(
    name: str | Path,
    *,
    class_names: Sequence[str | None] | None = None,
    num_classes: int | None = None,
    num_queries: int | None = None,
    config: Config | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    architecture: str | None = None,
) -> DetectionTransformer:
    """Load a checkpoint of ConditionalDETR or DETR in any name format; both are detected from the tensor names.

    The name formats: "published" (``model.safetensors`` or ``pytorch_model.bin``), "transformers5" (the names that
    transformers 5 uses in memory), both with timm's or with transformers' own ResNet, "original" (the authors'
    ``.pth``), and "native" (a model's own ``state_dict()``). Weights may lie in several files with an index, under
    "model" or "state_dict" in a torch file, and after one prefix, as DataParallel, torch.compile and Lightning write
    them.

    Args:
        name: a folder or file on disk, else a short name of shipped weights, else a hub id "owner/name".
        class_names: the classes of the model; rows of the class head whose names match are kept, the others are
            initialised as in a new model. None means a row that belongs to no class. Category ids become 0, 1, 2, ...
            when this changes the classes.
        num_classes: the number of classes, if they have no names; rows are kept only if the checkpoint has the same
            number.
        num_queries: the number of object queries; the leading ones are kept, new ones are initialised at random.
        config: the architecture, for a file that does not describe it; otherwise it must agree with the file.
        device: the device of the model.
        revision: branch, tag or commit on the hub.
        cache_dir: the hub cache; default: huggingface_hub's.
        token: hub token; True: the stored one.
        local_files_only: use only the hub's files in the cache, without network. HF_HUB_OFFLINE=1 does the same.
        architecture: the only architecture to accept, "conditional_detr" or "detr", as the class methods
            ``from_pretrained`` do; None: any.

    Returns:
        A ConditionalDETR or a DETR, float32, in eval mode, with ``load_report`` set.

    Raises:
        OSError: the checkpoint does not exist, or the hub cannot be reached.
        TypeError: an argument has the wrong type or is unknown.
        ValueError: the file is damaged or of another model; a tensor is missing, unexpected, of the wrong shape or
            not finite (the message lists each); or arguments contradict each other.
    """
    device = checked_device(device)
    checkpoint = open_checkpoint(
        name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    key_map = _key_map(checkpoint, architecture)
    if others := sorted(name for name in checkpoint.tensors if not name.startswith(key_map.prefix)):
        raise ValueError(
            f"{checkpoint.weights}: expected the prefix {key_map.prefix!r} in all tensor names, or in none; got"
            f" {abbreviate(others)}"
        )
    config, metadata = _describe(checkpoint, key_map, config)
    with MetaInit():
        model = ARCHITECTURES[key_map.architecture](config, metadata)
    _fill(model, checkpoint, key_map, device)
    _fill_unsaved_buffers(model, device)
    heads = replace_heads(model, class_names=class_names, num_classes=num_classes, num_queries=num_queries)
    model.load_report = LoadReport(str(checkpoint.weights), str(key_map), _dtypes(checkpoint), checkpoint.size, heads)
    if heads.changed:
        _log.warning("%s", "\n".join(map(printable, str(model.load_report).split("\n"))))
    return model.eval()


def _key_map(checkpoint: Checkpoint, architecture: str | None) -> KeyMap:
    """Return the key map of a checkpoint.

    Raises:
        ValueError: the checkpoint is of another architecture than expected, or of none of this library's.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    names = sorted(checkpoint.tensors)
    if masks := [name for name in names if _MASKS.search(name)]:
        raise ValueError(
            f"{checkpoint.weights}: expected a checkpoint that detects objects, got one for panoptic or instance"
            f" segmentation, whose mask head this library does not have: {abbreviate(masks)}"
        )
    key_map = detect_key_map(names)
    if key_map is None:
        model_type = checkpoint.config.get("model_type") if checkpoint.config else None
        raise ValueError(
            f"{checkpoint.weights}: expected a Conditional DETR or DETR checkpoint, but none of its"
            f" {len(names)} tensors is a cross-attention projection of either; it contains {abbreviate(names)}"
            + (f" (config.json: model_type {model_type!r})" if model_type else "")
        )
    if architecture not in (None, key_map.architecture):
        expected, got = (ARCHITECTURES[name].__name__ for name in (architecture, key_map.architecture))
        raise ValueError(
            f"{checkpoint.weights}: expected a checkpoint of {expected}, got one of {got}; use {got}.from_pretrained,"
            " or conditional_detr.from_pretrained for both"
        )
    return key_map


def _describe(checkpoint: Checkpoint, key_map: KeyMap, given: Config | None) -> tuple[Config, Metadata]:
    """Return architecture and metadata of a checkpoint, from its json files or else from its tensors."""
    if given is not None and not isinstance(given, Config):
        raise TypeError(f"config: expected a Config, got {type(given).__name__}")
    folder = checkpoint.weights.parent
    if checkpoint.config is not None:
        path = str(folder / CONFIG)
        config = read_config(checkpoint.config, path, key_map.architecture)
        metadata = read_metadata(checkpoint.config, checkpoint.preprocessor, path, str(folder / PREPROCESSOR))
    else:
        config = given if given and checkpoint.arguments is None else _infer_config(checkpoint, key_map)
        metadata = default_metadata(config.num_classes)
    if given is not None and given != config:
        raise ValueError(f"config: expected the checkpoint's {config}, got {given}")
    return config, metadata


def _infer_config(checkpoint: Checkpoint, key_map: KeyMap) -> Config:
    """Infer the architecture from the tensors' shapes and the authors' training arguments.

    Settings that neither contains take the paper's values.
    """
    tensors, path = checkpoint.tensors, checkpoint.weights

    def shape(native: str) -> torch.Size:
        name = source_of(native, key_map).name
        if name not in tensors:
            raise ValueError(f"{path}: missing {name} (native name {native})")
        if tensors[name].dim() != 2:
            raise ValueError(f"{path}: {name}: expected two dimensions, got {tuple(tensors[name].shape)}")
        return tensors[name].shape

    def count(part: str) -> int:
        pattern = f"{part}.layers.{{}}.feedforward.hidden.bias"
        return next(i for i in range(len(tensors) + 1) if source_of(pattern.format(i), key_map).name not in tensors)

    deep = source_of("backbone.body.layer3.22.conv1.weight", key_map).name in tensors
    network = ARCHITECTURES[key_map.architecture]
    paper = replace(network.default_config, backbone="resnet101" if deep else "resnet50")
    values = read_arguments(checkpoint.arguments or {}, str(path))
    if assumed := [f"{setting} {getattr(paper, setting)}" for setting in NOT_IN_SHAPES if setting not in values]:
        _log.warning("%s: architecture incomplete, assuming %s; pass config= to change it", path, ", ".join(assumed))
    values |= {
        "num_classes": network.scores.num_classes(shape("class_head.weight")[0]),
        "num_queries": shape("object_queries.weight")[0],
        "width": shape("object_queries.weight")[1],
        "feedforward": shape("decoder.layers.0.feedforward.hidden.weight")[0],
        "encoder_layers": count("encoder"),
        "decoder_layers": count("decoder"),
    }
    try:
        return replace(paper, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _dtypes(checkpoint: Checkpoint) -> str:
    """Return the precision of a file's tensors, comma-separated if there are several."""
    dtypes = {tensor.dtype for name, tensor in checkpoint.tensors.items() if not name.endswith(_IGNORED)}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


class _Slot(NamedTuple):
    """The module and attribute name of a tensor of the state dict."""

    module: nn.Module
    name: str
    tensor: Tensor  # the current one

    def fill(self, tensor: Tensor) -> None:
        """Set the parameter or buffer; ``load_state_dict(assign=True)`` does the same in four times the time."""
        if isinstance(self.tensor, nn.Parameter):
            self.module._parameters[self.name] = nn.Parameter(tensor, self.tensor.requires_grad)
        else:
            self.module._buffers[self.name] = tensor


def _fill(model: DetectionTransformer, checkpoint: Checkpoint, key_map: KeyMap, device: torch.device) -> None:
    """Fill a model without weights with the tensors of a file.

    Raises:
        ValueError: a tensor is missing, unexpected, of the wrong shape or not finite; the message lists each.
    """
    tensors, slots = checkpoint.tensors, _slots(model)
    sources = {native: source_of(native, key_map) for native in slots}
    used = {source.name for source in sources.values()}
    unexpected = [key for key in tensors if key not in used and not key.endswith(_IGNORED)]
    missing, wrong_shape, fitting = [], [], {}
    for native, source in sources.items():
        if source.name not in tensors:
            missing.append(f"{source} (native name {native})")
            continue
        stored, expected = tensors[source.name], _file_shape(slots[native].tensor.shape, source)
        if stored.shape != expected or not stored.is_floating_point():
            want, got = f"{tuple(expected)} floating point", f"{tuple(stored.shape)} {stored.dtype}"
            wrong_shape.append(f"{source} (native name {native}): expected {want}, got {got}")
            continue
        fitting[native] = stored if source.third is None else stored.chunk(3)[source.third]
    infinite = []
    # copied out of the mapping of the file: a model in it would break when the file changes
    copies = allocate([tensor.shape for tensor in fitting.values()])
    for (native, tensor), copy in zip(fitting.items(), copies, strict=True):
        if not copy_values(tensor, copy):
            infinite.append(f"{sources[native]} (native name {native})")
        slots[native].fill(copy.to(device))
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong_shape, "not finite": infinite}
    if any(problems.values()):
        listed = "".join(f"\n  {problem}: {abbreviate(keys)}" for problem, keys in problems.items() if keys)
        raise ValueError(f"{checkpoint.weights} ({key_map} names): does not fit the model that it describes:{listed}")


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Return the slot of each tensor of the state dict, by name."""
    return {
        f"{path}.{name}": _Slot(module, name, tensor)
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if name not in module._non_persistent_buffers_set and tensor is not None
    }


def _file_shape(shape: torch.Size, source: Source) -> torch.Size:
    """Return the shape in the file of the tensor that holds a parameter, whole or as a third of its rows."""
    return shape if source.third is None else torch.Size((3 * shape[0], *shape[1:]))


def _fill_unsaved_buffers(model: DetectionTransformer, device: torch.device) -> None:
    """Compute the buffers that no file stores: on the meta device they have no values. Few backbones have any."""
    unsaved = [(path, name) for path, module in model.named_modules() for name in module._non_persistent_buffers_set]
    if not unsaved:
        return
    computed = plain_class(model)(model.config, model.metadata)
    for path, name in unsaved:
        buffer = computed.get_submodule(path).get_buffer(name)
        model.get_submodule(path).register_buffer(name, buffer.to(device), persistent=False)


def checked_device(device: str | torch.device) -> torch.device:
    """Return a device on which tensors can be allocated.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: expected one that this machine has, got {str(device)!r}: {error}") from error
