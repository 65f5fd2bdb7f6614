"""Conditional DETR (ICCV 2021, arXiv 2108.06152) as a native PyTorch library."""

from conditional_detr.deploy.export import export
from conditional_detr.deploy.optimize import optimize
from conditional_detr.detections import Detections
from conditional_detr.detector import Detector
from conditional_detr.exported import ExportedModel
from conditional_detr.losses import SetLoss
from conditional_detr.matcher import HungarianMatcher
from conditional_detr.metadata import Metadata, Preprocessing
from conditional_detr.model import AttentionMaps, ConditionalDETR, Config, Output
from conditional_detr.sources import Limits

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
