"""Compare the outputs of an exported model with those of the original model."""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conditional_detr.inference.exported import ExportedModel, Parity
from conditional_detr.inference.images import open_image
from conditional_detr.inference.preprocessing import to_pixels
from conditional_detr.inference.sources import ImageSource
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import Preprocessing

# Largest allowed differences of logits and boxes; half precision has 11 bits
TOLERANCES = {torch.float32: (1e-4, 1e-5), torch.float16: (0.1, 0.02)}


def parity_pixels(image: ImageSource | None, preprocessing: Preprocessing) -> list[Tensor]:
    """Return pixels (1, 3, H, W) of an image at the size of its preprocessing, and at about half of that size."""
    opened = open_image(_pattern() if image is None else image, "image")
    return [to_pixels(opened, one)[None] for one in (preprocessing, preprocessing.halved())]


def _pattern() -> np.ndarray:
    """Return a pattern of coloured waves and discs, (480, 640, 3) uint8."""
    y, x = np.mgrid[0:480, 0:640] / 100.0
    waves = np.stack([np.sin(x * 2 + y), np.sin(y * 3 - x), np.sin(x * y)], axis=-1)
    discs = (x % 1.6 - 0.8) ** 2 + (y % 1.2 - 0.6) ** 2 < 0.2
    return np.where(discs[..., None], 127 - 100 * waves[..., ::-1], 127 + 100 * waves).astype(np.uint8)


@torch.no_grad()
def compare(exported: ExportedModel, model: DetectionTransformer, images: Sequence[Tensor]) -> tuple[Parity, ...]:
    """Return the differences between an exported model and the original on pixels (1, 3, H, W) of each image."""
    plain = copy.deepcopy(model).cpu().float().eval()
    parity = []
    for pixels in images:
        logits, boxes = (
            (a[-1] - b[-1]).abs().max().item() for a, b in zip(exported(pixels), plain(pixels), strict=True)
        )
        parity.append(Parity(pixels.shape[2], pixels.shape[3], logits, boxes))
    return tuple(parity)


def check_parity(parity: Sequence[Parity], tolerances: Sequence[tuple[float, float]], target: Path) -> None:
    """Raise ValueError unless all differences are finite and within the tolerance of their image."""
    for one, (logits, boxes) in zip(parity, tolerances, strict=True):
        if not (one.logits <= logits and one.boxes <= boxes):
            raise ValueError(
                f"{target}: not written, its output differs from the model's: at {one.height} x {one.width}, expected"
                f" differences of logits and boxes of at most {logits:.2g} and {boxes:.2g},"
                f" got {one.logits:.2g} and {one.boxes:.2g}; compare on an image like those that the model is for"
                " (image, --image), or allow more (tolerance, --tolerance)"
            )


def tolerances_of(
    parity: Sequence[Parity], model: DetectionTransformer, images: Sequence[Tensor], limits: tuple[float, float]
) -> list[tuple[float, float]]:
    """Return the largest allowed differences of logits and boxes for each image.

    They are the given limits; or three times what rounding to float32 alone changes in the model on this image, where
    that is more. A model of which few parts are trained rounds more on a pattern that it has never seen.
    """
    exceeded = any(one.logits > limits[0] or one.boxes > limits[1] for one in parity)
    if not exceeded:
        return [limits] * len(parity)
    plain = copy.deepcopy(model).cpu().float().eval()
    exact = copy.deepcopy(plain).double()
    tolerances = []
    with torch.no_grad():
        for pixels in images:
            outputs = zip(plain(pixels), exact(pixels.double()), limits, strict=True)
            logits, boxes = (max(limit, 3 * (a[-1] - b[-1]).abs().max().item()) for a, b, limit in outputs)
            tolerances.append((logits, boxes))
    return tolerances
