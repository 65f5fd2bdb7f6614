"""A model as one file that runs without this library: torch.export, ONNX, OpenVINO."""

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from conditional_detr.deploy.kernels import Computation
from conditional_detr.deploy.optimize import OptimizedDETR, check_dtype, check_model
from conditional_detr.deploy.parity import TOLERANCES, check_parity, compare, parity_pixels
from conditional_detr.inference.checksums import seal
from conditional_detr.inference.exported import Description, ExportedModel
from conditional_detr.inference.postprocessing import check_count, check_head, named_rows, top_k_detections
from conditional_detr.inference.runtimes import BOXES, DETECTED, EXTRA, KEY, LOGITS, PIXELS, SIZES, SUFFIXES
from conditional_detr.inference.sources import ImageSource, source_name
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.shutdown import ShutdownRequest

_TRACED = (2, 3, 160, 224)  # no size of any map in it is 1, or equal to another
_NEEDS = {
    ".onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),  # the last one to compare
    ".xml": (("openvino",), "openvino"),
    ".pt2": ((), ""),
}


def export(
    model: ConditionalDETR,
    target: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    top_k: int | None = None,
    image: ImageSource | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Description:
    """Write a model into one file, for images of any size and any number of them.

    The file has the input "pixels" (B, 3, H, W), normalised float32, and the outputs "logits" (B, N, C) and "boxes"
    (B, N, 4) cx cy w h in [0, 1], float32. With ``top_k`` there is post-processing in it: the second input "sizes"
    (B, 2), int64, height and width of the original images in pixels, and the outputs "corners" (B, K, 4) x0 y0 x1 y1
    in those pixels, "scores" (B, K) and "labels" (B, K), int64, best first; rows without a class name are left out.

    Before it is moved to its place, the file is run on an image at two sizes, and its logits and boxes are compared
    with the model's. Class names, preprocessing and the differences stand in it, and ``Detector.from_file`` needs
    nothing else.

    Args:
        model: the model; it stays as it is.
        target: "….onnx"; "….xml" for OpenVINO, which gets its weights beside it in "….bin"; "….pt2" for torch.export.
            Files that are there are replaced.
        dtype: what to compute in: float32; or float16, for GPUs, where softmax, sines, reference points and the
            arithmetic of boxes remain in float32.
        top_k: the most detections an image, for post-processing in the file; None: none.
        image: what to compare on; None: a pattern that is drawn.
        progress: told what is being done.

    Returns:
        What stands in the file.

    Raises:
        ModuleNotFoundError: a package for the format is not installed.
        OSError: the file cannot be written, or the image not read.
        TypeError: no ConditionalDETR, or a subclass; no dtype.
        ValueError: another suffix or dtype; a model that was optimised, whose backbone cannot be traced, or whose class
            head does not fit its class names; the file does not give what the model gives, and was not written.
    """
    check_model(model)
    check_dtype(dtype, tuple(TOLERANCES))
    target = checked_target(target)
    if top_k is not None:
        check_count("top_k", top_k)
    images = parity_pixels(image, model.metadata.preprocessing)  # an image that cannot be read is told at once
    progress("tracing")
    write = writer_of(model, target.suffix, dtype=dtype, top_k=top_k)
    description = describe(model, target.suffix, precision=str(dtype).removeprefix("torch."), top_k=top_k)
    named = "drawn" if image is None else source_name(image, "given")
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / target.name
        write(draft, description)
        progress("comparing with the model")
        parity = compare(ExportedModel(draft), model, images)
        check_parity(parity, TOLERANCES[dtype], target)
        description = replace(description, parity=parity, image=named)
        progress("writing")
        write(draft, description)
        move(draft, target)
    return description


class Graph(nn.Module):
    """What is exported: the optimised copy, with plain tensors in and out.

    Args:
        model: the model.
        dtype: what to compute in.
        top_k: K; None: no post-processing.
    """

    rows: Tensor

    def __init__(self, model: ConditionalDETR, *, dtype: torch.dtype, top_k: int | None) -> None:
        super().__init__()
        model = copy.deepcopy(model).cpu().float()
        with torch.no_grad():
            self.network = OptimizedDETR(model, Computation(dtype, kernels=False))
            for parameter in self.network.parameters():
                parameter.data = parameter.data.contiguous()  # files have no other layout
            rows = model.class_head(torch.zeros(1, model.config.width)).shape[-1]
        names = model.metadata.class_names
        check_head(rows, names)
        named = named_rows(names)
        if top_k is not None and not len(named):
            raise ValueError("top_k: post-processing needs a class with a name, got none")
        self.top_k = top_k
        self.register_buffer("rows", named)
        nn.Module.train(self, False)

    def forward(self, pixels: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Map pixels (B, 3, H, W), and sizes (B, 2) for post-processing, to the outputs of :func:`export`."""
        output = self.network(pixels)
        logits, boxes = output.logits[-1], output.boxes[-1]
        if self.top_k is None or sizes is None:
            return logits, boxes
        corners, scores, labels, _ = top_k_detections(logits, boxes, sizes, self.rows, self.top_k)
        return logits, boxes, corners, scores, labels


Writer: TypeAlias = Callable[[Path, Description], None]
"""Writes a network to a path that ends as its format's do, with a description in it."""


class Traced(NamedTuple):
    """A model as a graph of torch.export.

    Attributes:
        program: the graph.
        inputs: their names.
        outputs: their names.
    """

    program: torch.export.ExportedProgram
    inputs: list[str]
    outputs: list[str]


def trace(model: ConditionalDETR, *, dtype: torch.dtype, top_k: int | None) -> Traced:
    """Trace a model for images of any size and any number of them; arguments as of :func:`export`."""
    graph = Graph(model, dtype=dtype, top_k=top_k)
    traced: tuple[Tensor, ...] = (torch.zeros(_TRACED),)
    any_size: list[dict[int, Any]] = [dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)]
    inputs, outputs = [PIXELS], [LOGITS, BOXES]
    if top_k is not None:
        traced = (*traced, torch.ones((_TRACED[0], 2), dtype=torch.int64))
        any_size.append({0: torch.export.Dim.DYNAMIC})
        inputs, outputs = [*inputs, SIZES], [*outputs, *DETECTED]
    with torch.no_grad():
        program = torch.export.export(graph, traced, dynamic_shapes=tuple(any_size))
    return Traced(program, inputs, outputs)


def writer_of(model: ConditionalDETR, suffix: str, *, dtype: torch.dtype, top_k: int | None) -> Writer:
    """Trace a model and return what writes it in a format; arguments as of :func:`export`."""
    traced = trace(model, dtype=dtype, top_k=top_k)
    if suffix == ".pt2":
        return partial(_write_program, traced.program)
    if dtype != torch.float32:  # torch's own kernels compute softmax in float32; elsewhere it has to be said
        operator = torch.ops.aten.scaled_dot_product_attention.default
        traced = traced._replace(program=traced.program.run_decompositions({operator: _attention}))
    if suffix == ".onnx":
        return partial(_write_onnx, onnx_program(traced))
    return partial(write_openvino, openvino_network(traced))


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Attend without a mask, the softmax in float32; q is scaled first, so that half precision holds the products."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


def onnx_program(traced: Traced) -> torch.onnx.ONNXProgram:
    """Translate a graph to ONNX."""
    options: dict[str, Any] = {"dynamo": True, "verbose": False}
    made = torch.onnx.export(traced.program, input_names=traced.inputs, output_names=traced.outputs, **options)
    assert made is not None  # as it is only without dynamo
    return made


def openvino_network(traced: Traced) -> Any:
    """Translate a graph to OpenVINO."""
    import openvino

    with ShutdownRequest() as stop:  # Ctrl-C in the middle of it would abort the process
        network = openvino.convert_model(traced.program)
    if stop.requested:
        raise KeyboardInterrupt
    for ports, names in ((network.inputs, traced.inputs), (network.outputs, traced.outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    shapes = {PIXELS: [-1, 3, -1, -1], SIZES: [-1, 2]}
    network.reshape({name: shapes[name] for name in traced.inputs})
    return network


def _write_program(program: torch.export.ExportedProgram, path: Path, description: Description) -> None:
    torch.export.save(program, path, extra_files={EXTRA: description.to_json()})


def _write_onnx(made: torch.onnx.ONNXProgram, path: Path, description: Description) -> None:
    made.model.metadata_props[KEY] = description.to_json()
    made.save(str(path))
    seal(path)


def write_openvino(network: Any, path: Path, description: Description) -> None:
    """Write a network of OpenVINO's, an ``.xml`` and a ``.bin``, with its description in it."""
    import openvino

    network.set_rt_info(description.to_json(), [KEY, "description"])
    openvino.save_model(network, path, compress_to_fp16=False)
    seal(path)


def checked_target(target: str | Path) -> Path:
    """Return where to write.

    Raises:
        ModuleNotFoundError: a package for the format is not installed.
        OSError: the folder is not there, or nothing can be written into it.
        ValueError: another suffix than those of exported files.
    """
    target = Path(target)
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: expected a file's name that ends in one of {', '.join(SUFFIXES)}")
    if target.is_dir():
        raise IsADirectoryError(f"{target}: expected a file's name, got a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    try:
        with tempfile.TemporaryFile(dir=target.parent):  # at once, not after all work
            pass
    except OSError as error:
        raise OSError(f"{target}: cannot be written: {error.strerror or error}") from error
    packages, extra = _NEEDS[target.suffix]
    if missing := [package for package in packages if find_spec(package) is None]:
        needs = f"needs {', '.join(missing)}, not installed here: pip install 'conditional-detr[{extra}]'"
        raise ModuleNotFoundError(f"{target}: {needs}")
    return target


def files_of(target: Path) -> tuple[Path, ...]:
    """Return the files of an exported model: the target, and for OpenVINO the ``.bin`` beside it."""
    return (target, target.with_suffix(".bin")) if target.suffix.lower() == ".xml" else (target,)


def describe(model: ConditionalDETR, suffix: str, *, precision: str, top_k: int | None) -> Description:
    """Return what is to stand in a file, before anything was measured of it."""
    packages = ("conditional-detr", "torch", *_NEEDS[suffix][0])
    versions = {package: version_of(package) for package in packages}
    return Description(model.config, model.metadata, precision, top_k, (), "", versions, {})


def version_of(package: str) -> str:
    """Return the version of a package, also of one that is distributed under another name, as onnxruntime-gpu is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return str(import_module(package).__version__)


def move(draft: Path, target: Path) -> None:
    """Move a file, and the weights that may lie beside it, to its place, when all are written.

    Raises:
        OSError: they cannot be written.
    """
    write_atomically({target.with_name(file.name): _copier(file) for file in sorted(draft.parent.iterdir())})


def _copier(file: Path) -> Callable[[Path], object]:
    return lambda place: shutil.copyfile(file, place)
