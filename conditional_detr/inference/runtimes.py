"""What runs exported files: torch.export's programs, ONNX Runtime and OpenVINO, all called alike."""

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

from conditional_detr.inference.checksums import is_whole

KEY = "conditional_detr"
"""Under which a description stands in a file."""

EXTRA = f"{KEY}.json"
"""The description's name in a ``.pt2``, which is an archive."""

PIXELS, SIZES = "pixels", "sizes"
LOGITS, BOXES = "logits", "boxes"
DETECTED = ("corners", "scores", "labels")
"""The names of inputs and outputs; ``SIZES`` and ``DETECTED`` are those of post-processing."""

Run: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From pixels (B, 3, H, W) to logits (B, N, C) and boxes (B, N, 4)."""


class Opened(NamedTuple):
    """A file, ready to run.

    Attributes:
        description: the text of it.
        device: where ``run`` takes its pixels.
        run: float32 pixels to logits and boxes.
    """

    description: str
    device: torch.device
    run: Run


class Settings(NamedTuple):
    """How a file is to be run: see :class:`conditional_detr.inference.exported.ExportedModel`."""

    device: str
    threads: int | None
    dtype: torch.dtype | None


def open_file(path: Path, *, device: str, threads: int | None, dtype: torch.dtype | None) -> Opened:
    """Open an exported file; arguments and errors as of :class:`conditional_detr.inference.exported.ExportedModel`."""
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        expected = ", ".join(SUFFIXES)
        raise ValueError(f"{path}: expected an exported file ({expected}); from_pretrained loads weights")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'expected a file, got a folder' if path.is_dir() else 'no such file'}")
    with path.open("rb"):  # says itself that it may not be read, where runtimes say that it is damaged
        pass
    if dtype is not None and opener is not _open_openvino:
        raise ValueError(f"dtype: {path.suffix} files are computed in what they were exported in, got {dtype}")
    return opener(path, Settings(device, threads, dtype))


_PLACES = ("Exception from ", "Check '")  # lines in which OpenVINO names the place in its own source


def _damaged(path: Path, error: Exception | str) -> ValueError:
    """Return the error of a file that its runtime cannot read."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(_PLACES)]
    told = f": {lines[0]}" if lines else ""
    return ValueError(f"{path}: damaged, or of a kind that the installed version cannot read{told}")


def _foreign(path: Path) -> ValueError:
    """Return the error of a file that others have made."""
    return ValueError(
        f"{path}: expected a file that `conditional-detr export` has written, which says what its classes are and how"
        " images are prepared; this one does not"
    )


def _needs(package: str, extra: str, path: Path) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{path}: needs {package}, which is not installed: pip install 'conditional-detr[{extra}]'"
    )


def _open_onnx(path: Path, settings: Settings) -> Opened:
    """Open an ``.onnx`` in ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise _needs("onnxruntime", "onnx", path) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors are raised as well
    if settings.threads is not None:
        options.intra_op_num_threads = settings.threads
    provider = _provider(settings.device, onnxruntime.get_available_providers())
    if not is_whole(path):
        raise _damaged(path, "its checksum is wrong, unless it was changed on purpose")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # of many kinds, all of the runtime's own
        raise _damaged(path, error) from error
    description = session.get_modelmeta().custom_metadata_map.get(KEY)
    if description is None:
        raise _foreign(path)
    if provider[0] not in session.get_providers():
        raise ValueError(f"device: ONNX Runtime could not use {settings.device!r}, and would have used the CPU")
    with_sizes = SIZES in {of.name for of in session.get_inputs()}

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = session.run([LOGITS, BOXES], feeds(pixels, with_sizes=with_sizes))
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return Opened(description, torch.device("cpu"), run)


def _provider(device: str, available: list[str]) -> tuple[str, dict[str, Any]]:
    """Return ONNX Runtime's name of a device, and its settings."""
    kind, _, number = device.partition(":")
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if name not in available or (number and not (number.isdecimal() and kind == "cuda")):
        raise ValueError(f"device: got {device!r}, but ONNX Runtime here has {', '.join(available)}")
    return name, {"device_id": int(number)} if number else {}


_making = threading.Lock()  # else two threads could make two


def openvino_core() -> Any:
    """Return OpenVINO's entry, one for the whole process, which is never freed.

    Its CPU plugin gives the thread an alternate stack for signals and puts the earlier one back when it is freed. Of
    two that are freed in the order in which they were made, the second puts back the stack of the first, which is no
    more; the next Ctrl-C is then a segmentation fault.
    """
    with _making:
        return _core()


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


_OPENVINO_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _open_openvino(path: Path, settings: Settings) -> Opened:
    """Open an ``.xml`` and its ``.bin`` in OpenVINO."""
    try:
        core = openvino_core()
    except ImportError as error:
        raise _needs("openvino", "openvino", path) from error
    device = settings.device.upper()
    known = core.available_devices
    if device not in known and f"{device}.0" not in known:  # of several of a kind, each has a number
        raise ValueError(f"device: got {settings.device!r}, but OpenVINO here has {', '.join(known)}")
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
            half = device != "CPU" and '"precision": "float16"' in description  # what such files are for
            dtype = settings.dtype or (torch.float16 if half else torch.float32)
            options["INFERENCE_PRECISION_HINT"] = _OPENVINO_DTYPES[dtype]
            compiled = core.compile_model(network, device, options)
    except Exception as error:  # of many kinds, all of the runtime's own
        raise _damaged(path, error) from error
    if description is None:
        raise _foreign(path)
    computed = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if computed != _OPENVINO_DTYPES[dtype]:
        raise ValueError(f"dtype: got {dtype}, but OpenVINO would compute in {computed} on this {device}")
    with_sizes = len(compiled.inputs) > 1
    one_at_a_time = threading.Lock()  # the compiled model has one set of inputs and outputs

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with one_at_a_time:
            found = compiled(feeds(pixels, with_sizes=with_sizes))  # outputs are copies
        return torch.from_numpy(found[LOGITS]), torch.from_numpy(found[BOXES])

    return Opened(description, torch.device("cpu"), run)


def _check_parts(path: Path) -> None:
    """Raise unless an ``.xml`` has a network, the ``.bin`` beside it all that this wants, and both are as written."""
    text = path.read_bytes()
    if b"<net " not in text[:1000]:  # OpenVINO would try all that it knows on it, and print what each thinks of it
        raise _damaged(path, "it has no network of OpenVINO's")
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; it belongs to {path.name} and holds the weights")
    if not is_whole(path):
        raise _damaged(path, f"the checksum of it and {weights.name} is wrong, unless they were changed on purpose")
    places = re.finditer(rb'offset="(\d+)" size="(\d+)"', text)
    end = max((int(place[1]) + int(place[2]) for place in places), default=0)
    if weights.stat().st_size < end:
        raise ValueError(f"{weights}: truncated: expected at least {end} bytes, got {weights.stat().st_size}")


def _open_program(path: Path, settings: Settings) -> Opened:
    """Open a ``.pt2`` of torch.export, which may run code when it is loaded, as torch's own loader does."""
    from torch.export.passes import move_to_device_pass

    if settings.threads is not None:
        raise ValueError("threads: for .pt2 files call torch.set_num_threads, which is for all of torch")
    device = _torch_device(settings.device)
    description = _description_in_archive(path)
    try:
        program = torch.export.load(path)
        if device.type != "cpu":
            program = move_to_device_pass(program, device)
        module: Any = program.module(check_guards=False)
    except Exception as error:  # of many kinds, from the archive, the schema and the operators
        raise _damaged(path, error) from error
    # what torch would ask of sizes concerns strides while tracing, and refuses maps of one cell, which run well
    module._forward_pre_hooks.clear()
    with_sizes = len(program.graph_signature.user_inputs) > 1

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = module(pixels, _no_sizes(pixels)) if with_sizes else module(pixels)
        return found[0], found[1]

    return Opened(description, device, run)


def _torch_device(name: str) -> torch.device:
    try:
        made = torch.empty(0, device=name)
        made.cpu()  # from "meta" nothing comes back
        return made.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: expected one that this machine has, got {name!r}: {error}") from error


def _description_in_archive(path: Path) -> str:
    """Read the description in a ``.pt2``, a zip archive, whose checksums torch does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            described = [name for name in archive.namelist() if name.endswith(f"extra/{EXTRA}")]
            text = archive.read(described[0]).decode() if described else None
    except Exception as error:  # of many kinds, from the archive, its compression and the text
        raise _damaged(path, error) from error
    if broken is not None:
        raise _damaged(path, f"the checksum of {broken} is wrong")
    if text is None:
        raise _foreign(path)
    return text


def feeds(pixels: Tensor, *, with_sizes: bool) -> dict[str, np.ndarray]:
    """Return a network's inputs by name; post-processing gets sizes whose result nobody reads."""
    sizes = {SIZES: _no_sizes(pixels).numpy()} if with_sizes else {}
    return {PIXELS: pixels.numpy(), **sizes}


def _no_sizes(pixels: Tensor) -> Tensor:
    """Return sizes of images for post-processing whose result nobody reads."""
    return torch.ones((pixels.shape[0], 2), dtype=torch.int64, device=pixels.device)


_OPENERS: dict[str, Callable[[Path, Settings], Opened]] = {
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
    ".pt2": _open_program,
}
SUFFIXES = tuple(_OPENERS)
"""What exported files are called."""
