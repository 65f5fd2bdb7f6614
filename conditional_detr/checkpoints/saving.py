"""Saving weights: a model in the names of any family of files.

All files of a model are written beside their places before the first is moved there, so that a run that breaks off
leaves what was there.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from conditional_detr.checkpoints.files import CONFIG, PREPROCESSOR, SAFETENSORS
from conditional_detr.checkpoints.hf_config import default_metadata, write_arguments, write_config, write_preprocessor
from conditional_detr.checkpoints.key_maps import NATIVE_BACKBONE, Family, Naming, source_of
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.checkpoints.tensor_checks import not_finite, some
from conditional_detr.modeling.conditional_detr import ConditionalDETR, Config
from conditional_detr.system.atomic_files import write_atomically

_log = logging.getLogger(__name__)
_AUTHORS_SUFFIX = ".pth"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", _AUTHORS_SUFFIX}


def save_pretrained(model: ConditionalDETR, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Save a model in the published format: what transformers reads, and what ``from_pretrained`` reads.

    Writes ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``, all of them or none.

    Args:
        model: the model.
        folder: made if missing; these three files in it are replaced, others stay.
        dtype: precision on disk, such as ``torch.float16``; default: the model's own. Loading gives float32 again.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: a parameter has no place in the format, does not fit the config, or is not finite in ``dtype``.
    """
    save_as(model, folder, "published", dtype=dtype)


def save_as(
    model: ConditionalDETR, target: str | Path, family: Family, *, dtype: torch.dtype | None = None
) -> tuple[Path, ...]:
    """Save a model with the names of a family of files; ``from_pretrained`` reads each of them.

    "published" and "transformers 5" are folders of the same three files; the weights of the latter are for
    ``load_state_dict`` of a transformers 5 model. "original" is one ``.pth`` as the authors' training writes it, with
    "model" and "args". It holds the weights and the architecture and nothing else: a warning says when that loses
    class names, category ids or preprocessing. Their code builds 91 classes unless it is changed.

    Args:
        model: the model.
        target: the folder, made if missing, or the ``.pth``; files that are there are replaced.
        family: whose names.
        dtype: precision on disk, such as ``torch.float16``; default: the model's own. Loading gives float32 again.

    Returns:
        The files that were written, the weights first.

    Raises:
        OSError: the target cannot be written.
        ValueError: no such family; the target is a file where a folder is meant, or the other way round; a parameter
            does not fit the config, or is not finite in ``dtype``; "original": the authors' code does not build this
            backbone.
    """
    writers = writers_of(model, target, family, dtype=dtype)
    files = tuple(writers)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    write_tensors(writers)
    if family == "original":
        _tell_what_is_lost(model, files[0])
    return files


def writers_of(
    model: ConditionalDETR, target: str | Path, family: Family = "published", *, dtype: torch.dtype | None = None
) -> dict[Path, Callable[[Path], object]]:
    """Return what writes each file of :func:`save_as`, the weights first, for those who write others with them.

    Raises:
        ValueError: as of :func:`save_as`.
    """
    files = files_of(target, family)
    state = _checked_state(model, dtype)
    if family == "original":
        _check_backbone_is_the_authors(model.config, state)
    tensors = _renamed(state, Naming(family))
    if family == "original":
        return {files[0]: partial(torch.save, {"model": tensors, "args": write_arguments(model.config)})}
    jsons = (write_config(model.config, model.metadata), write_preprocessor(model.metadata.preprocessing))
    writers = [partial(_write_safetensors, tensors), *(partial(_write_json, content) for content in jsons)]
    return dict(zip(files, writers, strict=True))


def files_of(target: str | Path, family: Family) -> tuple[Path, ...]:
    """Return the files that :func:`save_as` writes, the weights first.

    Raises:
        ValueError: no such family; the target is a file where a folder is meant, or the other way round.
    """
    if family not in get_args(Family):
        raise ValueError(f"family: expected one of {', '.join(get_args(Family))}, got {family!r}")
    target = Path(target)
    if family == "original":
        if target.suffix != _AUTHORS_SUFFIX or target.is_dir():
            raise ValueError(f"{target}: expected a file *{_AUTHORS_SUFFIX} to hold {family} names")
        return (target,)
    if target.suffix in _WEIGHT_SUFFIXES or target.is_file():
        raise ValueError(f"{target}: expected a folder to hold the files of {family} names, got a file's name")
    return tuple(target / file for file in (SAFETENSORS, CONFIG, PREPROCESSOR))


def _checked_state(model: ConditionalDETR, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return a model's tensors as they are to be stored, by native names; or name all that a file cannot hold."""
    with MetaInit():
        described = ConditionalDETR(model.config, model.metadata).state_dict()
    state = model.state_dict()
    problems = [f"{name} is missing" for name in described if name not in state]
    stored = {}
    for native, tensor in state.items():
        if native not in described or tensor.shape != described[native].shape:
            expected = tuple(described[native].shape) if native in described else "no such parameter"
            problems.append(f"{native} {tuple(tensor.shape)}: the config has {expected}")
            continue
        stored[native] = tensor.detach().to("cpu", dtype).contiguous()
    infinite = not_finite(stored, [tensor.sum() for tensor in stored.values()])
    problems += [f"{native}: not finite in {stored[native].dtype}" for native in infinite]
    if problems:
        raise ValueError(f"the model cannot be saved: {some(problems)}")
    return stored


def _renamed(state: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Return native tensors by the names of a family, joined where it keeps three in one."""
    thirds: dict[str, dict[int, Tensor]] = {}
    for native, tensor in state.items():
        source = source_of(native, naming)
        thirds.setdefault(source.name, {})[source.third or 0] = tensor
    return {
        name: torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
        for name, parts in thirds.items()
    }


def _check_backbone_is_the_authors(config: Config, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the authors' code would build this backbone: torchvision's of that name, all its stages."""
    ours = {
        name.removeprefix(NATIVE_BACKBONE): t.shape for name, t in state.items() if name.startswith(NATIVE_BACKBONE)
    }
    if ours != _authors_backbone(config):
        raise ValueError(
            "original: expected a backbone that the authors' code builds, a ResNet of torchvision up to stage 4,"
            f" got {config.backbone!r} up to stage {config.backbone_stage}{', dilated' if config.dilation else ''}"
        )


def _authors_backbone(config: Config) -> dict[str, torch.Size] | None:
    """Return names and shapes of the backbone the authors' code builds; None if it cannot."""
    from torchvision.models import get_model

    try:
        with MetaInit():
            backbone = get_model(config.backbone, replace_stride_with_dilation=[False, False, config.dilation])
    except (NotImplementedError, TypeError, ValueError):  # no such model, or it cannot be dilated
        return None
    stored = {name: tensor.shape for name, tensor in backbone.state_dict().items() if not name.startswith("fc.")}
    return {name: shape for name, shape in stored.items() if not name.endswith(".num_batches_tracked")}


def _tell_what_is_lost(model: ConditionalDETR, path: Path) -> None:
    """Warn of what the authors' format does not hold and loading will not assume."""
    assumed = default_metadata(model.config.num_classes)
    names = [field.name for field in fields(assumed)]
    lost = [name.replace("_", " ") for name in names if getattr(model.metadata, name) != getattr(assumed, name)]
    if lost:
        _log.warning("%s holds no %s: this format has no place for them", path, ", ".join(lost))


def write_tensors(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files, all of them or none, some with torch or safetensors.

    Raises:
        OSError: a file cannot be written.
    """
    from safetensors import SafetensorError

    try:
        write_atomically(writers)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of an OSError
        weights = next(iter(writers))
        raise OSError(f"{weights}: cannot be written; is there room, and permission? ({error})") from error


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
