"""Find a checkpoint's files on disk, in the cache or on the hub, and open them without copying the weights."""

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
from conditional_detr.system.atomic_files import recover

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
        weights: path of the weight file.
        tensors: the tensors by the names in the file; on the CPU, memory-mapped if the file format allows it.
        config: the parsed ``config.json`` in the same folder, if any.
        preprocessor: the parsed ``preprocessor_config.json`` in the same folder, if any.
        arguments: the authors' training arguments, if the file contains them.
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
        OSError: the checkpoint does not exist, or the hub cannot be reached.
        ValueError: a file is damaged, or its content does not match its suffix.
    """
    path = Path(name)
    recover(path if path.is_dir() else path.parent)
    if path.is_file():
        return _open_files(path, path.parent)
    folder = path if path.is_dir() else None
    if folder is None or not any((folder / file).is_file() for file in _WEIGHT_FILES):
        # a folder "shapes" may be a dataset, and then the short name means the shipped weights
        folder = shipped_folder(str(name)) or folder
    if folder is None:
        if isinstance(name, Path) or str(name).count("/") != 1 or path.is_absolute():
            raise FileNotFoundError(
                "weights: expected a file, a folder, a short name of shipped weights"
                f" ({', '.join(shipped_names()) or 'none are shipped'}) or a hub id 'owner/name', got {str(name)!r}"
            )
        folder = _download(str(name), revision, cache_dir, token, local_files_only)
    for file in _WEIGHT_FILES:
        if (folder / file).is_file():
            return _open_files(folder / file, folder)
    content = sorted(file.name for file in folder.iterdir())
    raise FileNotFoundError(f"{folder}: expected {' or '.join(_WEIGHT_FILES)}, got {content or 'an empty folder'}")


def shipped_names() -> list[str]:
    """Return the short names of the weights that are shipped with this library."""
    return sorted({path.parent.name for folder in _SHIPPED if folder.is_dir() for path in folder.glob(f"*/{CONFIG}")})


def shipped_folder(name: str) -> Path | None:
    """Return the folder of the shipped weights of this name; None if there are none."""
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
    """Download only the needed files of a hub repository into the cache; return their folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    local_files_only = local_files_only or not _hub_responds(repository, revision, token)

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
                    continue  # opening the folder raises if a required file is missing
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"weights {repository!r}: neither in the cache nor downloadable (no network, or offline mode);"
            " download them once with network, or pass a folder or file on disk"
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise OSError(f"weights {repository!r}{at}: download failed: {_first_line(error)}") from error
    return folder


def _hub_responds(repository: str, revision: str | None, token: str | bool | None) -> bool:
    """Return whether the hub responds to one request.

    huggingface_hub's own retries take half a minute on a machine without network.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repository, CONFIG, revision=revision), token=token)
    except HfHubHTTPError:
        return True  # the download raises the same error with its cause
    except Exception:  # the error of a failed connection differs between huggingface_hub's versions
        return False
    return True


def _open_files(weights: Path, folder: Path) -> Checkpoint:
    """Open a weight file and the json files in its folder."""
    tensors, arguments = _read_tensors(weights)
    return Checkpoint(weights, tensors, _read_json(folder / CONFIG), _read_json(folder / PREPROCESSOR), arguments)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .bin, .pth or .pt file, without running any code in it.

    Raises:
        OSError: the file does not exist.
        ValueError: the file is of another kind, or damaged.
    """
    return _read_tensors(path)[0]


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of a weight file, and the authors' training arguments if it contains them."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path), None
    if path.suffix in WEIGHT_SUFFIXES:
        return _read_pickle(path)
    hint = "; Detector.from_file opens exported models" if path.suffix.lower() in SUFFIXES else ""
    raise ValueError(f"{path}: expected a .safetensors, .bin, .pth or .pt file{hint}")


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected valid json, got a parse error: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a json object, got a {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a memory-mapped safetensors file.

    The safetensors library validates the file; creating the views here takes a third of its time.
    """
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error}); {size} bytes") from error
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors, end = {}, size
    for name, view in reversed(slices.items()):  # there are no gaps: the last tensor ends at the end of the file
        dtype, shape = _SAFETENSORS_DTYPES.get(view.get_dtype()), view.get_shape()
        if dtype is None:
            expected = "floating point of 16, 32 or 64 bits"
            raise ValueError(f"{path}: {name}: expected {expected}, got dtype {view.get_dtype()}")
        start = end - math.prod(shape) * dtype.itemsize
        data = content[start:end]
        tensors[name] = (data.clone() if start % dtype.itemsize else data).view(dtype).view(shape)
        end = start
    return tensors


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a torch file; only tensors and ``argparse.Namespace`` may be unpickled."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: truncated, not a torch file, or not safe to unpickle ({_first_line(error)});"
            f" {path.stat().st_size} bytes"
        ) from error
    arguments = None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        namespace = content.get("args")
        arguments = vars(namespace) if isinstance(namespace, argparse.Namespace) else namespace
        content = content["model"]
    expected = f"{path}: expected a state dict of tensors, or one under 'model'"
    if not isinstance(content, Mapping):
        raise ValueError(f"{expected}, got {type(content).__name__}")
    if not_tensors := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{expected}, got values that are not tensors: {not_tensors}")
    return dict(content), arguments


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
