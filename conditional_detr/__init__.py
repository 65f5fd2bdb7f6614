"""Conditional DETR (ICCV 2021, arXiv 2108.06152) as a native PyTorch library."""

from conditional_detr.deploy.export import export
from conditional_detr.deploy.optimize import optimize
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.exported import ExportedModel
from conditional_detr.inference.sources import Limits
from conditional_detr.modeling.conditional_detr import AttentionMaps, ConditionalDETR, Config, Output
from conditional_detr.modeling.metadata import Metadata, Preprocessing
from conditional_detr.set_prediction.losses import SetLoss
from conditional_detr.set_prediction.matcher import HungarianMatcher

__all__ = [
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
    "export",
    "optimize",
]
__version__ = "0.1.0"
