"""Checkpoints as files: found on disk, in the cache or on the hub, and opened without copying a weight."""

import argparse
import json
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditional_detr.inference.runtimes import SUFFIXES

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_WEIGHT_FILES = (SAFETENSORS, PICKLE)

_PACKAGE = Path(__file__).parents[1]
_SHIPPED = (_PACKAGE / "shipped_weights", _PACKAGE.parent / "weights")  # in a wheel, in a clone


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        weights: the file the tensors lie in.
        tensors: by the file's own names; on the CPU, mapped from the file where its format allows.
        config: the parsed ``config.json`` beside it, if any.
        preprocessor: the parsed ``preprocessor_config.json`` beside it, if any.
        arguments: the authors' training arguments, if the file holds them.
    """

    weights: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    preprocessor: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None


def open_checkpoint(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Find a checkpoint by path, short name or hub id, and open it.

    Raises:
        OSError: it is nowhere to be found, or the hub cannot be reached.
        ValueError: a file is not what its name says, or is damaged.
    """
    path = Path(name)
    if path.is_file():
        return _open_files(path, path.parent)
    folder = path if path.is_dir() else None
    if folder is None or not any((folder / file).is_file() for file in _WEIGHT_FILES):
        # a data set of shapes may well lie in a folder "shapes"
        folder = shipped_folder(str(name)) or folder
    if folder is None:
        if isinstance(name, Path) or str(name).count("/") != 1 or path.is_absolute():
            raise FileNotFoundError(
                f"weights: got {str(name)!r}, which is no file or folder, no short name of shipped weights"
                f" ({', '.join(shipped_names()) or 'none are shipped'}) and no hub id, 'owner/name'"
            )
        folder = _download(str(name), revision, cache_dir, token, local_files_only)
    for file in _WEIGHT_FILES:
        if (folder / file).is_file():
            return _open_files(folder / file, folder)
    found = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(f"{folder}: expected {' or '.join(_WEIGHT_FILES)}, found {found or 'nothing'}")


def shipped_names() -> list[str]:
    """Return the short names of the weights that come with this library."""
    return sorted({path.parent.name for folder in _SHIPPED if folder.is_dir() for path in folder.glob(f"*/{CONFIG}")})


def shipped_folder(name: str) -> Path | None:
    """Return the folder of shipped weights, if there are any of this name."""
    if name not in shipped_names():
        return None
    return next(folder / name for folder in _SHIPPED if (folder / name / CONFIG).is_file())


def _download(
    repository: str,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """Bring the needed files of a hub repository, and only those, into the cache; return their folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    local_files_only = local_files_only or not _hub_answers(repository, revision, token)

    def fetch(file: str) -> Path:
        return Path(
            hf_hub_download(
                repository,
                file,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        )

    try:
        folder = fetch(CONFIG).parent
        for optional in ([PREPROCESSOR], _WEIGHT_FILES):
            for file in optional:
                try:
                    fetch(file)
                    break
                except EntryNotFoundError:
                    continue  # the opener says what it misses
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"weights {repository!r}: neither in the cache nor to be fetched (no network, or offline mode);"
            " fetch them once where there is network, or pass a folder or file on disk"
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise OSError(f"weights {repository!r}{at}: the hub did not give them: {_first_line(error)}") from error
    return folder


def _hub_answers(repository: str, revision: str | None, token: str | bool | None) -> bool:
    """Ask the hub once, without the retries that make a machine without network wait half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repository, CONFIG, revision=revision), token=token)
    except HfHubHTTPError:
        return True  # what it says is for the download to tell
    except Exception:  # what a failed connection raises differs between huggingface_hub's versions
        return False
    return True


def _open_files(weights: Path, folder: Path) -> Checkpoint:
    """Open a weight file and the json files beside it."""
    tensors, arguments = _read_tensors(weights)
    return Checkpoint(weights, tensors, _read_json(folder / CONFIG), _read_json(folder / PREPROCESSOR), arguments)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors, .bin, .pth or .pt file, without running any code in it.

    Raises:
        OSError: the file is not there.
        ValueError: it is none of these, or damaged.
    """
    return _read_tensors(path)[0]


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read the tensors of a weight file, and the authors' training arguments if it has them."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path), None
    if path.suffix in WEIGHT_SUFFIXES:
        return _read_pickle(path)
    hint = "; Detector.from_file opens exported files" if path.suffix.lower() in SUFFIXES else ""
    raise ValueError(f"{path}: expected a .safetensors, .bin, .pth or .pt file{hint}")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected json, but it does not parse: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a json object, got a {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file: the library checks it, the views are made here, in a third of its time."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error}); {size} bytes") from error
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors, end = {}, size
    for name, described in reversed(slices.items()):  # without holes, the last one ends where the file does
        dtype, shape = _SAFETENSORS_DTYPES.get(described.get_dtype()), described.get_shape()
        if dtype is None:
            expected = "floating point of 16, 32 or 64 bits"
            raise ValueError(f"{path}: {name} is of dtype {described.get_dtype()}, expected {expected}")
        start = end - math.prod(shape) * dtype.itemsize
        data = content[start:end]
        tensors[name] = (data.clone() if start % dtype.itemsize else data).view(dtype).view(shape)
        end = start
    return tensors


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a torch file safely: of all classes, only tensors and ``argparse.Namespace`` may be made."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: truncated, not a torch file, or one that would run code ({_first_line(error)});"
            f" {path.stat().st_size} bytes"
        ) from error
    arguments = None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        namespace = content.get("args")
        arguments = vars(namespace) if isinstance(namespace, argparse.Namespace) else namespace
        content = content["model"]
    strangers = (
        [key for key, value in content.items() if not isinstance(value, Tensor)]
        if isinstance(content, Mapping)
        else []
    )
    if not isinstance(content, Mapping) or strangers:
        raise ValueError(
            f"{path}: expected a state dict of tensors, or one under 'model',"
            f" got {'entries that are no tensors: ' + str(strangers) if strangers else type(content).__name__}"
        )
    return dict(content), arguments


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
