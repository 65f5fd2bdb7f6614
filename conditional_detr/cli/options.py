"""Help texts that several commands share, and the detector that ``--weights`` and ``--device`` load."""

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conditional_detr.cli.console import AUTO, pick_device

if TYPE_CHECKING:
    from conditional_detr.inference.detector import Detector

WEIGHTS = "A folder, a file, the name of shipped weights, a hub id 'owner/name', or an exported .onnx, .xml or .pt2."
SOURCE = "Checkpoint: a folder, a file, the name of shipped weights, or a hub id 'owner/name'."
REVISION = "Branch, tag or commit on the hub."
TOP_K = "Include post-processing that keeps this many detections per image."
BATCH_SIZE = "Run at most this many images of one shape together."
BATCH_SIZE_DEFAULT = "8, on a CPU fewer large ones"
THRESHOLDS = "JSON file with a threshold for each class, as analyse writes it."
STORED_THRESHOLDS = "JSON file with a threshold for each class, to store for detect, video and serve."
OVERWRITE = "Replace existing files."
FAST_PREPROCESSING = (
    "Resize by torchvision: faster, pixels differ by rounding; large JPEG files are reduced while decoded."
)
ROTATED = "Where attributes rotate a box: 'box' before the rotation, or the upright 'hull' around the rotated one."
DEVICE = "cpu, cuda, cuda:1 or mps. With 'auto', exported models run on the CPU."
CACHE = "Decode each training image once: 'ram' keeps all in memory, 'disk' in ~/.cache/conditional_detr."


DATA = "Dataset: COCO, YOLO, Pascal VOC or Hugging Face, as a folder or its JSON or YAML file."
TRAINING_DATA = "Dataset: COCO, YOLO, Pascal VOC or Hugging Face; or Parquet files, also by URI."
IMAGES = "Image folder, where --data does not lead to it."
FORMAT = "Format of --data: coco, yolo, voc, voc-devkit (pixels count from 1) or huggingface."
RESULTS = "COCO results file, or what detect wrote: a folder or .jsonl file. Nothing is detected then."
SPLIT_NAME = "Split of --data to use, if it has several."
SHARES = "Split --data at random into train, val and test: 0.8/0.1/0.1."


class DataFormat(str, Enum):
    """Formats of annotations."""

    COCO = "coco"
    YOLO = "yolo"
    VOC = "voc"
    VOC_DEVKIT = "voc-devkit"
    HUGGINGFACE = "huggingface"


def check_one_threshold(threshold: float | None, thresholds: Path | None) -> None:
    """Raise ValueError if there are both a threshold for all classes and a file with one for each."""
    if threshold is not None and thresholds is not None:
        raise ValueError("expected --threshold or --thresholds, got both")


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


def open_detector(
    weights: str, device: str, *, fast_preprocessing: bool = False, thresholds: Path | None = None
) -> "Detector":
    """Load a checkpoint or an exported model; fast preprocessing is that of the backend "torchvision".

    ``thresholds`` is a file with a threshold for each class.

    Raises:
        OSError, ValueError: as ``Detector.from_pretrained``, ``Detector.from_file`` and ``read_thresholds``; or the
            thresholds are of other classes than the model's.
    """
    from conditional_detr.inference.detector import Detector
    from conditional_detr.inference.exported import is_exported
    from conditional_detr.inference.thresholds import check_thresholds, read_thresholds

    of_classes = None if thresholds is None else read_thresholds(thresholds)  # before the model is loaded
    if is_exported(weights):
        detector = Detector.from_file(weights, device="cpu" if device == AUTO else pick_device(device))
    else:
        detector = Detector.from_pretrained(weights, device=pick_device(device))
    if fast_preprocessing:
        metadata = detector.model.metadata
        preprocessing = replace(metadata.preprocessing, backend="torchvision")
        detector.model.metadata = replace(metadata, preprocessing=preprocessing)
    if of_classes is not None:
        detector.thresholds = check_thresholds(of_classes, str(thresholds), detector.model.metadata.class_names)
    return detector


def refuse_with_parquet(**options: Any) -> None:
    """Raise ValueError if an option, by its name, has a value that Parquet files have no use for."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name}: expected none for Parquet files, got {value}")
