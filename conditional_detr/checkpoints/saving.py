"""Save a model as a checkpoint in any name format.

All files of a checkpoint are written under temporary names before the first is renamed, so that an interrupted run
leaves the previous checkpoint unchanged.
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
from conditional_detr.checkpoints.hf_config import default_metadata, write_arguments, write_config
from conditional_detr.checkpoints.key_maps import NATIVE_BACKBONE, KeyMap, NameFormat, source_of
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.checkpoints.model_card import CARD, CURVES, CardDetails, is_generated, make_card
from conditional_detr.checkpoints.preprocessor_config import write_preprocessor
from conditional_detr.checkpoints.tensor_checks import abbreviate, not_finite
from conditional_detr.modeling.architectures import plain_class
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.system.atomic_files import encode_text, remove_unfinished, write_atomically
from conditional_detr.system.outputs import check_output

_log = logging.getLogger(__name__)
_AUTHORS_SUFFIX = ".pth"
_MARK = {"writer": "conditional_detr"}
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", _AUTHORS_SUFFIX}


def save_pretrained(
    model: DetectionTransformer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    card: bool | CardDetails | str | Path = False,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Save a model in the published format, which transformers and ``from_pretrained`` read.

    Write ``config.json``, ``preprocessor_config.json`` and ``model.safetensors``, all of them or none.

    Args:
        model: the model.
        folder: created if missing. Files of an earlier call are replaced; other files stay.
        dtype: precision on disk, such as ``torch.float16``; default: the model's own. Loading gives float32 again.
        card: whether to write a model card, ``README.md``, too: True, or what it says of data, recipe, metrics and
            licence, or the file of a card to copy.
        name: what the card calls the model; default: the folder's name.
        overwrite: replace these files also if another program, or you, wrote them.

    Raises:
        OSError: the folder cannot be created or written, or has such a file of another program.
        ValueError: the format has no name for a parameter, or a parameter does not fit the config or is not finite in
            ``dtype``; or a card with metrics or thresholds that do not fit the model.
    """
    writers = {} if card is False else _card_writers(model, Path(folder), card, name)
    for file in writers:
        if file.parent.is_dir():
            check_output(file, overwrite=overwrite, ours=is_generated(file.parent / CARD))
    save_as(model, folder, "published", dtype=dtype, overwrite=overwrite)
    if writers:
        write_atomically(writers)


def _card_writers(
    model: DetectionTransformer, folder: Path, card: bool | CardDetails | str | Path, name: str | None
) -> dict[Path, Callable[[Path], object]]:
    """Return a function for each file of a model card that writes it; files to copy are read now."""
    if isinstance(card, str | Path):
        return {folder / CARD: partial(_write_bytes, Path(card).read_bytes())}
    if card is not True and not isinstance(card, CardDetails):
        raise TypeError(f"card: expected a bool, CardDetails or the file of a card, got {card!r}")
    details = card if isinstance(card, CardDetails) else CardDetails()
    text = make_card(model, details, name=name or folder.absolute().name)
    writers: dict[Path, Callable[[Path], object]] = {folder / CARD: partial(_write_bytes, text.encode())}
    if details.curves is not None:
        writers[folder / CURVES] = partial(_write_bytes, Path(details.curves).read_bytes())
    return writers


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def save_as(
    model: DetectionTransformer,
    target: str | Path,
    name_format: NameFormat,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Save a model in a name format; ``from_pretrained`` reads each of them.

    "published" and "transformers5" are folders of the same three files; the weights of "transformers5" are for
    ``load_state_dict`` of a transformers 5 model. "original" is one ``.pth`` file as the authors' training writes it,
    with "model" and "args". It stores only the weights and the architecture: a warning reports class names, category
    ids or preprocessing that are lost. The authors' code builds 91 classes unless it is changed.

    Args:
        model: the model.
        target: the folder, created if missing, or the ``.pth`` file.
        name_format: "published", "transformers5" or "original".
        dtype: precision on disk, such as ``torch.float16``; default: the model's own. Loading gives float32 again.
        overwrite: replace existing files; in a folder, those of an earlier call are always replaced.

    Returns:
        The files that were written, the weights first.

    Raises:
        OSError: the target cannot be written, or exists.
        ValueError: an unknown name format; the target is a file instead of a folder, or a folder instead of a file; a
            parameter does not fit the config, or is not finite in ``dtype``; "original": the authors' code does not
            build this backbone.
    """
    writers = writers_of(model, target, name_format, dtype=dtype)
    files = tuple(writers)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(files[0].parent)
    ours = _is_ours(files[0])
    for file in files:
        check_output(file, overwrite=overwrite, ours=ours)
    write_tensors(writers)
    if name_format == "original":
        _warn_of_lost_metadata(model, files[0])
    return files


def writers_of(
    model: DetectionTransformer,
    target: str | Path,
    name_format: NameFormat = "published",
    *,
    dtype: torch.dtype | None = None,
) -> dict[Path, Callable[[Path], object]]:
    """Return a function for each file of :func:`save_as` that writes it, the weights first.

    Callers use it to write further files together with these.

    Raises:
        ValueError: as :func:`save_as` raises.
    """
    files = files_of(target, name_format)
    state = _checked_state(model, dtype)
    if name_format == "original":
        _check_authors_backbone(model.config, state)
    tensors = _renamed(state, KeyMap(name_format, architecture=model.architecture))
    if name_format == "original":
        return {files[0]: partial(torch.save, {"model": tensors, "args": write_arguments(model.config)})}
    preprocessing = write_preprocessor(model.metadata.preprocessing, model.architecture)
    jsons = (write_config(model.architecture, model.config, model.metadata), preprocessing)
    writers = [partial(_write_safetensors, tensors), *(partial(_write_json, content) for content in jsons)]
    return dict(zip(files, writers, strict=True))


def files_of(target: str | Path, name_format: NameFormat) -> tuple[Path, ...]:
    """Return the files that :func:`save_as` writes, the weights first.

    Raises:
        ValueError: an unknown name format; the target is a file instead of a folder, or a folder instead of a file.
    """
    if name_format not in get_args(NameFormat):
        raise ValueError(f"name_format: expected one of {', '.join(get_args(NameFormat))}, got {name_format!r}")
    target = Path(target)
    if name_format == "original":
        if target.suffix != _AUTHORS_SUFFIX or target.is_dir():
            raise ValueError(f"{target}: expected a file *{_AUTHORS_SUFFIX} for {name_format} names")
        return (target,)
    if target.suffix in _WEIGHT_SUFFIXES or target.is_file():
        raise ValueError(f"{target}: expected a folder for {name_format} names, got a file name")
    return tuple(target / file for file in (SAFETENSORS, CONFIG, PREPROCESSOR))


def _checked_state(model: DetectionTransformer, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return a model's tensors on the CPU in their stored precision, by native name.

    Raises:
        ValueError: a tensor is missing, does not fit the config or is not finite; the message lists all of them.
    """
    with MetaInit():
        expected_state = plain_class(model)(model.config, model.metadata).state_dict()
    state = model.state_dict()
    problems = [f"{name}: missing" for name in expected_state if name not in state]
    stored = {}
    for native, tensor in state.items():
        if native not in expected_state or tensor.shape != expected_state[native].shape:
            expected = tuple(expected_state[native].shape) if native in expected_state else "no such parameter"
            problems.append(f"{native}: expected {expected}, got {tuple(tensor.shape)}")
            continue
        stored[native] = tensor.detach().to("cpu", dtype).contiguous()
    problems += [f"{native}: not finite in {stored[native].dtype}" for native in not_finite(stored)]
    if problems:
        raise ValueError(f"model: cannot be saved: {abbreviate(problems)}")
    return stored


def _renamed(state: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Return native tensors by their names in a file, concatenated where the file stores three in one tensor."""
    thirds: dict[str, dict[int, Tensor]] = {}
    for native, tensor in state.items():
        source = source_of(native, key_map)
        thirds.setdefault(source.name, {})[source.third or 0] = tensor
    return {
        name: torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else parts[0]
        for name, parts in thirds.items()
    }


def _check_authors_backbone(config: Config, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the authors' code builds this backbone: torchvision's of that name, with all stages."""
    backbone = {
        name.removeprefix(NATIVE_BACKBONE): tensor.shape
        for name, tensor in state.items()
        if name.startswith(NATIVE_BACKBONE)
    }
    if backbone != _authors_backbone(config):
        raise ValueError(
            "original: expected a backbone that the authors' code builds, a ResNet of torchvision up to stage 4,"
            f" got {config.backbone!r} up to stage {config.backbone_stage}{', dilated' if config.dilation else ''}"
        )


def _authors_backbone(config: Config) -> dict[str, torch.Size] | None:
    """Return parameter names and shapes of the backbone that the authors' code builds; None if it cannot build it."""
    from torchvision.models import get_model

    try:
        with MetaInit():
            backbone = get_model(config.backbone, replace_stride_with_dilation=[False, False, config.dilation])
    except (NotImplementedError, TypeError, ValueError):  # no such model, or it cannot be dilated
        return None
    stored = {name: tensor.shape for name, tensor in backbone.state_dict().items() if not name.startswith("fc.")}
    return {name: shape for name, shape in stored.items() if not name.endswith(".num_batches_tracked")}


def _warn_of_lost_metadata(model: DetectionTransformer, path: Path) -> None:
    """Warn of metadata that the authors' format does not store and that loading cannot infer."""
    assumed = default_metadata(model.config.num_classes)
    names = [field.name for field in fields(assumed)]
    lost = [name.replace("_", " ") for name in names if getattr(model.metadata, name) != getattr(assumed, name)]
    if lost:
        _log.warning("%s: the original format does not store %s", path, ", ".join(lost))


def write_tensors(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write the files of a checkpoint, all of them or none.

    Args:
        writers: the function that writes each file, by the file's path; the weights first.

    Raises:
        OSError: a file cannot be written.
    """
    from safetensors import SafetensorError

    try:
        write_atomically(writers)
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors hide the OSError
        if "DataLoader worker" in str(error):  # torch's signal handler raises it wherever the process is
            raise
        weights = next(iter(writers))
        raise OSError(f"{weights}: cannot be written; check disk space and permissions ({error})") from error


def _write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt", **_MARK})


def _is_ours(weights: Path) -> bool:
    """Return whether this library wrote a safetensors file; another program that saves it again drops the mark."""
    from safetensors import safe_open

    try:
        with safe_open(weights, "pt") as file:
            return _MARK.items() <= (file.metadata() or {}).items()
    except Exception:  # no file, or another format: the type of the error depends on the content
        return False


def _write_json(content: dict[str, Any], path: Path) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_bytes(encode_text(text))
