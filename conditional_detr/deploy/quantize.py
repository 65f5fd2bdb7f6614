"""Quantise the backbone and the linear layers of a model to int8, for OpenVINO."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray

from conditional_detr.deploy.export import Traced, openvino_network, trace, write_openvino
from conditional_detr.deploy.export_files import (
    check_free,
    checked_target,
    describe,
    draft_of,
    missing_packages,
    move,
    version_of,
)
from conditional_detr.deploy.optimize import check_model
from conditional_detr.deploy.parity import check_parity, compare, parity_pixels
from conditional_detr.inference.exported import Description, ExportedModel
from conditional_detr.inference.images import open_image
from conditional_detr.inference.postprocessing import check_count
from conditional_detr.inference.preprocessing import to_pixels
from conditional_detr.inference.runtimes import SIZES, input_arrays
from conditional_detr.inference.sources import ImageSource, source_name
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import Preprocessing
from conditional_detr.system.atomic_files import unfinished_folder
from conditional_detr.system.torch_settings import plain_torch_settings

PARTS = ("backbone", "encoder", "decoder")
"""Parts that can be kept in float32."""

# λ_q = FFN(f) always stays in float32: it multiplies p_s, so an error in it moves the attention of a query. With λ_q
# in int8, all boxes of a trained model were wrong.
_TRANSFORMATION = "decoder.transformation"
_KEPT_IN_BACKBONE = {"ScaledDotProductAttention", "MVN"}  # OpenVINO's names of attention and LayerNorm


def quantize(
    model: DetectionTransformer,
    target: str | Path,
    images: Sequence[ImageSource],
    *,
    keep: Sequence[str] = (),
    top_k: int | None = None,
    thresholds: Mapping[str, float] | None = None,
    overwrite: bool = False,
    measure: Callable[[ExportedModel], Mapping[str, Any]] = lambda _: {},
    progress: Callable[[str], None] = lambda _: None,
) -> Description:
    """Export a model to OpenVINO in int8.

    The convolutions and additions of the backbone and the linear layers of encoder and decoder are quantised. The
    matrix products and softmax of attention, layer norms, additions outside the backbone, λ_q and the heads stay in
    float32. The activation ranges are measured on calibration images, which should be representative of later input.
    Nothing is trained.

    Inputs and outputs are those of :func:`conditional_detr.export`. The exported model contains the differences of
    logits and boxes on the first image. ``conditional-detr quantize`` also measures the effect on AP.

    Args:
        model: the model; it is not changed.
        target: "….xml", the suffix also in capitals; the weights are written beside it to "….bin".
        images: calibration images, about a hundred; each is opened when it is needed.
        keep: parts to keep in float32: "backbone", "encoder", "decoder".
        top_k: largest number of detections per image, to include post-processing; None: no post-processing.
        thresholds: thresholds by class name, to store for ``Detector.from_file``; None: none.
        overwrite: replace existing files.
        measure: returns further measurements of the exported model to store in it, such as AP, by name. If it raises,
            nothing is written.
        progress: called with a description of the current step.

    Returns:
        The description stored in the exported model.

    Raises:
        ModuleNotFoundError: openvino or nncf is not installed.
        OSError: the file cannot be written or exists, or an image cannot be read.
        TypeError: the model is not a ConditionalDETR or DETR, is of a subclass, or has modules of other classes;
            ``images`` or ``keep`` is not a list; an image of an unsupported type.
        ValueError: no image; an unsupported suffix; an unknown part; a model that is an optimised copy, whose backbone
            cannot be traced, or whose class head does not match its class names; outputs that are not finite.
    """
    check_request(target, keep)
    stored: dict[str, Any] = {"top_k": top_k, "thresholds": thresholds}
    quantizer = Quantizer(model, target, images, **stored, overwrite=overwrite, progress=progress)
    return quantizer.write(keep=keep, measure=measure)


class Quantizer:
    """Model converted to OpenVINO once, to quantise it with several choices of parts that stay in float32.

    Arguments and errors are those of :func:`quantize`.
    """

    @plain_torch_settings()
    def __init__(
        self,
        model: DetectionTransformer,
        target: str | Path,
        images: Sequence[ImageSource],
        *,
        top_k: int | None = None,
        thresholds: Mapping[str, float] | None = None,
        overwrite: bool = False,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        check_model(model)
        self.target = check_request(target)
        check_free(self.target, overwrite=overwrite)
        if top_k is not None:
            check_count("top_k", top_k)
        _check_list("images", images)
        if not images:
            raise ValueError("images: expected at least one, got none")
        self.model, self.images, self.progress = model, images, progress
        self.description = describe(model, ".xml", precision="int8", top_k=top_k, thresholds=thresholds)
        self.compared = parity_pixels(images[0], model.metadata.preprocessing)  # before tracing, as an early check
        progress("tracing")
        self.traced = trace(model, dtype=torch.float32, top_k=top_k)
        self.network = openvino_network(self.traced)  # nncf quantises a copy of it

    @plain_torch_settings()
    def write(
        self,
        *,
        keep: Sequence[str] = (),
        measure: Callable[[ExportedModel], Mapping[str, Any]] = lambda _: {},
    ) -> Description:
        """Write the model in int8, except for the parts to keep, and return its description."""
        check_request(self.target, keep)
        model, target, images = self.model, self.target, self.images
        network = _quantized(self.network, self.traced, images, model.metadata.preprocessing, keep, self.progress)
        versions = {**self.description.versions, "nncf": version_of("nncf")}
        measured: dict[str, Any] = {"calibration": {"images": len(images), "also in float": sorted(keep)}}
        image_name = source_name(images[0], "given")
        description = replace(self.description, versions=versions, image=image_name, measured=measured)
        with unfinished_folder(target.parent) as folder:
            draft = draft_of(target, folder)
            write_openvino(network, draft, description)
            self.progress("comparing with the model")
            exported = ExportedModel(draft)
            parity = compare(exported, model, self.compared)
            limits = [(float("inf"), 1.0)] * len(parity)  # finite values suffice: AP measures the accuracy
            check_parity(parity, limits, target)
            description = replace(description, parity=parity, measured={**measured, **measure(exported)})
            write_openvino(network, draft, description)
            move(draft, target)
        return description


def check_request(target: str | Path, keep: Sequence[str] = ()) -> Path:
    """Return the target as a path after validating target and parts; errors as in :func:`quantize`."""
    target = Path(target)
    if target.suffix.lower() != ".xml":
        raise ValueError(f"{target}: expected a file name that ends in .xml, for OpenVINO")
    if find_spec("nncf") is None:
        raise missing_packages(target, ["nncf"], "openvino")
    _check_list("keep", keep)
    if unknown := [part for part in keep if part not in PARTS]:
        raise ValueError(f"keep: expected parts among {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
    return checked_target(target)


def _check_list(name: str, given: object) -> None:
    """Raise TypeError unless a value is a sequence other than a string."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise TypeError(f"{name}: expected a list, got {type(given).__name__}")


def _quantized(
    network: Any,
    traced: Traced,
    images: Sequence[ImageSource],
    preprocessing: Preprocessing,
    keep: Sequence[str],
    progress: Callable[[str], None],
) -> Any:
    """Return a copy of the network in int8, except for the operations to keep in float32."""
    import nncf

    calls = count()

    def transform(item: tuple[int, ImageSource]) -> dict[str, ndarray]:
        previous_passes, done = divmod(next(calls), len(images))
        progress(f"measuring ranges, pass {previous_passes + 1}: {done + 1} of {len(images)} images")
        index, image = item
        pixels = to_pixels(open_image(image, f"images[{index}]"), preprocessing)[None]
        return input_arrays(pixels, with_sizes=SIZES in traced.inputs)

    with _silent_nncf():
        return nncf.quantize(
            network,
            nncf.Dataset(list(enumerate(images)), transform),
            preset=nncf.QuantizationPreset.MIXED,  # asymmetric activations: as fast here, and AP is higher
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=_names_of_kept(network, traced, keep)),
        )


@contextlib.contextmanager
def _silent_nncf() -> Iterator[None]:
    """Disable the progress bars and log messages of nncf within a context; ``progress`` replaces them."""
    from nncf.common.logging.track_progress import track

    logger = logging.getLogger("nncf")
    level, original = logger.level, track.__init__
    logger.setLevel(logging.ERROR)
    track.__init__ = lambda self, *args, **kwargs: original(self, *args, **{**kwargs, "disable": True})
    try:
        yield
    finally:
        track.__init__ = original
        logger.setLevel(level)


def _names_of_kept(network: Any, traced: Traced, keep: Sequence[str]) -> list[str]:
    """Return OpenVINO's names of the operations to keep in float32."""
    quantized = set() if "backbone" in keep else _names_in_backbone(network)
    linear = _names_of_linear(traced, keep)
    operations = [one for one in network.get_ordered_ops() if one.get_type_name() != "Constant"]
    names = [one.get_friendly_name() for one in operations]
    return [name for name in names if name not in quantized and name.split("/")[0] not in linear]


def _names_in_backbone(network: Any) -> set[str]:
    """Return OpenVINO's names of the operations to quantise up to the last convolution, the projection."""
    names: set[str] = set()
    remaining = [one for one in network.get_ordered_ops() if one.get_type_name() == "Convolution"][-1:]
    while remaining:
        operation = remaining.pop()
        if operation.get_friendly_name() not in names:
            names.add(operation.get_friendly_name())
            remaining += [port.get_source_output().get_node() for port in operation.inputs()]
    kept = [one for one in network.get_ordered_ops() if one.get_type_name() in _KEPT_IN_BACKBONE]
    return names.difference(one.get_friendly_name() for one in kept)


def _names_of_linear(traced: Traced, keep: Sequence[str]) -> set[str]:
    """Return torch.export's names of the linear layers to quantise, with which OpenVINO's names begin.

    torch.export records the module of each operation. The heads belong to neither part.
    """
    parts = {"encoder", "decoder"}.difference(keep)
    names = set()
    for node in traced.program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0].removeprefix("network.") if stack else ""
        quantized = path.split(".")[0] in parts and not path.startswith(_TRANSFORMATION)
        if node.op == "call_function" and node.name.startswith("linear") and quantized:
            names.add(node.name)
    return names
