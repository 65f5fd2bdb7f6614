"""Exported models are compared with the model as closely as float32 allows, and no closer."""

from pathlib import Path

import pytest
import torch

from conditional_detr import ConditionalDETR, export
from conditional_detr.deploy.parity import check_parity, parity_pixels, tolerances_of
from conditional_detr.inference.exported import Parity
from conditional_detr.modeling.metadata import Preprocessing

LIMITS = (1e-4, 1e-5)


def test_the_models_own_rounding_is_allowed():
    """Three times the distance between the model in float32 and in float64, where that is above the limit."""
    model = ConditionalDETR.from_pretrained("bccd")
    images = parity_pixels(None, Preprocessing(96, 128))
    close = [Parity(96, 128, 5e-5, 5e-6), Parity(48, 64, 5e-5, 5e-6)]
    assert tolerances_of(close, model, images, LIMITS) == [LIMITS] * 2
    with torch.no_grad():
        exact = [model.double()(pixels.double()) for pixels in images]
        plain = [model.float()(pixels) for pixels in images]
    rounding = [
        tuple((a[-1] - b[-1]).abs().max().item() for a, b in zip(one, other, strict=True))
        for one, other in zip(plain, exact, strict=True)
    ]
    far = [Parity(96, 128, 1.0, 1.0)] * 2
    expected = [(max(1e-9, 3 * logits), max(1e-9, 3 * boxes)) for logits, boxes in rounding]
    found = tolerances_of(far, model, images, (1e-9, 1e-9))
    assert found == [pytest.approx(one, rel=1e-6) for one in expected]
    assert all(1e-7 < logits < 1e-2 and 1e-8 < boxes < 1e-3 for logits, boxes in found)
    assert tolerances_of(far, model, images, (1.5, 0.9)) == [(1.5, 0.9)] * 2


@pytest.mark.parametrize(
    "parity", [Parity(96, 128, 2e-4, 1e-6), Parity(96, 128, 1e-6, 2e-5), Parity(96, 128, 0, float("nan"))]
)
def test_more_is_refused_with_the_way_out(parity):
    with pytest.raises(
        ValueError, match=r"x\.onnx: not written, .* at 96 x 128, .* at most 0\.0001 and 1e-05, .*--tolerance"
    ):
        check_parity([parity], [LIMITS], Path("x.onnx"))
    check_parity([Parity(96, 128, 1e-4, 1e-5)], [LIMITS], Path("x.onnx"))


@pytest.mark.parametrize("tolerance", [0, -1, 2, float("nan")])
def test_tolerances_out_of_range(tiny, tolerance):
    with pytest.raises(ValueError, match="tolerance: expected 0 < tolerance <= 1, got"):
        export(ConditionalDETR.from_pretrained(tiny.folder), "x.onnx", tolerance=tolerance)
