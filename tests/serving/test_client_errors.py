"""Errors as openai's client raises them: class, status, message, code and type; nothing is asked twice in vain."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from conditional_detr import ConditionalDETR, Detector
from conditional_detr.serving import ServiceSettings
from conditional_detr.serving.keys import ApiKeys
from helpers.browser import png
from helpers.serving import base64_of, data_uri, drawn, post, request, served

IMAGE = data_uri(drawn(1, (96, 120)))
KEY = "key-of-the-tests"


@pytest.fixture(scope="module")
def guarded(small, tmp_path_factory):
    """A service with a key, low limits, and a model whose outputs are no numbers."""
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text(f"{KEY}\n")
    broken = ConditionalDETR.from_pretrained(small)
    torch.nn.init.constant_(broken.class_head.bias, float("nan"))
    models = {"a/b": Detector.from_pretrained(small), "broken": Detector(broken)}
    settings = ServiceSettings(max_body=300_000, max_bodies=300_000, max_images=3, max_pixels=40_000)
    with served(models, settings, keys=ApiKeys(path), licences={"a/b": "mit"}) as running:
        yield running


@pytest.fixture(scope="module")
def client(guarded):
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def chat(client, *parts, model="a/b", **options):
    """Send image URLs, or whole parts, as a chat."""
    content = [{"type": "image_url", "image_url": {"url": part}} if isinstance(part, str) else part for part in parts]
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, extra_body=options)


def text(content):
    return {"type": "text", "text": content}


BAD_REQUESTS = {
    "no image": ([text("a cat")], {}, "no_image", None, "expected at least one image, got none"),
    "a text file": (["bm8gaW1hZ2U="], {}, "invalid_image", "image", "image: expected an image, got a text file"),
    "no base64": (["/etc/passwd!"], {}, "invalid_image", "image", "got '/etc/passwd!'"),
    "a path": (["file:///etc/passwd"], {}, "invalid_image", "image", "got 'file:///etc/passwd'"),
    "the second image": ([IMAGE, "data:,"], {}, "invalid_image", "images[1]", "images[1]: expected"),
    "a URL": (["https://example.org/a.png"], {}, "url_refused", "image", "is not allowed"),
    "no URL": ([{"type": "image_url", "image_url": {}}], {}, "invalid_image", "messages[0].content[0]", "expected a"),
    "another part": (
        [{"type": "input_audio"}],
        {},
        "bad_part",
        "messages[0].content[0]",
        "messages[0].content[0]: expected a part of type text or image_url, got 'input_audio'",
    ),
    "threshold": ([IMAGE], {"threshold": 1.5}, "bad_option", "threshold", "threshold: expected 0..1, got 1.5"),
    "text as threshold": ([IMAGE], {"threshold": "0.5"}, "invalid_request", "threshold", "got '0.5'"),
    "true as threshold": ([IMAGE], {"threshold": True}, "invalid_request", "threshold", "got True"),
    "top_k": ([IMAGE], {"top_k": 0}, "bad_option", "top_k", "top_k: expected"),
    "a fraction as top_k": ([IMAGE], {"top_k": 1.5}, "invalid_request", "top_k", "got 1.5"),
    "a fraction as class": ([IMAGE], {"classes": [1.0]}, "invalid_request", "classes", "got 1.0"),
    "one class": ([IMAGE], {"classes": "LABEL_1"}, "invalid_request", "classes", "got 'LABEL_1'"),
    "an unknown class": ([IMAGE], {"classes": ["unicorn"]}, "bad_option", "classes", "got 'unicorn'; the names are"),
    "an unknown row": ([IMAGE], {"classes": [99]}, "bad_option", "classes", "got 99"),
    "a contradiction": (
        [IMAGE, text('{"threshold": 0.4}')],
        {"threshold": 0.5},
        "bad_option",
        "threshold",
        "threshold: got 0.5 and, in messages[0].content[1], 0.4",
    ),
    "an option in a text part": ([IMAGE, text('{"top_k": "5"}')], {}, "invalid_request", "top_k", "got '5'"),
}


@pytest.mark.parametrize(("parts", "options", "code", "param", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_requests(client, parts, options, code, param, message):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, *parts, **options, stream=stream)
        error = caught.value
        assert (error.status_code, error.code, error.param) == (400, code, param)
        assert error.type == "invalid_request_error"
        assert message in error.body["message"]
        assert error.request_id == error.response.headers["x-request-id"]
        assert "retry-after" not in error.response.headers


def test_a_text_that_says_whether_to_stream(client):
    """As OpenAI's API: true, false or null."""
    with pytest.raises(openai.BadRequestError, match=r"stream: .*got 'yes'"):
        chat(client, IMAGE, stream="yes")
    assert chat(client, IMAGE, stream=None).choices


@pytest.mark.parametrize("path", ["chat/completions", "responses", "infer", "detect"])
@pytest.mark.parametrize("body", [b"", b'{"messages": [', b"[1", b"\xff{}", b"nonsense"])
def test_bad_json(client, guarded, path, body):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(
            f"/{path}", content=body, cast_to=object, options={"headers": {"content-type": "application/json"}}
        )
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code in ("invalid_json", "invalid_request")
    assert caught.value.body["message"]


@pytest.mark.parametrize("body", [[], "text", 1, None, {"messages": "text"}, {"messages": [1]}, {"messages": [{}]}])
def test_json_of_another_shape(guarded, body):
    for path in ("chat/completions", "responses", "infer", "detect"):
        answer = post(guarded, f"/v1/{path}", body, authorization=f"Bearer {KEY}")
        assert answer.status == 400
        assert answer.error.keys() == {"message", "type", "param", "code"}
        assert answer.error["code"] == "invalid_request"


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], f"{KEY}0"])
def test_wrong_keys(guarded, key):
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0) as client:
        for call in (client.models.list, lambda: chat(client, IMAGE)):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")
            assert caught.value.response.headers["www-authenticate"] == "Bearer"
            assert caught.value.request_id


def test_unknown_models_and_endpoints(client, guarded):
    for call in (lambda: chat(client, IMAGE, model="gpt"), lambda: client.models.retrieve("gpt")):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        assert caught.value.body["message"] == "model: expected one of a/b, broken, got 'gpt'"
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings") as caught:
        client.embeddings.create(model="a/b", input="text")
    assert (caught.value.code, caught.value.type) == ("not_found", "not_found_error")
    answer = request(guarded, "POST", "/v1/models", authorization=f"Bearer {KEY}")
    assert (answer.status, answer.headers["allow"], answer.error["code"]) == (405, "GET", "method_not_allowed")


def test_a_name_with_a_slash(client):
    model = client.models.retrieve("a/b")
    assert (model.id, model.model_extra["licence"]) == ("a/b", "mit")
    assert chat(client, IMAGE, model="a/b").model == "a/b"
    assert [model.id for model in client.models.list()] == ["a/b", "broken"]


def test_too_large(client):
    tests = {
        "body_too_large": [data_uri(drawn(1)) + "A" * 300_000],
        "image_too_large": [data_uri(drawn(1, (240, 200)))],
        "too_many_images": [IMAGE] * 4,
    }
    messages = ["300000 bytes", "40000 pixels, got 200 x 240", "at most 3 images in a request, got 4"]
    for (code, parts), message in zip(tests.items(), messages, strict=True):
        with pytest.raises(openai.APIStatusError, match=message) as caught:
            chat(client, *parts)
        assert (caught.value.status_code, caught.value.code) == (413, code)
        assert caught.value.type == "invalid_request_error"


def test_other_types_of_bodies(client, guarded):
    for path in ("chat/completions", "responses", "infer", "detect"):
        with pytest.raises(openai.APIStatusError, match="got 'text/plain'") as caught:
            client.post(f"/{path}", content=b"{}", cast_to=object, options={"headers": {"content-type": "text/plain"}})
        assert (caught.value.status_code, caught.value.code) == (415, "unsupported_type")


def test_an_image_that_the_model_cannot_process(client):
    with pytest.raises(openai.UnprocessableEntityError, match="image: ") as caught:
        chat(client, IMAGE, model="broken")
    assert (caught.value.code, caught.value.type) == ("not_processable", "invalid_request_error")
    assert caught.value.request_id


def test_the_rate_of_a_key(small, tmp_path):
    """Its own for every key; the client waits as long as it is told, and then succeeds."""
    keys = tmp_path / "keys.txt"
    keys.write_text("0123456789abcdef\n0123456789ABCDEF\n")
    settings = ServiceSettings(rate_limit="2/second")
    with served({"a/b": Detector.from_pretrained(small)}, settings, keys=ApiKeys(keys)) as service:

        def ask(key, retries):
            with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=retries) as client:
                return chat(client, IMAGE)

        ask("0123456789abcdef", 0)
        ask("0123456789abcdef", 0)
        with pytest.raises(openai.RateLimitError) as caught:
            ask("0123456789abcdef", 0)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert caught.value.body["message"] == "expected at most 2 per 1 second for this key, got more"
        assert caught.value.response.headers["retry-after"] == "1"
        ask("0123456789ABCDEF", 0)
        ask("0123456789abcdef", 1)


def test_a_full_service(small):
    detector, begun, release = Detector.from_pretrained(small), threading.Event(), threading.Event()
    prepare = detector.prepare

    def wait(*image, **options):
        begun.set()
        assert release.wait(30)
        return prepare(*image, **options)

    with (
        served({"a/b": detector}, ServiceSettings(max_queue=1)) as service,
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="-", max_retries=0) as client,
    ):
        chat(client, IMAGE)
        detector.prepare = wait
        with ThreadPoolExecutor(1) as other:
            first = other.submit(chat, client, IMAGE)
            assert begun.wait(30)  # a request in progress may still be without the place that it takes
            with pytest.raises(openai.InternalServerError) as caught:
                chat(client, IMAGE)
            error = caught.value
            assert client.models.list().data  # what costs nothing is answered
            release.set()
            assert first.result().choices
        assert (error.status_code, error.code, error.type) == (503, "overloaded", "overloaded_error")
        assert error.response.headers["retry-after"] == "1"
        assert error.response.headers["x-should-retry"] == "true"
        assert error.request_id


def test_a_fault_is_logged_and_not_repeated(small, caplog):
    """With the request's id, and without the fault's text in the answer."""
    detector = Detector.from_pretrained(small)
    with served({"a/b": detector}) as service, caplog.at_level(logging.INFO, "conditional_detr.serving"):
        detector.prepare = lambda *_, **__: 1 / 0
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="-", max_retries=2) as client:
            caplog.clear()
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(
                    model="a/b",
                    messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}],
                    extra_headers={"x-request-id": "my-own.id_1"},
                )
    assert caught.value.body == {
        "message": "the service failed",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert caught.value.request_id == "my-own.id_1"
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == "conditional_detr.serving"]
    assert (line["request_id"], line["status"], line["route"]) == ("my-own.id_1", 500, "/v1/chat/completions")
    assert "ZeroDivisionError" in line["error"]
    assert IMAGE[-40:] not in line["error"]


def test_an_id_of_a_stranger_is_replaced_if_it_could_harm_the_log(guarded):
    for given in ("x" * 65, 'a"b', "a b", "{}"):
        answer = request(guarded, "GET", "/health/live", x_request_id=given)
        assert answer.headers["x-request-id"] not in (given, "")


def test_detect_has_the_same_errors(guarded):
    image = png(drawn(1, (96, 120)))
    encoded = base64_of(drawn(1, (96, 120)))
    key = {"authorization": f"Bearer {KEY}"}
    for query, code, message in (
        ("theshold=1", "bad_option", "expected the query parameters augment, classes, format, model, overlap"),
        ("threshold=nan", "bad_option", "threshold: expected 0..1, got nan"),
        ("threshold=x", "invalid_request", "threshold: Input should be a valid number"),
        ("format=xml", "invalid_request", "format: Input should be 'json' or 'image', got 'xml'"),
        ("classes=unicorn", "bad_option", "got 'unicorn'"),
    ):
        answer = request(guarded, "POST", f"/v1/detect?{query}", image, "image/png", **key)
        assert (answer.status, answer.error["code"]) == (400, code)
        assert answer.error["message"].startswith(message) or message in answer.error["message"]
    empty = request(guarded, "POST", "/v1/detect", b"", "image/png", **key)
    assert (empty.status, empty.error["code"]) == (400, "no_image")
    for body in ({"inputs": encoded, "parameters": {"theshold": 1}}, {"inputs": encoded, "theshold": 1}, {}):
        assert post(guarded, "/v1/detect", body, **key).status == 400
    missing = request(guarded, "POST", "/v1/attention", image, "image/png", **key)
    assert (missing.status, missing.error["param"], missing.error["message"]) == (
        400,
        "index",
        "index: Field required",
    )
    for index in (-1, 1000):
        beyond = request(guarded, "POST", f"/v1/attention?index={index}", image, "image/png", **key)
        assert (beyond.status, beyond.error["param"]) == (400, "index")


@pytest.mark.parametrize("content", [None, 5, {"type": "input_image"}])
def test_content_that_is_no_list_of_parts_is_not_dropped(small, content):
    """Also if another message has an image."""
    good = {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]}
    with served({"a/b": Detector.from_pretrained(small)}) as service:
        answer = post(service, "/v1/responses", {"input": [good, {"role": "user", "content": content}]})
    assert answer.status == 400
    assert answer.error["param"] == "input[1].content"
    assert answer.error["message"].startswith("input[1].content: expected text or a list of parts, got")
