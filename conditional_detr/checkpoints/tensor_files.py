"""Read the tensors of weight files without running code in them, and check all sizes against the files."""

import argparse
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conditional_detr.inference.runtimes import SUFFIXES

INDEX_SUFFIX = ".index.json"
"""Ending of the file that lists the shards of weights, after the name of the unsharded file."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")

_LARGEST_JSON = 2**24  # bytes; a config.json of a thousand classes has 50 KB
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
_EXPECTED_DTYPES = "floating point of 16, 32 or 64 bits"
_NESTED = ("model", "state_dict")  # the authors' training, Lightning


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, .bin, .pth or .pt file or of an index of such files.

    Raises:
        OSError: the file does not exist.
        ValueError: the file is of another kind, or damaged.
    """
    return read_weights(path)[0]


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return the tensors of :func:`read_tensors`, and the authors' training arguments if the file contains them."""
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path), None
    if path.suffix == ".safetensors":
        return _read_safetensors(path), None
    if path.suffix in WEIGHT_SUFFIXES:
        return _read_pickle(path)
    hint = "; Detector.from_file opens exported models" if path.suffix.lower() in SUFFIXES else ""
    raise ValueError(f"{path}: expected a .safetensors, .bin, .pth or .pt file{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, which must be an object.

    Raises:
        OSError: the file cannot be read.
        ValueError: not JSON, not an object, or too large.
    """
    if (size := path.stat().st_size) > _LARGEST_JSON:
        raise ValueError(f"{path}: expected at most {_LARGEST_JSON} bytes of json, got {size}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected valid json, got a parse error: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a json object, got a {type(content).__name__}")
    return content


def shards_of(index: Path) -> list[Path]:
    """Return the files that an index lists, in its own folder.

    Raises:
        OSError: the index cannot be read.
        ValueError: the index is damaged, or lists a file of another kind or folder.
    """
    return sorted({index.parent / file for file in _weight_map(index).values()})


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor."""
    files = read_json(index).get("weight_map")
    suffix = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{index}: expected a weight_map of tensor names to files, got {type(files).__name__}")
    for file in {str(file): file for file in files.values()}.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or Path(file).suffix != suffix:
            raise ValueError(f"{index}: expected names of {suffix} files in the same folder, got {file!r}")
    return files


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index lists; each tensor must be in the file that the index says."""
    files = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    for shard in shards_of(index):
        if not shard.is_file():
            raise FileNotFoundError(f"{index}: lists {shard.name}, which does not exist")
        found = read_tensors(shard)
        expected = {name for name, file in files.items() if file == shard.name}
        if different := sorted(expected ^ found.keys()):
            where = "the index" if different[0] in expected else shard.name
            raise ValueError(
                f"{index}: expected the same tensors as in {shard.name}, got {different[0]} in {where} only"
            )
        tensors |= found
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a memory-mapped safetensors file.

    The safetensors library validates the file; creating the views here takes a third of its time.
    """
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
    except (SafetensorError, UnicodeError) as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error}); {size} bytes") from error
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    tensors, end = {}, size
    for name, view in reversed(slices.items()):  # there are no gaps: the last tensor ends at the end of the file
        dtype, shape = _SAFETENSORS_DTYPES.get(view.get_dtype()), view.get_shape()
        if dtype is None:
            raise ValueError(f"{path}: {name}: expected {_EXPECTED_DTYPES}, got dtype {view.get_dtype()}")
        start = end - math.prod(shape) * dtype.itemsize
        data = content[start:end]
        tensors[name] = (data.clone() if start % dtype.itemsize else data).view(dtype).view(shape)
        end = start
    return tensors


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a torch file; only tensors and ``argparse.Namespace`` may be unpickled."""
    path.open("rb").close()  # a file that cannot be opened; any later error, also an OSError, means a damaged file
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                    raise ValueError("its content is compressed, which torch does not do")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # its type depends on where the file is damaged
        raise ValueError(
            f"{path}: truncated, not a torch file, or not safe to unpickle ({first_line(error)});"
            f" {path.stat().st_size} bytes"
        ) from error
    arguments = None
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            arguments, content = content.get("args"), content[key]
            break
    if isinstance(arguments, argparse.Namespace):
        arguments = vars(arguments)
    if not isinstance(arguments, dict | None):
        raise ValueError(f"{path}: expected args as a Namespace or dict, got {type(arguments).__name__}")
    return _checked(content, path), arguments


def _checked(content: Any, path: Path) -> dict[str, Tensor]:
    """Return a state dict from a torch file if its tensors lie in the file as a whole.

    A tensor of stride 0, or many views of one storage, would need far more memory than the file has bytes.
    """
    expected = f"{path}: expected a state dict of tensors, or one under {' or '.join(map(repr, _NESTED))}"
    if not isinstance(content, Mapping):
        raise ValueError(f"{expected}, got {type(content).__name__}")
    if not_tensors := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{expected}, got values that are not tensors: {not_tensors[:8]}")
    if not_strings := [key for key in content if not isinstance(key, str)]:
        raise ValueError(f"{expected}, got keys that are not strings: {not_strings[:8]}")
    total, size = 0, path.stat().st_size
    for key, tensor in content.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            kind = f"{tensor.layout} on {tensor.device}, {tensor.dtype}"
            raise ValueError(f"{path}: {key}: expected a plain tensor, got {kind}")
        if tensor.dtype not in _SAFETENSORS_DTYPES.values():
            raise ValueError(f"{path}: {key}: expected {_EXPECTED_DTYPES}, got dtype {tensor.dtype}")
        total += tensor.numel() * tensor.itemsize
        if total > size:
            raise ValueError(f"{path}: expected tensors of at most the file's {size} bytes, got more up to {key}")
    return dict(content)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
