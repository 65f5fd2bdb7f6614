"""A detector with thresholds in the service: they are the default of its requests."""

import pytest

from conditional_detr import Detector
from conditional_detr.data.synthetic import CLASS_NAMES
from conditional_detr.serving.settings import ServiceSettings
from helpers.browser import SHAPES
from helpers.serving import request, served


def test_thresholds_are_the_default_of_requests():
    """Of all classes but one nothing is reported, unless the request or the service has a threshold."""
    model = Detector.from_pretrained("shapes").model
    names = {row["label"] for row in _detect(Detector(model))}
    assert len(names) > 1
    chosen = min(names)
    detector = Detector(model, thresholds={**dict.fromkeys(CLASS_NAMES, 1.0), chosen: 0.5})
    assert {row["label"] for row in _detect(detector)} == {chosen}
    assert {row["label"] for row in _detect(detector, "?threshold=0.5")} == names
    assert {row["label"] for row in _detect(detector, settings=ServiceSettings(threshold=0.5))} == names


def _detect(detector, query="", settings=None):
    pytest.importorskip("fastapi")
    with served({"shapes": detector}, settings) as service:
        answer = request(service, "POST", f"/v1/detect{query}", SHAPES, "image/png")
    assert answer.status == 200, answer.body
    return answer.json
