"""Help texts that several commands share, and the detector that ``--weights`` and ``--device`` load."""

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

from conditional_detr.cli.console import AUTO, pick_device

if TYPE_CHECKING:
    from conditional_detr.inference.detector import Detector

WEIGHTS = "A folder, a file, the name of shipped weights, a hub id 'owner/name', or an exported .onnx, .xml or .pt2."
SOURCE = "Checkpoint: a folder, a file, the name of shipped weights, or a hub id 'owner/name'."
REVISION = "Branch, tag or commit on the hub."
TOP_K = "Include post-processing that keeps this many detections per image."
BATCH_SIZE = "Run at most this many images of one shape together."
BATCH_SIZE_DEFAULT = "8, on a CPU fewer large ones"
OVERWRITE = "Replace existing files."
FAST_PREPROCESSING = (
    "Resize by torchvision: faster, pixels differ by rounding; large JPEG files are reduced while decoded."
)
ROTATED = "Where attributes rotate a box: 'box' before the rotation, or the upright 'hull' around the rotated one."
DEVICE = "cpu, cuda, cuda:1 or mps. With 'auto', exported models run on the CPU."


class RotatedBoxes(str, Enum):
    """Boxes to use of annotations whose attributes rotate them."""

    BOX = "box"
    HULL = "hull"


class EngineChoice(str, Enum):
    """What runs the model on a video."""

    AUTO = "auto"
    TORCH = "torch"
    OPENVINO = "openvino"
    ONNX = "onnx"


def open_detector(weights: str, device: str, *, fast_preprocessing: bool = False) -> "Detector":
    """Load a checkpoint or an exported model; fast preprocessing is that of the backend "torchvision".

    Raises:
        OSError, ValueError: as ``Detector.from_pretrained`` and ``Detector.from_file``.
    """
    from conditional_detr.inference.detector import Detector
    from conditional_detr.inference.exported import is_exported

    if is_exported(weights):
        detector = Detector.from_file(weights, device="cpu" if device == AUTO else pick_device(device))
    else:
        detector = Detector.from_pretrained(weights, device=pick_device(device))
    if fast_preprocessing:
        metadata = detector.model.metadata
        preprocessing = replace(metadata.preprocessing, backend="torchvision")
        detector.model.metadata = replace(metadata, preprocessing=preprocessing)
    return detector
