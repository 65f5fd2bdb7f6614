"""Real clients of the service: openai's and huggingface_hub's. What they get is what ``Detector`` gives."""

import asyncio
import json

import huggingface_hub
import openai
import pytest
from pydantic import BaseModel

from conditional_detr import Detector
from helpers.browser import png
from helpers.serving import base64_of, data_uri, drawn

IMAGES = [drawn(1), drawn(2, (240, 200)), drawn(3, (150, 300))]  # each size runs in a batch of its own


class Box(BaseModel):
    xmin: float
    ymin: float
    xmax: float
    ymax: float


class Found(BaseModel):
    image: int
    label: str
    label_id: int
    score: float
    box: Box


class Size(BaseModel):
    width: int
    height: int


class Content(BaseModel):
    detections: list[Found]
    images: list[Size]
    model: str


@pytest.fixture(scope="module")
def detector():
    return Detector.from_pretrained("shapes")


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none is needed", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(detector):
    """The content for some of the images, from the detector."""

    def content(images=IMAGES, **options):
        found = detector(images, **options)
        assert sum(map(len, found)) > 0
        detections = [
            {
                "image": i,
                "label": name,
                "label_id": label,
                "score": score,
                "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)),
            }
            for i, one in enumerate(found)
            for (box, score, name), label in zip(one, one.labels.tolist(), strict=True)
        ]
        sizes = [{"width": image.width, "height": image.height} for image in images]
        return {"detections": detections, "images": sizes, "model": "shapes"}

    return content


def image_part(text):
    return {"type": "image_url", "image_url": {"url": text}}


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def test_a_chat_with_several_images_in_order(client, expected):
    first, second, third = IMAGES
    messages = [
        *user(image_part(data_uri(first)), image_part(base64_of(second))),
        *user({"type": "image_url", "image_url": {"url": data_uri(third), "detail": "high"}}),
    ]
    answer = client.chat.completions.create(model="shapes", messages=messages)
    assert json.loads(answer.choices[0].message.content) == expected()
    assert {name: answer.model_extra[name] for name in ("detections", "images")} == {
        name: expected()[name] for name in ("detections", "images")
    }
    assert "warnings" not in answer.model_extra
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "shapes", "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 0, 3)
    assert answer._request_id


def test_options_at_the_top_and_in_a_text_part_are_the_same(client, expected):
    options = {"threshold": 0.1, "top_k": 3, "classes": ["star", 0]}
    part = image_part(data_uri(IMAGES[0]))
    top = client.chat.completions.create(model="shapes", messages=user(part), extra_body=options)
    text = client.chat.completions.create(
        model="shapes", messages=user({"type": "text", "text": json.dumps(options)}, part)
    )
    both = client.chat.completions.create(
        model="shapes",
        messages=user(part, {"type": "text", "text": '{"top_k": 3, "classes": ["star", 0]}'}),
        extra_body={"threshold": 0.1, "top_k": 3},
    )
    for answer in (top, text, both):
        content = json.loads(answer.choices[0].message.content)
        assert content == expected(IMAGES[:1], **options)
        assert {found["label"] for found in content["detections"]} <= {"star", "disc"}
        assert "warnings" not in answer.model_extra


def test_what_is_ignored_is_said_in_warnings(client, expected):
    messages = [
        {"role": "system", "content": "You detect objects."},
        *user({"type": "text", "text": "Which shapes?"}, image_part(data_uri(IMAGES[0]))),
        *user({"type": "text", "text": '{"treshold": 0.2}'}),
    ]
    answer = client.chat.completions.create(model="shapes", messages=messages, temperature=0)
    assert json.loads(answer.choices[0].message.content) == expected(IMAGES[:1])
    temperature, system, text, option = answer.model_extra["warnings"]
    assert temperature == "ignored: temperature"
    assert system == "messages[0]: ignored: only messages of the role 'user' are read"
    assert text == "messages[1].content[0]: ignored: text is read only if it is a JSON object with options"
    assert option == "messages[2].content[0]: ignored: treshold"


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_chat_is_one_chunk_the_stop_chunk_and_the_end(client, service, expected, usage):
    options = {"stream_options": {"include_usage": True}} if usage else {}
    arguments = {"model": "shapes", "messages": user(image_part(data_uri(IMAGES[0]))), "stream": True, **options}
    first, stop, *last = client.chat.completions.create(**arguments)
    assert json.loads(first.choices[0].delta.content) == expected(IMAGES[:1])
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].finish_reason is None
    assert (stop.choices[0].delta.content, stop.choices[0].finish_reason) == (None, "stop")
    assert {chunk.id for chunk in (first, stop, *last)} == {first.id}
    assert [(chunk.choices, chunk.usage.prompt_tokens) for chunk in last] == ([([], 1)] if usage else [])
    with client.chat.completions.with_streaming_response.create(**arguments) as raw:
        events = [line for line in raw.iter_lines() if line]
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert len(events) == 3 + usage
    assert events[-1] == "data: [DONE]"


def test_parse_fills_a_model_of_the_content(client, expected):
    messages = user(image_part(data_uri(IMAGES[0])), image_part(data_uri(IMAGES[1])))
    wanted = Content.model_validate(expected(IMAGES[:2]))
    for chat in (client.chat, client.beta.chat):
        answer = chat.completions.parse(model="shapes", messages=messages, response_format=Content)
        assert answer.choices[0].message.parsed == wanted
        assert "warnings" not in answer.model_extra
    with client.chat.completions.stream(model="shapes", messages=messages, response_format=Content) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == wanted
    answer = client.chat.completions.create(model="shapes", messages=messages, response_format={"type": "json_object"})
    assert Content.model_validate_json(answer.choices[0].message.content) == wanted


def test_responses(client, expected):
    image = {"type": "input_image", "image_url": data_uri(IMAGES[0]), "detail": "auto"}
    messages = user({"type": "input_text", "text": '{"threshold": 0.1}'}, image)
    wanted = expected(IMAGES[:1], threshold=0.1)
    answer = client.responses.create(model="shapes", input=messages)
    assert json.loads(answer.output_text) == wanted
    assert answer.model_extra["detections"] == wanted["detections"]
    assert (answer.status, answer.usage.input_tokens, answer.usage.total_tokens) == ("completed", 1, 1)
    assert "warnings" not in answer.model_extra
    assert client.responses.parse(
        model="shapes", input=messages, text_format=Content
    ).output_parsed == Content.model_validate(wanted)
    assert json.loads(client.responses.create(input=[image], extra_body={"threshold": 0.1}).output_text) == wanted
    assert client.responses.create(input=messages, instructions="Detect.").model_extra["warnings"] == [
        "ignored: instructions"
    ]


def test_streamed_responses(client, expected):
    messages = user({"type": "input_image", "image_url": data_uri(IMAGES[0]), "detail": "auto"})
    events = list(client.responses.create(model="shapes", input=messages, stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        *("created", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event.sequence_number for event in events] == list(range(8))
    assert json.loads(events[3].delta) == json.loads(events[-1].response.output_text) == expected(IMAGES[:1])
    with client.responses.stream(model="shapes", input=messages, text_format=Content) as stream:
        parsed = stream.get_final_response().output_parsed
    assert parsed == Content.model_validate(expected(IMAGES[:1]))


def test_models(client, detector):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("shapes", "model", "conditional_detr")
    assert model.model_extra["class_names"] == list(detector.model.metadata.class_names)
    assert model.model_extra["preprocessing"]["shortest_edge"] == 256
    assert client.models.retrieve("shapes") == model


def test_sixteen_requests_at_a_time_get_their_own_answers(service, detector):
    images = [drawn(i) for i in range(16)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="-", max_retries=0) as client:

            async def ask(image):
                messages = user(image_part(data_uri(image)))
                answer = await client.chat.completions.create(model="shapes", messages=messages)
                return answer.model_extra["detections"]

            return await asyncio.gather(*map(ask, images))

    for got, found in zip(asyncio.run(ask_all()), detector(images), strict=True):
        assert [one["label"] for one in got] == list(found.names)
        # kernels may round differently in batches of other sizes
        assert [one["score"] for one in got] == pytest.approx(found.scores.tolist(), abs=1e-5)
        boxes = [value for one in got for value in one["box"].values()]
        assert boxes == pytest.approx(found.boxes.flatten().tolist(), abs=1e-2)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.94}])
@pytest.mark.parametrize("token", [None, "hf_not_a_real_token"])
def test_hugging_faces_client(service, detector, tmp_path, monkeypatch, options, token):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    path = tmp_path / "shapes.png"
    path.write_bytes(png(IMAGES[0]))
    client = huggingface_hub.InferenceClient(model=f"{service.url}/v1/detect", token=token)
    expected = list(detector(IMAGES[0], **options))
    assert len(expected) == (1 if options else 5)
    for image in (str(path), path.read_bytes()):
        got = client.object_detection(image, **options)
        assert [
            ([one.box.xmin, one.box.ymin, one.box.xmax, one.box.ymax], one.score, one.label) for one in got
        ] == expected
