"""What is timed: one function each that takes pixels and gives logits and boxes of the last decoder layer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from conditional_detr.deploy.optimize import optimize
from conditional_detr.model import ConditionalDETR

Run: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From pixels (B, 3, H, W) to logits (B, N, C) and boxes (B, N, 4)."""


@dataclass(frozen=True)
class Engine:
    """A way to run a model.

    Attributes:
        name: what the report calls it.
        make: from the model, a folder for what has to be written, and an example of the pixels, the function to time.
        needs: packages beyond this library's own.
        devices: kinds of devices that it runs on.
    """

    name: str
    make: Callable[[ConditionalDETR, Path, Tensor], Run]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [package for package in self.needs if find_spec(package) is None]


def _plain(model: ConditionalDETR, _: Path, __: Tensor) -> Run:
    return lambda pixels: _last(model(pixels))


def _optimised(model: ConditionalDETR, _: Path, __: Tensor, *, dtype: torch.dtype, compile: bool) -> Run:
    fast = optimize(model, dtype=dtype, compile=compile)
    return lambda pixels: _last(fast(pixels))


def _last(output: Any) -> tuple[Tensor, Tensor]:
    return output.logits[-1], output.boxes[-1]


def written(model: ConditionalDETR, folder: Path) -> Path:
    """Write a model's weights in the published format, once, and return the folder that they are in."""
    path = folder / "weights"
    if not path.exists():
        model.save_pretrained(path)
    return path


def transformers_network(model: ConditionalDETR, folder: Path) -> Any:
    """Return transformers' network with the model's weights, which it reads from files of the published format."""
    from transformers import ConditionalDetrForObjectDetection
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one of ours
    return ConditionalDetrForObjectDetection.from_pretrained(written(model, folder)).eval()


class _Theirs(nn.Module):
    """transformers' network, from pixels to logits and boxes."""

    def __init__(self, model: ConditionalDETR, folder: Path) -> None:
        super().__init__()
        self.network = transformers_network(model, folder)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """As it is called with the output of its own processor, which always has a mask."""
        mask = torch.ones((pixels.shape[0], *pixels.shape[2:]), dtype=torch.long, device=pixels.device)
        output = self.network(pixel_values=pixels, pixel_mask=mask)
        return output.logits, output.pred_boxes


def _transformers(model: ConditionalDETR, folder: Path, example: Tensor, *, dtype: Any, compile: bool) -> Run:
    network: Any = _Theirs(model, folder).to(example.device, dtype)
    run = torch.compile(network) if compile else network

    def call(pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = run(pixels.to(dtype))
        return logits.float(), boxes.float()

    return call


def _exported(model: ConditionalDETR, folder: Path, example: Tensor) -> Path:
    """Export transformers' network to ONNX for pixels of the example's shape, once."""
    path = folder / f"{'x'.join(map(str, example.shape))}.onnx"
    if not path.exists():
        program = torch.onnx.export(_Theirs(model, folder).eval(), (example,), dynamo=True, verbose=False)
        assert program is not None  # as it is only without dynamo
        program.save(str(path))
    return path


def _onnx_runtime(model: ConditionalDETR, folder: Path, example: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = _exported(model, folder, example)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (of.name for of in session.get_inputs())

    def call(pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes = session.run(None, {name: pixels.numpy()})
        return torch.from_numpy(logits), torch.from_numpy(boxes)

    return call


def _openvino(model: ConditionalDETR, folder: Path, example: Tensor, *, precision: str) -> Run:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(core.read_model(_exported(model, folder, example)), "CPU", settings)

    def call(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = compiled(pixels.numpy())
        logits, boxes = (torch.from_numpy(found[output].copy()) for output in compiled.outputs)
        return logits, boxes

    return call


def _ours(dtype: torch.dtype, *, compile: bool = False) -> Callable[[ConditionalDETR, Path, Tensor], Run]:
    return partial(_optimised, dtype=dtype, compile=compile)


def _peer(dtype: torch.dtype, *, compile: bool = False) -> Callable[[ConditionalDETR, Path, Tensor], Run]:
    return partial(_transformers, dtype=dtype, compile=compile)


_EXPORTS = ("transformers", "onnx", "onnxscript")
REFERENCE = "transformers"
ENGINES = {
    engine.name: engine
    for engine in (
        Engine(REFERENCE, _peer(torch.float32), ("transformers",)),
        Engine("transformers compiled", _peer(torch.float32, compile=True), ("transformers",)),
        Engine("transformers bf16 compiled", _peer(torch.bfloat16, compile=True), ("transformers",), ("cuda",)),
        Engine("transformers ONNX Runtime", _onnx_runtime, (*_EXPORTS, "onnxruntime"), ("cpu",)),
        Engine("transformers OpenVINO", partial(_openvino, precision="f32"), (*_EXPORTS, "openvino"), ("cpu",)),
        Engine("transformers OpenVINO bf16", partial(_openvino, precision="bf16"), (*_EXPORTS, "openvino"), ("cpu",)),
        Engine("plain", _plain),
        Engine("optimised", _ours(torch.float32)),
        Engine("optimised compiled", _ours(torch.float32, compile=True)),
        Engine("optimised bf16", _ours(torch.bfloat16)),
        Engine("optimised bf16 compiled", _ours(torch.bfloat16, compile=True)),
    )
}
"""By name. What an engine computes in is float32 where its name says nothing else."""
