"""Engines: each is a function from pixels to logits and boxes of the last decoder layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conditional_detr.deploy.export import export
from conditional_detr.deploy.optimize import optimize
from conditional_detr.deploy.quantize import quantize
from conditional_detr.inference.exported import ExportedModel
from conditional_detr.inference.runtimes import Run, openvino_core
from conditional_detr.modeling.detection_transformer import DetectionTransformer


@dataclass(frozen=True)
class Engine:
    """A way to run a model.

    Attributes:
        name: its name in the report.
        make: a function that returns the function to time, from the model, the folder of files and example pixels.
        needs: required packages that are not dependencies of this library.
        devices: device types that it supports.
        write: a function of the same arguments that writes the files which ``make`` reads instead of the model, unless
            they exist; None: ``make`` uses the model.
    """

    name: str
    make: Callable[[DetectionTransformer, Path, Tensor], Run]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    write: Callable[[DetectionTransformer, Path, Tensor], object] | None = None

    @property
    def missing_packages(self) -> list[str]:
        """Return the required packages that are not installed."""
        return [package for package in self.needs if find_spec(package) is None]


def _plain(model: DetectionTransformer, _: Path, __: Tensor) -> Run:
    return lambda pixels: _last(model(pixels))


def _optimised(model: DetectionTransformer, _: Path, __: Tensor, *, dtype: torch.dtype, compile: bool) -> Run:
    fast = optimize(model, dtype=dtype, compile=compile)
    return lambda pixels: _last(fast(pixels))


def _last(output: Any) -> tuple[Tensor, Tensor]:
    return output.logits[-1], output.boxes[-1]


def _write_file(model: DetectionTransformer, folder: Path, _: Tensor, *, name: str, dtype: torch.dtype) -> None:
    if not (folder / name).exists():
        export(model, folder / name, dtype=dtype)


def _file(_: DetectionTransformer, folder: Path, example: Tensor, *, name: str, dtype: torch.dtype | None) -> Run:
    threads = None if name.endswith(".pt2") else torch.get_num_threads()  # a .pt2 runs with the threads of torch
    exported = ExportedModel(folder / name, device=str(example.device), threads=threads, dtype=dtype)
    return lambda pixels: _last(exported(pixels))


def write_weights(model: DetectionTransformer, folder: Path, _: Tensor | None = None) -> None:
    """Write a model's checkpoint into a folder, unless it exists."""
    path = folder / WEIGHTS
    if not path.exists():
        model.save_pretrained(path)


def transformers_network(folder: Path) -> Any:
    """Return the transformers model with the weights that :func:`write_weights` has written into a folder."""
    from transformers import AutoModelForObjectDetection
    from transformers.utils import logging

    logging.disable_progress_bar()  # the benchmark has its own
    return AutoModelForObjectDetection.from_pretrained(folder / WEIGHTS).eval()


class _TransformersModel(nn.Module):
    """The transformers model as a function from pixels to logits and boxes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.network = transformers_network(folder)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Run it as with the output of its own image processor, which always includes a mask."""
        mask = torch.ones((pixels.shape[0], *pixels.shape[2:]), dtype=torch.long, device=pixels.device)
        output = self.network(pixel_values=pixels, pixel_mask=mask)
        return output.logits, output.pred_boxes


def _transformers(_: DetectionTransformer, folder: Path, example: Tensor, *, dtype: Any, compile: bool) -> Run:
    network: Any = _TransformersModel(folder).to(example.device, dtype)
    run = torch.compile(network) if compile else network

    def call(pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = run(pixels.to(dtype))
        return logits.float(), boxes.float()

    return call


def _transformers_file(folder: Path, example: Tensor) -> Path:
    return folder / f"transformers {'x'.join(map(str, example.shape))}.onnx"


def _write_transformers_file(model: DetectionTransformer, folder: Path, example: Tensor) -> None:
    """Export the transformers model to ONNX for pixels of the example's shape, unless the file exists."""
    path = _transformers_file(folder, example)
    if not path.exists():
        write_weights(model, folder)
        program = torch.onnx.export(_TransformersModel(folder).eval(), (example,), dynamo=True, verbose=False)
        assert program is not None  # None only without dynamo
        draft = path.with_name("draft.onnx")  # an incomplete file must not be mistaken for the exported model
        program.save(str(draft))
        draft.replace(path)


def _transformers_onnx_runtime(_: DetectionTransformer, folder: Path, example: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = _transformers_file(folder, example)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (port.name for port in session.get_inputs())

    def call(pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = session.run(None, {name: pixels.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return call


def _transformers_openvino(_: DetectionTransformer, folder: Path, example: Tensor, *, precision: str) -> Run:
    core = openvino_core()
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(core.read_model(_transformers_file(folder, example)), "CPU", settings)

    def call(pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = compiled(pixels.numpy())
        logits, boxes = (torch.from_numpy(outputs[port].copy()) for port in compiled.outputs)
        return logits, boxes

    return call


def _optimised_in(dtype: torch.dtype, *, compile: bool = False) -> Callable[[DetectionTransformer, Path, Tensor], Run]:
    return partial(_optimised, dtype=dtype, compile=compile)


def _exported(
    name: str,
    file: str,
    needs: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu",),
    *,
    dtype: torch.dtype = torch.float32,
    computed: torch.dtype | None = None,
) -> Engine:
    """Return the engine of an exported model.

    Args:
        name: name of the engine.
        file: name of the file; engines may share one.
        needs: see :class:`Engine`.
        devices: see :class:`Engine`.
        dtype: dtype of the exported model.
        computed: dtype that OpenVINO computes in; None: that of the exported model.
    """
    write = partial(_write_file, name=file, dtype=dtype)
    return Engine(name, partial(_file, name=file, dtype=computed), needs, devices, write)


def _write_int8(model: DetectionTransformer, folder: Path, example: Tensor) -> None:
    """Quantise a model, unless the file exists. It is calibrated on noise, which does not change its speed."""
    path = folder / INT8_FILE
    if not path.exists():
        generator = np.random.default_rng(0)
        quantize(model, path, [generator.integers(0, 256, (*example.shape[2:], 3), dtype=np.uint8) for _ in range(2)])


def _transformers_engine(
    name: str, dtype: torch.dtype = torch.float32, *, compile: bool = False, devices: tuple[str, ...] = ("cpu", "cuda")
) -> Engine:
    """Return the engine of the transformers model."""
    make = partial(_transformers, dtype=dtype, compile=compile)
    return Engine(name, make, ("transformers",), devices, write_weights)


def _transformers_exported(
    name: str, make: Callable[[DetectionTransformer, Path, Tensor], Run], runtime: str
) -> Engine:
    """Return the engine of the transformers model, exported to ONNX."""
    return Engine(name, make, ("transformers", *_ONNX, runtime), ("cpu",), _write_transformers_file)


WEIGHTS = "weights"
INT8_FILE = "int8.xml"
ONNX_FILE = "model.onnx"
OPENVINO_FILE = "model.xml"
_ONNX = ("onnx", "onnxscript")
REFERENCE = "transformers"
ENGINES = {
    engine.name: engine
    for engine in (
        _transformers_engine(REFERENCE),
        _transformers_engine("transformers compiled", compile=True),
        _transformers_engine("transformers bf16 compiled", torch.bfloat16, compile=True, devices=("cuda",)),
        _transformers_exported("transformers ONNX Runtime", _transformers_onnx_runtime, "onnxruntime"),
        _transformers_exported("transformers OpenVINO", partial(_transformers_openvino, precision="f32"), "openvino"),
        _transformers_exported(
            "transformers OpenVINO bf16", partial(_transformers_openvino, precision="bf16"), "openvino"
        ),
        Engine("plain", _plain),
        Engine("optimised", _optimised_in(torch.float32)),
        Engine("optimised compiled", _optimised_in(torch.float32, compile=True)),
        Engine("optimised bf16", _optimised_in(torch.bfloat16)),
        Engine("optimised bf16 compiled", _optimised_in(torch.bfloat16, compile=True)),
        _exported("torch.export", "model.pt2", devices=("cpu", "cuda")),
        _exported("torch.export fp16", "half.pt2", devices=("cuda",), dtype=torch.float16),
        _exported("ONNX Runtime", ONNX_FILE, (*_ONNX, "onnxruntime")),
        _exported("OpenVINO", OPENVINO_FILE, ("openvino",)),
        _exported("OpenVINO bf16", OPENVINO_FILE, ("openvino",), computed=torch.bfloat16),
        Engine(
            "OpenVINO int8", partial(_file, name=INT8_FILE, dtype=None), ("openvino", "nncf"), ("cpu",), _write_int8
        ),
    )
}
"""Engines by name. An engine computes in float32 unless its name gives another dtype."""
