"""Compute the generalised IoU of boxes, element by element or for all pairs.

Boxes are x0 y0 x1 y1, in any unit; ``torchvision.ops.box_convert`` converts from and to cx cy w h.
"""

import torch
from torch import Tensor

from conditional_detr.modeling.layers import at_least_float32

SMALLEST_AREA = 1e-12  # a millionth of the image's sides, the resolution of corners in float32


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute GIoU = I / U - (H - U) / H of boxes a and b, from intersection I, union U and enclosing box H.

    Leading dimensions broadcast: (K, 4) with (K, 4) gives K values, (K, 1, 4) with (T, 4) gives K x T values.

    The result and its gradient are always finite: sides below 0 count as 0, and denominators are at least 1e-12, so
    that two boxes without area give -1.

    Args:
        a: (..., 4) x0 y0 x1 y1.
        b: (..., 4) x0 y0 x1 y1.

    Returns:
        (...), in [-1, 1]; float32 or wider.
    """
    ax0, ay0, ax1, ay1 = at_least_float32(a).unbind(-1)
    bx0, by0, bx1, by1 = at_least_float32(b).unbind(-1)
    intersection = _area(torch.max(ax0, bx0), torch.max(ay0, by0), torch.min(ax1, bx1), torch.min(ay1, by1))
    union = _area(ax0, ay0, ax1, ay1) + _area(bx0, by0, bx1, by1) - intersection
    hull = _area(torch.min(ax0, bx0), torch.min(ay0, by0), torch.max(ax1, bx1), torch.max(ay1, by1))
    return intersection / union.clamp(min=SMALLEST_AREA) + union / hull.clamp(min=SMALLEST_AREA) - 1


def _area(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor) -> Tensor:
    """Return the area of boxes; 0 for a box with corners in the wrong order."""
    return (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)
