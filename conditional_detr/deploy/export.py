"""Export a model to torch.export, ONNX or OpenVINO, to run without this library."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from conditional_detr.deploy.export_files import check_free, checked_target, describe, draft_of, move
from conditional_detr.deploy.kernels import Computation
from conditional_detr.deploy.optimize import OptimizedDETR, check_dtype, check_model
from conditional_detr.deploy.parity import TOLERANCES, check_parity, compare, parity_pixels, tolerances_of
from conditional_detr.inference.checksums import append_checksum
from conditional_detr.inference.exported import Description, ExportedModel
from conditional_detr.inference.postprocessing import (
    check_count,
    check_head,
    named_rows,
    top_k_detections,
)
from conditional_detr.inference.runtimes import BOXES, DETECTIONS, EXTRA, KEY, LOGITS, PIXELS, SIZES
from conditional_detr.inference.sources import ImageSource, source_name
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.system.atomic_files import unfinished_folder
from conditional_detr.system.shutdown import ShutdownRequest
from conditional_detr.system.torch_settings import plain_torch_settings

_TRACE_SHAPE = (2, 3, 160, 224)  # no dimension of any feature map is 1 or equal to another


@plain_torch_settings()
def export(
    model: DetectionTransformer,
    target: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    top_k: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    image: ImageSource | None = None,
    tolerance: float | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Description:
    """Export a model for any image size and batch size.

    The exported model has the input "pixels" (B, 3, H, W), normalised float32, and the outputs "logits" (B, N, C), or
    (B, N, C + 1) of a DETR, and "boxes" (B, N, 4) cx cy w h in [0, 1], float32. With ``top_k`` it includes
    post-processing: the second input
    "sizes" (B, 2), int64, height and width of the original images in pixels, and the outputs "corners" (B, K, 4)
    x0 y0 x1 y1 in those pixels, "scores" (B, K) and "labels" (B, K), int64, by descending score. Classes without a
    name are excluded.

    Before the target is written, logits and boxes are compared with the model's on an image at two sizes. The exported
    model contains class names, preprocessing and these differences, so ``Detector.from_file`` needs no other file.

    Args:
        model: the model; it is not changed.
        target: "….onnx"; "….xml" for OpenVINO, whose weights are written beside it to "….bin"; "….pt2" for
            torch.export. The suffix may be in capitals, except that ".bin" never is.
        dtype: dtype of the computation: float32; or float16, for GPUs, where softmax, sines, reference points, the
            decoder's states and box arithmetic stay in float32.
        top_k: largest number of detections per image, to include post-processing; None: no post-processing.
        thresholds: thresholds by class name, to store for ``Detector.from_file``; None: none. The outputs are not
            changed.
        image: image to compare the outputs on; None: a generated pattern.
        tolerance: largest allowed difference of the boxes, which are in [0, 1]; of the logits ten times as much.
            Default: 1e-5 in float32 and 0.02 in float16; or three times what float32 itself rounds on the image.
        overwrite: replace existing files.
        progress: called with a description of the current step.

    Returns:
        The description stored in the exported model.

    Raises:
        ModuleNotFoundError: a package for the format is not installed.
        OSError: the file cannot be written or exists, or the image cannot be read.
        TypeError: the model is not a ConditionalDETR or DETR, is of a subclass, or has modules of other classes; not
            a dtype.
        ValueError: an unsupported suffix or dtype; a model that is an optimised copy, whose backbone cannot be traced,
            or whose class head does not match its class names; outputs that differ from the model's, in which case
            nothing is written.
    """
    check_model(model)
    check_dtype(dtype, tuple(TOLERANCES))
    target = checked_target(target)
    check_free(target, overwrite=overwrite)
    if top_k is not None:
        check_count("top_k", top_k)
    if tolerance is not None and not 0 < tolerance <= 1:
        raise ValueError(f"tolerance: expected 0 < tolerance <= 1, got {tolerance}")
    images = parity_pixels(image, model.metadata.preprocessing)  # before tracing, to report an unreadable image early
    suffix, precision = target.suffix.lower(), str(dtype).removeprefix("torch.")
    description = describe(model, suffix, precision=precision, top_k=top_k, thresholds=thresholds)
    progress("tracing")
    write = make_writer(model, suffix, dtype=dtype, top_k=top_k)
    image_name = "drawn" if image is None else source_name(image, "given")
    with unfinished_folder(target.parent) as folder:
        draft = draft_of(target, folder)
        write(draft, description)
        progress("comparing with the model")
        parity = compare(ExportedModel(draft), model, images)
        limits = TOLERANCES[dtype] if tolerance is None else (10 * tolerance, tolerance)
        check_parity(parity, tolerances_of(parity, model, images, limits), target)
        description = replace(description, parity=parity, image=image_name)
        progress("writing")
        write(draft, description)
        move(draft, target)
    return description


class Graph(nn.Module):
    """Module to export: an optimised copy with tensors as inputs and outputs.

    Args:
        model: the model.
        dtype: dtype of the computation.
        top_k: K; None: no post-processing.
    """

    rows: Tensor

    def __init__(self, model: DetectionTransformer, *, dtype: torch.dtype, top_k: int | None) -> None:
        super().__init__()
        model = copy.deepcopy(model).cpu().float()
        with torch.no_grad():
            self.network = OptimizedDETR(model, Computation(dtype, kernels=False))
            for parameter in self.network.parameters():
                parameter.data = parameter.data.contiguous()  # exported models have no other memory layout
            rows = model.class_head(torch.zeros(1, model.config.width)).shape[-1]
        names = model.metadata.class_names
        check_head(model.scores.num_classes(rows), names)
        named = named_rows(names)
        if top_k is not None and not len(named):
            raise ValueError("top_k: post-processing needs a class with a name, got none")
        self.top_k = top_k
        self.register_buffer("rows", named)
        nn.Module.train(self, False)

    def forward(self, pixels: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the outputs of :func:`export` for pixels (B, 3, H, W) and, with post-processing, sizes (B, 2)."""
        output = self.network(pixels)
        logits, boxes = output.logits[-1], output.boxes[-1]
        if self.top_k is None or sizes is None:
            return logits, boxes
        corners, scores, labels, _ = top_k_detections(logits, boxes, sizes, self.rows, self.top_k, self.network.scores)
        return logits, boxes, corners, scores, labels


Writer: TypeAlias = Callable[[Path, Description], None]
"""Function that writes a network and its description to a path with the suffix of its format."""


class Traced(NamedTuple):
    """Model traced by torch.export.

    Attributes:
        program: the graph.
        inputs: names of the inputs.
        outputs: names of the outputs.
    """

    program: torch.export.ExportedProgram
    inputs: list[str]
    outputs: list[str]


def trace(model: DetectionTransformer, *, dtype: torch.dtype, top_k: int | None) -> Traced:
    """Return the trace of a model for any image size and batch size; see :func:`export`."""
    graph = Graph(model, dtype=dtype, top_k=top_k)
    example: tuple[Tensor, ...] = (torch.zeros(_TRACE_SHAPE),)
    dynamic: list[dict[int, Any]] = [dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)]
    inputs, outputs = [PIXELS], [LOGITS, BOXES]
    if top_k is not None:
        example = (*example, torch.ones((_TRACE_SHAPE[0], 2), dtype=torch.int64))
        dynamic.append({0: torch.export.Dim.DYNAMIC})
        inputs, outputs = [*inputs, SIZES], [*outputs, *DETECTIONS]
    with torch.no_grad():
        program = torch.export.export(graph, example, dynamic_shapes=tuple(dynamic))
    return Traced(program, inputs, outputs)


def make_writer(model: DetectionTransformer, suffix: str, *, dtype: torch.dtype, top_k: int | None) -> Writer:
    """Trace a model and return its writer for a format, given as a suffix; see :func:`export`."""
    traced = trace(model, dtype=dtype, top_k=top_k)
    if suffix == ".pt2":
        return partial(_write_program, traced.program)
    if dtype != torch.float32:  # torch's kernels compute softmax in float32; other runtimes need it in the graph
        operator = torch.ops.aten.scaled_dot_product_attention.default
        traced = traced._replace(program=traced.program.run_decompositions({operator: _attention}))
    if suffix == ".onnx":
        return partial(_write_onnx, onnx_program(traced))
    return partial(write_openvino, openvino_network(traced))


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """Compute attention with a float32 softmax; q is scaled first, so that the products do not overflow float16."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.float().softmax(dim=-1).to(v.dtype) @ v


def onnx_program(traced: Traced) -> torch.onnx.ONNXProgram:
    """Convert a traced model to ONNX."""
    axes: dict[str, dict[int, str]] = {PIXELS: {0: "batch", 2: "height", 3: "width"}, SIZES: {}}  # one name each
    options: dict[str, Any] = {"dynamo": True, "verbose": False}
    options["dynamic_shapes"] = tuple(axes[name] for name in traced.inputs)  # names for its dynamic axes
    program = torch.onnx.export(traced.program, input_names=traced.inputs, output_names=traced.outputs, **options)
    assert program is not None  # None only without dynamo
    return program


def openvino_network(traced: Traced) -> Any:
    """Convert a traced model to OpenVINO."""
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


def _write_onnx(program: torch.onnx.ONNXProgram, path: Path, description: Description) -> None:
    program.model.metadata_props[KEY] = description.to_json()
    program.save(str(path))
    append_checksum(path)


def write_openvino(network: Any, path: Path, description: Description) -> None:
    """Write an OpenVINO network with its description, as an ``.xml`` and a ``.bin``."""
    import openvino

    network.set_rt_info(description.to_json(), [KEY, "description"])
    openvino.save_model(network, path, compress_to_fp16=False)
    append_checksum(path)
