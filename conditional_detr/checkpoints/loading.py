"""Loading weights: any family of files in.

Every tensor of a file is used exactly once and every parameter is filled, or nothing is loaded at all.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from conditional_detr.checkpoints.files import CONFIG, PREPROCESSOR, Checkpoint, open_checkpoint
from conditional_detr.checkpoints.head_replacement import replace_heads
from conditional_detr.checkpoints.hf_config import UNSEEN, default_metadata, read_arguments, read_config, read_metadata
from conditional_detr.checkpoints.key_maps import Naming, Source, recognise, source_of
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.checkpoints.tensor_checks import not_finite, some
from conditional_detr.modeling.conditional_detr import ConditionalDETR, Config
from conditional_detr.modeling.metadata import LoadReport, Metadata

_log = logging.getLogger(__name__)
_IGNORED = ".num_batches_tracked"  # BatchNorm's counter, which a frozen one has no use for


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
) -> ConditionalDETR:
    """Load a checkpoint of any family, told apart by what the file holds.

    The families: the published files (``model.safetensors`` or ``pytorch_model.bin``), the names transformers 5 has in
    memory, either of them with timm's or with transformers' own ResNet, and the authors' ``.pth``.

    Args:
        name: a folder or file on disk, else a short name of shipped weights, else a hub id "owner/name".
        class_names: the classes the model shall have; rows of the class head whose names match are kept, the others
            start at the prior probability. None stands for a row that belongs to no class. Category ids become
            0, 1, 2, ... when this changes the classes.
        num_classes: the number of classes, where they have no names; rows are kept only if it is the file's.
        num_queries: the number of object queries; the leading ones are kept, new ones are drawn.
        config: the architecture, for a file that does not tell it; elsewhere it must agree with the file.
        device: where the model shall be.
        revision: branch, tag or commit on the hub.
        cache_dir: the hub cache; default: huggingface_hub's.
        token: hub token; True: the stored one.
        local_files_only: take the hub's files from the cache, without network. HF_HUB_OFFLINE=1 does the same.

    Returns:
        The model, float32, in eval mode, with ``load_report`` filled.

    Raises:
        OSError: the checkpoint is nowhere to be found, or the hub cannot be reached.
        TypeError: an argument of the wrong type, or one that does not exist.
        ValueError: a file that is damaged, of another model, or with a tensor missing, left over, of another shape or
            not finite; the message names each. Or arguments that contradict each other.
    """
    device = checked_device(device)
    checkpoint = open_checkpoint(
        name, revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only
    )
    naming = recognise(checkpoint.tensors)
    if naming is None:
        said = checkpoint.config.get("model_type") if checkpoint.config else None
        raise ValueError(
            f"{checkpoint.weights}: expected a Conditional DETR checkpoint, but none of its"
            f" {len(checkpoint.tensors)} tensors is a conditional spatial query projection; it holds"
            f" {some(sorted(checkpoint.tensors))}" + (f" (config.json: model_type {said!r})" if said else "")
        )
    config, metadata = _describe(checkpoint, naming, config)
    with MetaInit():
        model = ConditionalDETR(config, metadata)
    _fill(model, checkpoint, naming, device)
    _fill_unsaved_buffers(model, device)
    heads = replace_heads(model, class_names=class_names, num_classes=num_classes, num_queries=num_queries)
    model.load_report = LoadReport(
        str(checkpoint.weights), str(naming), _dtypes(checkpoint), checkpoint.weights.stat().st_size, heads
    )
    if heads.changed:
        _log.warning("%s", model.load_report)
    return model.eval()


def _describe(checkpoint: Checkpoint, naming: Naming, given: Config | None) -> tuple[Config, Metadata]:
    """Return architecture and metadata of a checkpoint, from what lies beside the weights or from themselves."""
    if given is not None and not isinstance(given, Config):
        raise TypeError(f"config: expected a Config, got {type(given).__name__}")
    folder = checkpoint.weights.parent
    if checkpoint.config is not None:
        where = str(folder / CONFIG)
        config = read_config(checkpoint.config, where)
        metadata = read_metadata(checkpoint.config, checkpoint.preprocessor, where, str(folder / PREPROCESSOR))
    else:
        config = given if given and checkpoint.arguments is None else _infer_config(checkpoint, naming)
        metadata = default_metadata(config.num_classes)
    if given is not None and given != config:
        raise ValueError(f"config: the checkpoint says {config}, got {given}")
    return config, metadata


def _infer_config(checkpoint: Checkpoint, naming: Naming) -> Config:
    """Read the architecture off the tensors' shapes, and the rest off the authors' arguments.

    What neither tells takes the paper's value.
    """
    tensors, where = checkpoint.tensors, checkpoint.weights

    def shape(native: str) -> torch.Size:
        name = source_of(native, naming).name
        if name not in tensors:
            raise ValueError(f"{where}: missing {name} (here {native})")
        return tensors[name].shape

    def count(part: str) -> int:
        pattern = f"{part}.layers.{{}}.feedforward.hidden.bias"
        return next(i for i in range(len(tensors) + 1) if source_of(pattern.format(i), naming).name not in tensors)

    deep = source_of("backbone.body.layer3.22.conv1.weight", naming).name in tensors
    paper = Config(backbone="resnet101" if deep else "resnet50")
    values = read_arguments(checkpoint.arguments or {}, str(where))
    if assumed := [f"{ours} {getattr(paper, ours)}" for ours in UNSEEN if ours not in values]:
        _log.warning("%s does not tell everything: assuming %s; config= says otherwise", where, ", ".join(assumed))
    return replace(
        paper,
        num_classes=shape("class_head.weight")[0],
        num_queries=shape("object_queries.weight")[0],
        width=shape("object_queries.weight")[1],
        feedforward=shape("decoder.layers.0.feedforward.hidden.weight")[0],
        encoder_layers=count("encoder"),
        decoder_layers=count("decoder"),
        **values,
    )


def _dtypes(checkpoint: Checkpoint) -> str:
    """Return the precision of a file's tensors; several are listed."""
    dtypes = {tensor.dtype for name, tensor in checkpoint.tensors.items() if not name.endswith(_IGNORED)}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


class _Slot(NamedTuple):
    """Where a tensor of the state dict belongs."""

    module: nn.Module
    name: str
    tensor: Tensor  # what stands there now

    def put(self, tensor: Tensor) -> None:
        """Set the parameter or buffer, as ``load_state_dict(assign=True)`` would, which takes four times as long."""
        if isinstance(self.tensor, nn.Parameter):
            self.module._parameters[self.name] = nn.Parameter(tensor, self.tensor.requires_grad)
        else:
            self.module._buffers[self.name] = tensor


def _fill(model: ConditionalDETR, checkpoint: Checkpoint, naming: Naming, device: torch.device) -> None:
    """Put every tensor of a file in its place in a model without weights; or name all that do not fit."""
    tensors, slots = checkpoint.tensors, _slots(model)
    sources = {native: source_of(native, naming) for native in slots}
    used = {source.name for source in sources.values()}
    left_over = [key for key in tensors if key not in used and not key.endswith(_IGNORED)]
    missing, misshaped, filled, sums = [], [], {}, []
    for native, source in sources.items():
        if source.name not in tensors:
            missing.append(f"{source} (here {native})")
            continue
        stored, expected = tensors[source.name], _file_shape(slots[native].tensor.shape, source)
        if stored.shape != expected or not stored.is_floating_point():
            got = f"{tuple(stored.shape)} {stored.dtype}"
            misshaped.append(f"{source} (here {native}): expected {tuple(expected)} floating point, got {got}")
            continue
        copy = _copy(stored if source.third is None else stored.chunk(3)[source.third], device)
        slots[native].put(copy)
        filled[native] = copy
        sums.append(copy.sum())  # while it is in the processor's cache
    infinite = [f"{sources[native]} (here {native})" for native in not_finite(filled, sums)]
    kinds = {"missing": missing, "left over": left_over, "of another shape": misshaped, "not finite": infinite}
    if any(kinds.values()):
        told = "".join(f"\n  {kind}: {some(keys)}" for kind, keys in kinds.items() if keys)
        raise ValueError(f"{checkpoint.weights} ({naming} names) does not fit the model it describes:{told}")


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """Return the place of each tensor of the state dict, by its name."""
    return {
        f"{path}.{name}": _Slot(module, name, tensor)
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if name not in module._non_persistent_buffers_set and tensor is not None
    }


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy out of the file's mapping: a model that lived there would die with the file."""
    return tensor.to(device, torch.float32, copy=True, memory_format=torch.contiguous_format)


def _file_shape(shape: torch.Size, source: Source) -> torch.Size:
    """Return the shape a tensor has in the file whose rows, or a third of them, become a parameter."""
    return shape if source.third is None else torch.Size((3 * shape[0], *shape[1:]))


def _fill_unsaved_buffers(model: ConditionalDETR, device: torch.device) -> None:
    """Compute the buffers that no file stores, which the skeleton has left empty (a few backbones have such)."""
    unsaved = [(path, name) for path, module in model.named_modules() for name in module._non_persistent_buffers_set]
    if not unsaved:
        return
    computed = ConditionalDETR(model.config, model.metadata)
    for path, name in unsaved:
        buffer = computed.get_submodule(path).get_buffer(name)
        model.get_submodule(path).register_buffer(name, buffer.to(device), persistent=False)


def checked_device(device: str | torch.device) -> torch.device:
    """Return a device on which tensors can be made."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: expected one that this machine has, got {str(device)!r}: {error}") from error
