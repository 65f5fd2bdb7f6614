"""Run exported models in torch.export, ONNX Runtime and OpenVINO through one interface."""

import re
import threading
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from conditional_detr.inference.checksums import is_intact
from conditional_detr.system.atomic_files import recover

KEY = "conditional_detr"
"""Key of the description in an exported model's metadata."""

EXTRA = f"{KEY}.json"
"""File name of the description in a ``.pt2``, which is an archive."""

PIXELS, SIZES = "pixels", "sizes"
LOGITS, BOXES = "logits", "boxes"
DETECTIONS = ("corners", "scores", "labels")
"""Names of inputs and outputs; ``SIZES`` and ``DETECTIONS`` are those of post-processing."""

Run: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function from pixels (B, 3, H, W) to logits (B, N, C) and boxes (B, N, 4)."""


class LoadedFile(NamedTuple):
    """Exported model, loaded in its runtime.

    Attributes:
        description: the description in the file, as JSON.
        device: device of the pixels that ``run`` takes.
        run: function from float32 pixels to logits and boxes.
    """

    description: str
    device: torch.device
    run: Run


class Settings(NamedTuple):
    """Settings of a runtime; see :class:`conditional_detr.inference.exported.ExportedModel`."""

    device: str
    threads: int | None
    dtype: torch.dtype | None


def open_file(path: Path, *, device: str, threads: int | None, dtype: torch.dtype | None) -> LoadedFile:
    """Load an exported model; see :class:`conditional_detr.inference.exported.ExportedModel`."""
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        expected = ", ".join(SUFFIXES)
        raise ValueError(f"{path}: expected an exported model ({expected}); from_pretrained loads checkpoints")
    recover(path.parent)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'expected a file, got a folder' if path.is_dir() else 'no such file'}")
    with path.open("rb"):  # raises PermissionError; runtimes report a damaged file instead
        pass
    if dtype is not None and opener is not _open_openvino:
        raise ValueError(f"dtype: expected None for {path.suffix}, which runs in its exported dtype, got {dtype}")
    return opener(path, Settings(device, threads, dtype))


_SOURCE_LOCATIONS = ("Exception from ", "Check '")  # starts of lines with locations in OpenVINO's source


def _damaged(path: Path, error: Exception | str) -> ValueError:
    """Return the error for a file that its runtime cannot read."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(_SOURCE_LOCATIONS)]
    reason = f": {lines[0]}" if lines else ""
    return ValueError(f"{path}: damaged, or not supported by the installed runtime{reason}")


def _no_description(path: Path) -> ValueError:
    """Return the error for a file that this library has not exported."""
    return ValueError(
        f"{path}: expected a model exported by `conditional-detr export`, with class names and preprocessing;"
        " got one without"
    )


def _missing(package: str, extra: str, path: Path) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{path}: needs {package}, which is not installed: pip install 'conditional-detr[{extra}]'"
    )


def _open_onnx(path: Path, settings: Settings) -> LoadedFile:
    """Load an ``.onnx`` file in ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing("onnxruntime", "onnx", path) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only, which are raised as well
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    provider = _provider(settings.device, onnxruntime.get_available_providers())
    if not is_intact(path):
        raise _damaged(path, "its checksum is wrong, unless it was changed on purpose")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # the runtimes raise many types
        raise _damaged(path, error) from error
    description = session.get_modelmeta().custom_metadata_map.get(KEY)
    if description is None:
        raise _no_description(path)
    if provider[0] not in session.get_providers():
        raise ValueError(f"device: ONNX Runtime cannot use {settings.device!r} and would run on the CPU")
    with_sizes = SIZES in {port.name for port in session.get_inputs()}

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = session.run([LOGITS, BOXES], input_arrays(pixels, with_sizes=with_sizes))
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return LoadedFile(description, torch.device("cpu"), run)


def _provider(device: str, available: list[str]) -> tuple[str, dict[str, Any]]:
    """Return ONNX Runtime's provider for a device, and the provider's settings."""
    kind, _, number = device.partition(":")
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if name not in available or (number and not (number.isdecimal() and kind == "cuda")):
        raise ValueError(f"device: expected one of ONNX Runtime's {', '.join(available)}, got {device!r}")
    return name, {"device_id": int(number)} if number else {}


_core_lock = threading.Lock()  # otherwise two threads could create two cores


def openvino_core() -> Any:
    """Return the OpenVINO core, one per process, which is never freed.

    Its CPU plugin sets an alternate signal stack for the thread, and restores the previous one when it is freed. If
    two cores are freed in the order of their creation, the second restores the stack of the first, which no longer
    exists; the next Ctrl-C is then a segmentation fault.
    """
    with _core_lock:
        return _core()


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


_OPENVINO_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _open_openvino(path: Path, settings: Settings) -> LoadedFile:
    """Load an ``.xml`` file and its ``.bin`` in OpenVINO."""
    try:
        core = openvino_core()
    except ImportError as error:
        raise _missing("openvino", "openvino", path) from error
    device = settings.device.upper()
    available = core.available_devices
    if device not in available and f"{device}.0" not in available:  # several of one type are numbered
        raise ValueError(f"device: expected one of OpenVINO's {', '.join(available)}, got {settings.device!r}")
    if settings.dtype is not None and settings.dtype not in _OPENVINO_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _OPENVINO_DTYPES))}, got {settings.dtype}")
    _check_parts(path)
    options: dict[str, Any] = {}
    if settings.threads is not None:
        options["INFERENCE_NUM_THREADS"] = settings.threads
    try:
        network = core.read_model(path)
        description = network.get_rt_info([KEY, "description"]).astype(str) if network.has_rt_info([KEY]) else None
        if description is not None:
            half = device != "CPU" and '"precision": "float16"' in description  # what such models are exported for
            dtype = settings.dtype or (torch.float16 if half else torch.float32)
            options["INFERENCE_PRECISION_HINT"] = _OPENVINO_DTYPES[dtype]
            compiled = core.compile_model(network, device, options)
    except Exception as error:  # the runtimes raise many types
        raise _damaged(path, error) from error
    if description is None:
        raise _no_description(path)
    computed = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if computed != _OPENVINO_DTYPES[dtype]:
        raise ValueError(f"dtype: OpenVINO cannot compute in {dtype} on this {device}, and would use {computed}")
    with_sizes = len(compiled.inputs) > 1
    lock = threading.Lock()  # the compiled model has one set of inputs and outputs

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with lock:
            outputs = compiled(input_arrays(pixels, with_sizes=with_sizes))  # copies
        return torch.from_numpy(outputs[LOGITS]), torch.from_numpy(outputs[BOXES])

    return LoadedFile(description, torch.device("cpu"), run)


def _check_parts(path: Path) -> None:
    """Raise unless an ``.xml`` contains a network, its ``.bin`` is complete, and their checksum is correct."""
    text = path.read_bytes()
    if b"<net " not in text[:1000]:  # OpenVINO would try all its readers and print their errors
        raise _damaged(path, "it contains no OpenVINO network")
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; it contains the weights of {path.name}")
    if not is_intact(path):
        raise _damaged(path, f"the checksum of it and {weights.name} is wrong, unless they were changed on purpose")
    ranges = re.finditer(rb'offset="(\d+)" size="(\d+)"', text)
    end = max((int(match[1]) + int(match[2]) for match in ranges), default=0)
    if weights.stat().st_size < end:
        raise ValueError(f"{weights}: truncated: expected at least {end} bytes, got {weights.stat().st_size}")


def _open_program(path: Path, settings: Settings) -> LoadedFile:
    """Load a ``.pt2`` file of torch.export. Like torch's own loader, this may run code from the file."""
    from torch.export.passes import move_to_device_pass

    if settings.threads is not None:
        raise ValueError("threads: expected None for .pt2, got a number; call torch.set_num_threads, which is global")
    device = _torch_device(settings.device)
    description = _description_in_archive(path)
    try:
        program = torch.export.load(path)
        if device.type != "cpu":
            program = move_to_device_pass(program, device)
        module: Any = program.module(check_guards=False)
    except Exception as error:  # of many types, from the archive, the schema and the operators
        raise _damaged(path, error) from error
    # torch's size guards come from strides during tracing and reject feature maps of one cell, which run correctly
    module._forward_pre_hooks.clear()
    with_sizes = len(program.graph_signature.user_inputs) > 1

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            outputs = module(pixels, _dummy_sizes(pixels)) if with_sizes else module(pixels)
        return outputs[0], outputs[1]

    return LoadedFile(description, device, run)


def _torch_device(name: str) -> torch.device:
    try:
        empty = torch.empty(0, device=name)
        empty.cpu()  # fails for "meta"
        return empty.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: expected an available device, got {name!r}: {error}") from error


def _description_in_archive(path: Path) -> str:
    """Return the description in a ``.pt2``, a zip archive whose checksums torch does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            names = [name for name in archive.namelist() if name.endswith(f"extra/{EXTRA}")]
            text = archive.read(names[0]).decode() if names else None
    except Exception as error:  # of many types, from the archive, its compression and the text
        raise _damaged(path, error) from error
    if broken is not None:
        raise _damaged(path, f"the checksum of {broken} is wrong")
    if text is None:
        raise _no_description(path)
    return text


def input_arrays(pixels: Tensor, *, with_sizes: bool) -> dict[str, np.ndarray]:
    """Return a network's inputs by name, with dummy image sizes if it has post-processing."""
    sizes = {SIZES: _dummy_sizes(pixels).numpy()} if with_sizes else {}
    return {PIXELS: pixels.numpy(), **sizes}


def _dummy_sizes(pixels: Tensor) -> Tensor:
    """Return image sizes (B, 2) for post-processing whose result is not used."""
    return torch.ones((pixels.shape[0], 2), dtype=torch.int64, device=pixels.device)


_OPENERS: dict[str, Callable[[Path, Settings], LoadedFile]] = {
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
    ".pt2": _open_program,
}
SUFFIXES = tuple(_OPENERS)
"""Suffixes of exported models."""
