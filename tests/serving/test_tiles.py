"""Tiles and augmentation in the service: the detections are those of ``Detector`` with the same options."""

import io
import json
import threading
import time
import weakref

import pytest
import torch
from PIL import Image

from conditional_detr import Detector
from conditional_detr.inference.tiling import ImageViews
from conditional_detr.serving.service import DetectionService
from conditional_detr.serving.settings import ServiceSettings
from helpers.browser import png
from helpers.serving import data_uri, drawn, post, request, served

IMAGE = drawn(1, (300, 400))
CASES = {
    "tile": {"tile": 192},
    "height and width": {"tile": [160, 256], "overlap": 0.5},
    "augment": {"augment": True},
    "both": {"tile": 256, "augment": True, "threshold": 0.3, "top_k": 3},
}


@pytest.fixture(scope="module")
def detector():
    return Detector.from_pretrained("shapes")


def expected(detector, options):
    tile = options.get("tile")
    asked = {**options, "tile": tuple(tile) if isinstance(tile, list) else tile}
    return [(name, score, box) for box, score, name in detector(IMAGE, **asked)]


def assert_equal(found, expected):
    """Up to the rounding of batches of other sizes."""
    assert [one["label"] for one in found] == [name for name, *_ in expected]
    assert [one["score"] for one in found] == pytest.approx([score for _, score, _ in expected], abs=1e-4)
    boxes = [list(one["box"].values()) for one in found]
    torch.testing.assert_close(torch.tensor(boxes), torch.tensor([box for *_, box in expected]), atol=0.05, rtol=0)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_all_endpoints_take_the_options(service, detector, options):
    detections = expected(detector, options)
    assert len(detections) > 1
    query = "&".join(
        f"{name}={value}"
        for name, values in options.items()
        for value in (values if isinstance(values, list) else [values])
    )
    assert_equal(request(service, "POST", f"/v1/detect?{query}", png(IMAGE), "image/png").json, detections)
    body = {"inputs": data_uri(IMAGE), "parameters": options}
    assert_equal(post(service, "/v1/detect", body).json, detections)
    image = {"type": "image_url", "image_url": {"url": data_uri(IMAGE)}}
    for parts, more in (([image], options), ([image, {"type": "text", "text": json.dumps(options)}], {})):
        answer = post(service, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], **more})
        assert answer.status == 200, answer.body
        assert_equal(answer.json["detections"], detections)
    given = {"input": [{"type": "image_url", "url": data_uri(IMAGE)}], **options}
    boxes = post(service, "/v1/infer", given).json["data"][0]["bounding_boxes"]
    assert sum(map(len, boxes.values())) == len(detections)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"tile": 31}, "bad_option", "tile: expected sides of at least 32 pixels, got 31"),
        ({"tile": [64, 64, 64]}, "bad_option", "tile: expected an int, or height and width, got (64, 64, 64)"),
        ({"tile": []}, "bad_option", "tile: expected an int, or height and width, got ()"),
        ({"tile": 64, "overlap": 0.6}, "bad_option", "overlap: expected a fraction above 0 and up to 0.5, got 0.6"),
        ({"overlap": 0.2}, "bad_option", "overlap: expected a tile with it, got 0.2 alone"),
        ({"tile": "64"}, "invalid_request", "tile"),
        ({"tile": True}, "invalid_request", "tile"),
        ({"augment": 1.5}, "invalid_request", "augment"),
        ({"augment": "yes"}, "invalid_request", "augment"),
        ({"augment": True, "top_k": 301}, "bad_option", "top_k: expected at most 300 with tile or augment, got 301"),
        ({"tile": [1] * 9999}, "bad_option", "tile: expected an int, or height and width, got (1, 1"),
    ],
)
def test_options_that_are_wrong(service, options, code, message):
    answer = post(service, "/v1/detect", {"inputs": data_uri(IMAGE), "parameters": options})
    assert (answer.status, answer.error["code"]) == (400, code)
    assert message in answer.error["message"]
    assert answer.error["param"].split(".")[-1] in (*options, "parameters", "int")
    assert len(answer.error["message"]) < 200


def test_too_many_tiles_are_refused(service):
    """Of 32 pixels with half of it shared, the image has 18 x 24; the limit counts augmentation, too."""
    answer = post(service, "/v1/detect", {"inputs": data_uri(IMAGE), "parameters": {"tile": 32, "overlap": 0.5}})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (413, "too_many_tiles", "tile")
    assert answer.error["message"] == "image: expected at most 64 tiles and other views, got 432"
    parameters = {"tile": 100, "augment": True}  # 4 x 5, four times
    answer = post(service, "/v1/detect", {"inputs": data_uri(IMAGE), "parameters": parameters})
    assert answer.error["message"].endswith("got 80")
    several = {"input": [{"type": "image_url", "url": data_uri(IMAGE)}] * 4, "tile": 100}  # 20 each
    answer = post(service, "/v1/infer", several)
    assert (answer.status, answer.error["code"]) == (413, "too_many_tiles")
    assert answer.error["message"].endswith(": expected at most 16 tiles and other views, got 20")


def test_others_do_not_wait_for_all_tiles(detector, monkeypatch):
    """Batches of one: an image that comes while the first of 20 tiles runs is run before most of them."""
    sizes, answers = [], []
    began, go_on = threading.Event(), threading.Event()
    run_batch = detector.run_batch

    def run(group, *arguments):
        sizes.append(group[0].size)
        began.set()
        assert go_on.wait(20)
        return run_batch(group, *arguments)

    def ask(query, image):
        answers.append(request(service, "POST", f"/v1/detect{query}", png(image), "image/png").status)

    def queued():
        return {key[1] for batcher in service.gate.service._batchers for key in batcher._groups}

    with served({"shapes": detector}, ServiceSettings(max_batch=1)) as service:
        monkeypatch.setattr(detector, "run_batch", run)
        threads = [threading.Thread(target=ask, args=("?tile=100", IMAGE))]
        threads[0].start()
        assert began.wait(20)
        threads.append(threading.Thread(target=ask, args=("", drawn(2, (96, 120)))))
        threads[1].start()
        deadline = time.monotonic() + 20
        while len(queued()) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        go_on.set()
        for thread in threads:
            thread.join(60)
        counted = request(service, "GET", "/metrics").body.decode()
    assert answers == [200, 200]
    assert len(sizes) == 21
    assert sizes.index((96, 120)) < 5
    assert 'conditional_detr_images_total{model="shapes"} 2.0' in counted


def test_a_long_narrow_image_is_refused_soon(service):
    """Millions of tiles are counted, not listed: the service answers others meanwhile."""
    file = io.BytesIO()
    Image.new("1", (60_000_000, 1)).save(file, "PNG")
    began = time.process_time()
    answer = request(service, "POST", "/v1/detect?tile=32&overlap=0.5", file.getvalue(), "image/png")
    assert (answer.status, answer.error["code"]) == (413, "too_many_tiles")
    assert answer.error["message"].endswith("got 3749999")
    assert time.process_time() - began < 20


def test_thresholds_of_some_classes_are_refused_at_the_start(detector):
    with pytest.raises(ValueError, match="thresholds: expected one for each class that is reported, got none for "):
        DetectionService({"shapes": Detector(detector.model, thresholds={"disc": 0.5})}, ServiceSettings())


def test_few_tiles_are_in_memory(small, monkeypatch):
    """Of more than a hundred: those of two batches, and those that run."""
    alive: weakref.WeakSet = weakref.WeakSet()
    most, shown = 0, 0
    original = ImageViews.prepare

    def prepare(*arguments):
        nonlocal most, shown
        view = original(*arguments)
        alive.add(view.values)
        most, shown = max(most, len(alive)), shown + 1
        return view

    monkeypatch.setattr(ImageViews, "prepare", prepare)
    with served({"small": Detector.from_pretrained(small)}, ServiceSettings(max_batch=2, max_tiles=200)) as service:
        assert request(service, "POST", "/v1/detect?tile=40", png(IMAGE), "image/png").status == 200
    assert shown > 100
    assert most <= 8
