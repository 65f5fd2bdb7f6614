"""The plain endpoints: what they answer is what ``Detector`` gives. The documentation of the API works offline."""

import io
import json
import re

import pytest
from PIL import Image

from conditional_detr import Detector
from helpers.browser import CONSOLE_KINDS, detection, png
from helpers.serving import base64_of, data_uri, drawn, post, request

IMAGE = drawn(1)
OPTIONS = {"threshold": 0.1, "top_k": 4, "classes": ["star", "disc"]}
QUERY = "threshold=0.1&top_k=4&classes=star&classes=disc"


@pytest.fixture(scope="module")
def detections():
    return Detector.from_pretrained("shapes")(IMAGE, **OPTIONS)


def as_json(detections):
    return [detection(name, score, *box) for box, score, name in detections]


def form(*files, fields=()):
    """Return a multipart form and its type."""
    parts = [
        f'--limit\r\ncontent-disposition: form-data; name="{name}"; filename="a.png"\r\n\r\n'.encode() + data
        for name, data in files
    ]
    parts += [f'--limit\r\ncontent-disposition: form-data; name="{name}"\r\n\r\nvalue'.encode() for name in fields]
    return b"\r\n".join([*parts, b"--limit--\r\n"]), "multipart/form-data; boundary=limit"


@pytest.mark.parametrize("kind", [None, "image/png", "image/jpeg", "application/octet-stream"])
def test_detect_takes_bytes_of_any_declared_type(service, detections, kind):
    answer = request(service, "POST", f"/v1/detect?{QUERY}", png(IMAGE), kind)
    assert (answer.status, answer.json) == (200, as_json(detections))
    assert answer.headers["content-type"] == "application/json"
    assert len(detections) == 4


def test_detect_takes_a_form_with_one_file(service, detections):
    answer = request(service, "POST", f"/v1/detect?{QUERY}&model=shapes", *form(("file", png(IMAGE))))
    assert (answer.status, answer.json) == (200, as_json(detections))
    for content in (
        form(),
        form(fields=["file"]),
        form(("a", png(IMAGE)), ("b", png(IMAGE))),
        form(("a", png(IMAGE)), fields=["threshold"]),
        form(*[("a", b"")] * 5),
    ):
        answer = request(service, "POST", "/v1/detect", *content)
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("encode", [base64_of, data_uri])
def test_detect_takes_base64_in_json(service, detections, encode):
    inputs = encode(IMAGE)
    answer = post(service, "/v1/detect", {"inputs": inputs, "parameters": OPTIONS, "model": "shapes"})
    assert (answer.status, answer.json) == (200, as_json(detections))
    mixed = post(service, f"/v1/detect?{QUERY}", {"inputs": inputs, "parameters": {"threshold": 0.9}})
    assert mixed.json == as_json(detections)  # the query comes first


def test_detect_draws(service, detections):
    answer = request(service, "POST", f"/v1/detect?{QUERY}&format=image", png(IMAGE), "image/png")
    assert answer.headers["content-type"] == "image/png"
    shown = Image.open(io.BytesIO(answer.body)).convert("RGB")
    assert shown.tobytes() == detections.draw(IMAGE).convert("RGB").tobytes()


def test_infer(service, detections):
    """Relative boxes by label, best first, as NVIDIA documents them."""
    inputs = [{"type": "image_url", "url": data_uri(IMAGE)}, {"type": "image_url", "url": base64_of(drawn(2))}]
    answer = post(service, "/v1/infer", {"input": inputs, **OPTIONS, "model": "shapes"}).json
    boxes = {}
    for (x0, y0, x1, y1), score, name in detections:
        box = {"x_min": x0 / 256, "y_min": y0 / 192, "x_max": x1 / 256, "y_max": y1 / 192, "confidence": score}
        boxes.setdefault(name, []).append(box)
    assert answer["data"][0] == {"index": 0, "bounding_boxes": boxes}
    assert answer["data"][1]["index"] == 1
    size = sum(len(png(image)) for image in (IMAGE, drawn(2))) / 2**20
    assert answer["usage"]["images_size_mb"] == pytest.approx(size, rel=0.02)
    for body in ({"input": []}, {"input": inputs, "treshold": 1}, {"input": [{"type": "audio", "url": ""}]}):
        assert post(service, "/v1/infer", body).status == 400


def test_attention(service):
    detector = Detector.from_pretrained("shapes")
    found = detector(png(IMAGE), threshold=0.1)
    answer = request(service, "POST", "/v1/attention?index=2&threshold=0.1", png(IMAGE), "image/png")
    assert answer.headers["content-type"] == "image/png"
    shown = Image.open(io.BytesIO(answer.body)).convert("RGB")
    assert shown.tobytes() == detector.draw_attention(found, 2).convert("RGB").tobytes()


def test_health_and_metrics(service):
    assert request(service, "GET", "/health/live").json == {"status": "live"}
    assert request(service, "GET", "/health/ready").json == {"status": "ready"}

    def counted():
        text = request(service, "GET", "/metrics").body.decode()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"
        }

    before = counted()
    request(service, "POST", "/v1/detect", png(IMAGE))
    request(service, "POST", "/v1/detect", b"no image")
    after = counted()
    prefix = "conditional_detr_"
    for name, increase in (
        ('requests_total{route="/v1/detect",status="200"}', 1),
        ('requests_total{route="/v1/detect",status="400"}', 1),
        ('request_seconds_count{route="/v1/detect"}', 2),
        ('images_total{model="shapes"}', 1),
        ('batch_size_count{model="shapes"}', 1),
        ('batch_size_bucket{le="1.0",model="shapes"}', 1),
        ('model_seconds_count{model="shapes"}', 1),
    ):
        assert after[prefix + name] - before.get(prefix + name, 0) == increase, name
    assert after[f"{prefix}requests_in_progress"] == 1  # this one


def test_the_description_of_the_api_is_valid_and_complete(service):
    from fastapi.openapi.models import OpenAPI

    from conditional_detr.serving.gate import ROUTES

    content = request(service, "GET", "/openapi.json").body
    schema = json.loads(content)
    OpenAPI.model_validate(schema)
    hidden = {"/", "/docs", "/openapi.json"}
    assert schema["paths"].keys() == {*(ROUTES - hidden), "/v1/models/{name}"}
    for reference in re.findall(r'"\$ref":\s*"([^"]*)"', content.decode()):
        target = schema
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), path
            assert ("requestBody" in operation) == (method == "post")
            assert "422" not in operation["responses"]  # the framework's own error, which is never answered


def test_the_documentation_of_the_api_needs_no_other_host(service, browser):
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(10_000)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: faults.append(message.text) if message.type in CONSOLE_KINDS else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(f"{service.url}/docs")
    page.locator("#operations-default-detect_v1_detect_post").wait_for()
    page.locator("#operations-default-detect_v1_detect_post button").first.click()
    page.get_by_role("button", name="Try it out").wait_for()
    context.close()
    assert len(asked) > 2
    assert [url for url in asked if not url.startswith((f"{service.url}/", "data:", "blob:"))] == []
    assert faults == []
