"""Find a checkpoint's files on disk, in the cache or on the hub, and open them without copying the weights."""

import difflib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from conditional_detr.checkpoints.tensor_files import (
    INDEX_SUFFIX,
    WEIGHT_SUFFIXES,
    first_line,
    read_json,
    read_weights,
    shards_of,
)
from conditional_detr.system.atomic_files import consistent, recover
from conditional_detr.system.paths import expand_home

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_WEIGHT_FILES = (SAFETENSORS, SAFETENSORS + INDEX_SUFFIX, PICKLE, PICKLE + INDEX_SUFFIX)
_MOST_COMPARED = 1000  # files of a folder that are compared with a name that does not exist

_PACKAGE = Path(__file__).parents[1]
_SHIPPED = (_PACKAGE / "shipped_weights", _PACKAGE.parent / "weights")  # in a wheel, in a clone


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        weights: path of the weight file, or of the index of its shards.
        tensors: the tensors by the names in the file; on the CPU, memory-mapped if the file format allows it.
        size: size of the weight files in bytes.
        config: the parsed ``config.json`` in the same folder, if any.
        preprocessor: the parsed ``preprocessor_config.json`` in the same folder, if any.
        arguments: the authors' training arguments, if the file contains them.
    """

    weights: Path
    tensors: dict[str, Tensor]
    size: int
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
    path = expand_home(name)
    recover(path if path.is_dir() else path.parent)
    if path.is_file():
        return _open_files(path, path.parent)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: expected a file or a folder, got a pipe or device")
    folder = path if path.is_dir() else None
    if folder is None or not _has_weights(folder):
        # a folder "shapes" may be a dataset, and then the short name means the shipped weights
        folder = shipped_folder(str(name)) or folder
    if folder is None:
        if isinstance(name, Path) or not is_hub_id(name):
            shipped = ", ".join(shipped_names()) or "none are shipped"
            raise FileNotFoundError(
                f"weights {str(name)!r}: no such file or folder{_similar(path)}; expected a file, a folder, a short"
                f" name of shipped weights ({shipped}) or a hub id 'owner/name'"
            )
        folder = _download(name, path, revision, cache_dir, token, local_files_only)
    for file in _WEIGHT_FILES:
        if (folder / file).is_file():
            return _open_files(folder / file, folder)
    inside = sorted(folder.iterdir())
    found = [file for file in inside if file.suffix in WEIGHT_SUFFIXES or (file.is_dir() and _has_weights(file))]
    hint = f"; did you mean {' or '.join(map(str, found[:3]))}?" if found else ""
    content = [file.name for file in inside] or "an empty folder"
    raise FileNotFoundError(f"{folder}: expected {SAFETENSORS} or {PICKLE}, got {content}{hint}")


def _has_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _WEIGHT_FILES)


def is_hub_id(name: str) -> bool:
    """Return whether a string has the form "owner/name"."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def _similar(path: Path) -> str:
    """Return a hint at shipped weights and files whose names are similar to a path that does not exist."""
    names = shipped_names() if len(path.parts) == 1 else []
    if path.parent.is_dir():
        names += [str(path.parent / file.name) for file in islice(path.parent.iterdir(), _MOST_COMPARED)]
    close = difflib.get_close_matches(str(path), sorted(set(names)), n=3, cutoff=0.7)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


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
    path: Path,
    revision: str | None,
    cache_dir: str | Path | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """Download only the needed files of a hub repository into the cache; return their folder.

    Args:
        repository: the hub id.
        path: the same as a path, which does not exist; for messages.
        revision: branch, tag or commit.
        cache_dir: the hub cache.
        token: hub token.
        local_files_only: use only the cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    missing = f"weights {repository!r}: no such file or folder{_similar(path)}"
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
                    fetched = fetch(file)
                except EntryNotFoundError:
                    continue  # opening the folder raises if a required file is missing
                if file.endswith(INDEX_SUFFIX):
                    for shard in shards_of(fetched):
                        fetch(shard.name)
                break
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{missing}; as a hub id: neither in the cache nor downloadable (no network, or offline mode);"
            " download them once with network, or pass a folder or file on disk"
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise OSError(f"{missing}; as a hub id{at}: download failed: {first_line(error)}") from error
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
    """Open a weight file, or an index with its shards, and the json files in its folder."""
    with consistent(folder):
        config, preprocessor = (
            read_json(folder / file) if (folder / file).is_file() else None for file in (CONFIG, PREPROCESSOR)
        )
        tensors, arguments = read_weights(weights)
    files = shards_of(weights) if weights.name.endswith(INDEX_SUFFIX) else [weights]
    size = sum(file.stat().st_size for file in files)
    return Checkpoint(weights, tensors, size, config, preprocessor, arguments)
