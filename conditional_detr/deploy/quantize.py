"""8-bit integers: the backbone and the linear layers of an OpenVINO file, their ranges measured on images."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray

from conditional_detr.deploy.export import (
    Traced,
    checked_target,
    describe,
    move,
    openvino_network,
    trace,
    version_of,
    write_openvino,
)
from conditional_detr.deploy.optimize import check_model
from conditional_detr.deploy.parity import check_parity, compare, parity_pixels
from conditional_detr.inference.exported import Description, ExportedModel
from conditional_detr.inference.images import open_image, to_pixels
from conditional_detr.inference.postprocessing import check_count
from conditional_detr.inference.runtimes import SIZES, feeds
from conditional_detr.inference.sources import ImageSource, source_name
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.modeling.metadata import Preprocessing

PARTS = ("backbone", "encoder", "decoder")
"""Parts that can be kept in float."""

# λ_q = FFN(f) always stays in float: it multiplies p_s, so that an error in it moves where a query looks. With it in
# int8, no box of a trained model was right.
_TRANSFORMATION = "decoder.transformation"
_KEPT_IN_BACKBONE = {"ScaledDotProductAttention", "MVN"}  # OpenVINO's names for attention's products and for LayerNorm


def quantize(
    model: ConditionalDETR,
    target: str | Path,
    images: Sequence[ImageSource],
    *,
    keep: Sequence[str] = (),
    top_k: int | None = None,
    measure: Callable[[ExportedModel], Mapping[str, Any]] = lambda _: {},
    progress: Callable[[str], None] = lambda _: None,
) -> Description:
    """Write a model as an OpenVINO file that computes in 8-bit integers where that is fast and harmless.

    That is in the backbone, its additions too, and in the linear layers of encoder and decoder. The products and softmax
    of attention, layer norms, sums outside the backbone, λ_q and the heads stay in float32. The ranges of what flows
    between are measured on images, which should be like those that the file is for. Nothing is trained.

    Inputs and outputs are those of :func:`conditional_detr.export`. How far logits and boxes of the first image are
    from the model's stands in the file; what that means for AP, ``conditional-detr quantize`` measures.

    Args:
        model: the model; it stays as it is.
        target: "….xml"; the weights go beside it in "….bin". Files that are there are replaced.
        images: a hundred or so, each opened when it is its turn.
        keep: parts to keep in float32 as well: "backbone", "encoder", "decoder".
        top_k: the most detections an image, for post-processing in the file; None: none.
        measure: what else is to stand in the file, such as its AP, by name; what it raises leaves the file unwritten.
        progress: told what is being done.

    Returns:
        What stands in the file.

    Raises:
        ModuleNotFoundError: openvino or nncf is not installed.
        OSError: the file cannot be written, or an image not read.
        TypeError: no ConditionalDETR, or a subclass; no list; an image of an unknown kind.
        ValueError: no image; another suffix; a part that does not exist; a model that was optimised, whose backbone
            cannot be traced, or whose class head does not fit its class names; a file that gives nothing finite.
    """
    check_model(model)
    target = check_request(target, keep)
    if top_k is not None:
        check_count("top_k", top_k)
    _check_list("images", images)
    if not images:
        raise ValueError("images: expected at least one, got none")
    compared = parity_pixels(images[0], model.metadata.preprocessing)
    progress("tracing")
    traced = trace(model, dtype=torch.float32, top_k=top_k)
    network = _quantized(traced, images, model.metadata.preprocessing, keep, progress)
    described = describe(model, ".xml", precision="int8", top_k=top_k)
    versions = {**described.versions, "nncf": version_of("nncf")}
    measured: dict[str, Any] = {"calibration": {"images": len(images), "also in float": sorted(keep)}}
    named = source_name(images[0], "given")
    described = replace(described, versions=versions, image=named, measured=measured)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / target.name
        write_openvino(network, draft, described)
        progress("comparing with the model")
        exported = ExportedModel(draft)
        parity = compare(exported, model, compared)
        check_parity(parity, (float("inf"), 1.0), target)  # that they are finite: how near is for AP to tell
        described = replace(described, parity=parity, measured={**measured, **measure(exported)})
        write_openvino(network, draft, described)
        move(draft, target)
    return described


def check_request(target: str | Path, keep: Sequence[str]) -> Path:
    """Return where to write, if it can be written and the parts to keep are some; errors as of :func:`quantize`."""
    target = Path(target)
    if target.suffix != ".xml":
        raise ValueError(f"{target}: expected a file's name that ends in .xml: int8 is for OpenVINO")
    if find_spec("nncf") is None:
        needs = "needs nncf, not installed here: pip install 'conditional-detr[openvino]'"
        raise ModuleNotFoundError(f"{target}: {needs}")
    _check_list("keep", keep)
    if unknown := [part for part in keep if part not in PARTS]:
        raise ValueError(f"keep: expected some of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
    return checked_target(target)


def _check_list(name: str, given: object) -> None:
    """Raise TypeError for what is no list: a string is a sequence, too."""
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise TypeError(f"{name}: expected a list, got {type(given).__name__}")


def _quantized(
    traced: Traced,
    images: Sequence[ImageSource],
    preprocessing: Preprocessing,
    keep: Sequence[str],
    progress: Callable[[str], None],
) -> Any:
    """Return a network whose operations read and write integers, but for those that are kept."""
    import nncf

    looks = count()

    def feed(numbered: tuple[int, ImageSource]) -> dict[str, ndarray]:
        again, place = divmod(next(looks), len(images))
        progress(f"measuring ranges, pass {again + 1}: {place + 1} of {len(images)} images")
        number, image = numbered
        pixels = to_pixels(open_image(image, f"images[{number}]"), preprocessing)[None]
        return feeds(pixels, with_sizes=SIZES in traced.inputs)

    network = openvino_network(traced)
    with _in_silence():
        return nncf.quantize(
            network,
            nncf.Dataset(list(enumerate(images)), feed),
            preset=nncf.QuantizationPreset.MIXED,  # zero need not be in the middle: as fast here, and AP is higher
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=_names_of_kept(network, traced, keep)),
        )


@contextlib.contextmanager
def _in_silence() -> Iterator[None]:
    """Let nncf neither draw its bars nor tell what it does; there is a progress of ours."""
    from nncf.common.logging.track_progress import track

    logger = logging.getLogger("nncf")
    level, drawn = logger.level, track.__init__
    logger.setLevel(logging.ERROR)
    track.__init__ = lambda self, *given, **named: drawn(self, *given, **{**named, "disable": True})
    try:
        yield
    finally:
        track.__init__ = drawn
        logger.setLevel(level)


def _names_of_kept(network: Any, traced: Traced, keep: Sequence[str]) -> list[str]:
    """Return OpenVINO's names of all that stays in float: what is neither the backbone's nor a linear layer to round."""
    rounded = set() if "backbone" in keep else _names_in_backbone(network)
    linear = _names_of_linear(traced, keep)
    operations = [one for one in network.get_ordered_ops() if one.get_type_name() != "Constant"]
    names = [one.get_friendly_name() for one in operations]
    return [name for name in names if name not in rounded and name.split("/")[0] not in linear]


def _names_in_backbone(network: Any) -> set[str]:
    """Return OpenVINO's names of what to round in the backbone, which ends in the last convolution, the projection."""
    found: set[str] = set()
    left = [one for one in network.get_ordered_ops() if one.get_type_name() == "Convolution"][-1:]
    while left:
        operation = left.pop()
        if operation.get_friendly_name() not in found:
            found.add(operation.get_friendly_name())
            left += [port.get_source_output().get_node() for port in operation.inputs()]
    kept = [one for one in network.get_ordered_ops() if one.get_type_name() in _KEPT_IN_BACKBONE]
    return found.difference(one.get_friendly_name() for one in kept)


def _names_of_linear(traced: Traced, keep: Sequence[str]) -> set[str]:
    """Return torch.export's names of the linear layers to round, with which OpenVINO's of their operations begin.

    torch.export knows the module that an operation comes from. Heads are in neither of the two parts.
    """
    parts = {"encoder", "decoder"}.difference(keep)
    names = set()
    for node in traced.program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0].removeprefix("network.") if stack else ""
        rounded = path.split(".")[0] in parts and not path.startswith(_TRANSFORMATION)
        if node.op == "call_function" and node.name.startswith("linear") and rounded:
            names.add(node.name)
    return names
