"""Conditional DETR (ICCV 2021, arXiv 2108.06152) as a native PyTorch library.

Public names are loaded on first use: importing the package alone imports neither torch nor torchvision.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conditional_detr.checkpoints.loading import from_pretrained
    from conditional_detr.deploy.export import export
    from conditional_detr.deploy.optimize import optimize
    from conditional_detr.deploy.quantize import quantize
    from conditional_detr.inference.detections import Detections
    from conditional_detr.inference.detector import Detector
    from conditional_detr.inference.downloads import Limits
    from conditional_detr.inference.exported import ExportedModel
    from conditional_detr.inference.url_guard import UrlGuard
    from conditional_detr.modeling.conditional_detr import ConditionalDETR
    from conditional_detr.modeling.config import Config
    from conditional_detr.modeling.detection_transformer import AttentionMaps, Output
    from conditional_detr.modeling.detr import DETR
    from conditional_detr.modeling.metadata import Metadata, Preprocessing
    from conditional_detr.set_prediction.losses import SetLoss
    from conditional_detr.set_prediction.matcher import HungarianMatcher

__version__ = "0.1.0"
__all__ = [
    "DETR",
    "AttentionMaps",
    "ConditionalDETR",
    "Config",
    "Detections",
    "Detector",
    "ExportedModel",
    "HungarianMatcher",
    "Limits",
    "Metadata",
    "Output",
    "Preprocessing",
    "SetLoss",
    "UrlGuard",
    "export",
    "from_pretrained",
    "optimize",
    "quantize",
]

_MODULES = {
    "AttentionMaps": "modeling.detection_transformer",
    "DETR": "modeling.detr",
    "ConditionalDETR": "modeling.conditional_detr",
    "Config": "modeling.config",
    "Detections": "inference.detections",
    "Detector": "inference.detector",
    "ExportedModel": "inference.exported",
    "HungarianMatcher": "set_prediction.matcher",
    "Limits": "inference.downloads",
    "Metadata": "modeling.metadata",
    "Output": "modeling.detection_transformer",
    "Preprocessing": "modeling.metadata",
    "SetLoss": "set_prediction.losses",
    "UrlGuard": "inference.url_guard",
    "export": "deploy.export",
    "from_pretrained": "checkpoints.loading",
    "optimize": "deploy.optimize",
    "quantize": "deploy.quantize",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
