"""Which model the commands mean: weights of any kind, or an exported file."""

from conditional_detr.cli.console import AUTO, pick_device
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.exported import is_exported

WEIGHTS = "A folder, a file, the name of shipped weights, a hub id 'owner/name', or an exported .onnx, .xml or .pt2."
DEVICE = "Where the model runs: cpu, cuda, cuda:1, mps. Exported files run on the CPU unless this says otherwise."


def open_detector(weights: str, device: str) -> Detector:
    """Open weights or an exported file; errors as of ``Detector.from_pretrained`` and ``Detector.from_file``."""
    if is_exported(weights):
        return Detector.from_file(weights, device="cpu" if device == AUTO else pick_device(device))
    return Detector.from_pretrained(weights, device=pick_device(device))
