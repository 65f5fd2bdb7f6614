"""Conditional DETR (ICCV 2021, arXiv 2108.06152) as a native PyTorch library."""

from conditional_detr.model import ConditionalDETR, Config, Output

__all__ = ["ConditionalDETR", "Config", "Output"]
__version__ = "0.1.0"
