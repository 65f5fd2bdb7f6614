"""Requests that mean harm or come from broken programs: each gets a 4xx, and the service goes on as before."""

import base64
import contextlib
import io
import json
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("uvicorn")

from conditional_detr import Detector
from conditional_detr.data.synthetic import draw_image
from conditional_detr.serving.schemas import plain_detections
from helpers.fuzzing import LIMITS
from helpers.service import Service, image_bytes, read_all, wait_until

SECONDS = 1.0  # for headers and bodies
MAX_BODY = 8 * 2**20
MAX_PIXELS = 4_000_000
HEAD = b"POST /v1/detect HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n"
URL = "data:image/jpeg;base64," + base64.b64encode(image_bytes()).decode()
PARTS = [{"type": "image_url", "image_url": {"url": URL}}]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    limits = {"header_seconds": SECONDS, "body_seconds": SECONDS, "max_body": MAX_BODY, "max_pixels": MAX_PIXELS}
    with Service(tmp_path_factory.mktemp("service"), settings={**limits, "max_queue": 8}) as service:
        service.detect(image_bytes())
        yield service


@pytest.fixture(autouse=True)
def unharmed(service):
    """After every test: no answer was a 500, a good request works and is quick, and memory is bounded."""
    before, logged = service.memory(), len(service.log_lines())
    yield
    began = time.monotonic()
    status, _, body = service.detect(image_bytes())
    assert (status, {found["label"] for found in json.loads(body)}) == (200, {"cross", "disc"})
    assert time.monotonic() - began < 5
    assert service.memory() < before + 200
    assert [line for line in service.log_lines()[logged:] if line.get("status") == 500 or "error" in line] == []


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer.split()[1])


def error_of(answer: tuple) -> tuple[int, str]:
    """Return status and code of an answer in OpenAI's form of errors."""
    status, headers, body = answer
    error = json.loads(body)["error"]
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"]
    assert error.keys() == {"message", "type", "param", "code"}
    return status, error["code"]


def chat(**fields) -> dict:
    return {"messages": [{"role": "user", "content": PARTS}], **fields}


def drip(service, start: bytes, drop: bytes) -> tuple[bytes, float]:
    """Send a start, and then a few bytes every 50 ms, until the service answers."""
    with service.connect() as connection:
        began = time.monotonic()
        connection.sendall(start)
        connection.settimeout(0.05)
        while time.monotonic() < began + 20:
            with contextlib.suppress(TimeoutError):
                if connection.recv(1, 2):  # MSG_PEEK
                    break
            connection.sendall(drop)
        seconds = time.monotonic() - began
        connection.settimeout(20)
        return read_all(connection), seconds


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"GET / HTTP/1.1\r\n", b"a: b\r\n"),
        (b"", b"\r\n"),
        (HEAD + b"content-length: 1000\r\n\r\n", b"a"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
    ],
)
def test_slow_headers_and_bodies(service, start, drop):
    answer, seconds = drip(service, start, drop)
    assert status_of(answer) == 408
    assert 0.5 * SECONDS < seconds < 10 * SECONDS


def test_many_slow_clients_take_no_places_from_others(service):
    """They are five times as many as fit in the queue."""
    with contextlib.ExitStack() as stack:
        for i in range(40):
            connection = stack.enter_context(service.connect())
            connection.sendall(HEAD + (b"content-length: 1000\r\n\r\na" if i % 2 else b"a: "))
        assert service.detect(image_bytes())[0] == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n\r\n",
        HEAD.replace(b"/v1/detect", b"/nowhere") + b"content-length: 10\r\n\r\n0123456789\r\n",
        HEAD.replace(b"POST", b"GET") + b"content-length: 1000000000\r\n\r\n",
    ],
)
def test_a_connection_does_not_live_by_bytes_that_nobody_reads(service, request_):
    """After its answer, the client goes on to send line breaks or parts of a body."""
    with service.connect() as connection:
        connection.sendall(request_)
        connection.settimeout(0.05)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 20:
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1 << 16):
                        break
                connection.sendall(b"\r\n")
        assert time.monotonic() < began + 10 * SECONDS


def test_a_length_that_is_too_large_is_refused_at_once(service):
    with service.connect() as connection:
        began = time.monotonic()
        connection.sendall(HEAD + b"content-length: 1000000000\r\n\r\n")
        assert status_of(connection.recv(1 << 16)) == 413
        assert time.monotonic() - began < 0.5 * SECONDS


@pytest.mark.parametrize("length", [b"99999999999999999999999", b"9" * 5000, b"-1", b"1e3", b"\xb2", b"1, 2", b""])
def test_lengths_that_are_none(service, length):
    assert status_of(service.raw(HEAD + b"content-length: " + length + b"\r\n\r\n")) in (400, 413)


@pytest.mark.parametrize("size", [65_536, 7])
def test_an_endless_body(service, size):
    chunk = b"%x\r\n%s\r\n" % (size, b"a" * size)
    chunks = [chunk * (2**20 // size)] * (MAX_BODY // 2**20 * 3)
    assert status_of(service.raw(HEAD + b"transfer-encoding: chunked\r\n\r\n", *chunks)) == 413


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\na: ",
        b"GET /",
        HEAD,
        HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\na: ",
        HEAD + b"transfer-encoding: chunked\r\n\r\n5;a=",
    ],
)
def test_endless_headers_trailers_and_extensions(service, start):
    flood = b"".join(b"a%d: b\r\n" % i for i in range(10_000)) if start == HEAD else b"a" * 100_000
    assert status_of(service.raw(start, *[flood] * 50)) == 431


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    ],
)
def test_large_headers(service, request_):
    assert status_of(service.raw(request_)) == 431


@pytest.mark.parametrize(
    "request_",
    [
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        HEAD + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: gzip\r\n\r\nabc",
        HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\nabc",
        HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\nabc",
        b"GET / HTTP/1.1\r\nhost : x\r\n\r\n",
        b"GET / HTTP/1.1\r\na: b\x00c\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"NONSENSE / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_or_may_be_read_in_two_ways(service, request_):
    assert status_of(service.raw(request_)) == 400


def test_requests_before_the_answers_of_others(service):
    """A few are answered in order; thousands in a packet, which would take memory, are not."""
    request_ = b"GET /v1/models/%d HTTP/1.1\r\nhost: x\r\n\r\n"
    few = b"".join(request_ % i for i in range(4)) + (request_ % 4).replace(b"host: x", b"connection: close")
    answers = service.raw(few, timeout=20).split(b"HTTP/1.1 ")[1:]
    assert [answer.split()[0] for answer in answers] == [b"404"] * 5
    assert [answer.rpartition(b"got '")[2][:1] for answer in answers] == [b"%d" % i for i in range(5)]
    assert service.raw(request_ % 0 * 5000, timeout=20).count(b"HTTP/1.1 ") < 10


def test_a_body_longer_than_its_length_is_the_next_request(service):
    answer = service.raw(HEAD + b"content-length: 3\r\n\r\nabcdef nonsense\r\n\r\n")
    assert [int(part.split()[0]) for part in answer.split(b"HTTP/1.1 ")[1:]] in ([400, 400], [400])


def test_a_body_shorter_than_its_length(service):
    with service.connect() as connection:
        connection.sendall(HEAD + b"content-length: 100\r\n\r\nabc")
        connection.shutdown(1)
        assert read_all(connection) == b""


@pytest.mark.parametrize(
    "path",
    [
        "/%00",
        "/page/%00",
        "/page/..%2fapp.py",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
        "/page/..%5capp.py",
        "/docs-assets/..%2f..%2fsetup.py",
        "/v1/models/%00",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/page/" + "a" * 5000,
        "/page/%ff%fe",
        "/v1/models/%ff",
        "/v1/models/" + "a" * 50_000,
    ],
)
def test_paths(service, path):
    status, _, body = service.get(path)
    assert status in (400, 404)
    assert len(body) < 1000


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"])
def test_methods(service, method):
    assert service.request(method, "/v1/detect", b"abc")[0] == 405


@pytest.mark.parametrize("headers", ["upgrade: websocket\r\nsec-websocket-key: a", "upgrade: h2c", "upgrade: \x80"])
def test_upgrades_are_not_made(service, headers):
    head = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n{headers}\r\n\r\n"
    with service.connect() as connection:
        connection.sendall(head.encode("latin-1"))
        assert status_of(connection.recv(1 << 16)) == 200


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


BODIES = {
    "empty": b"",
    "no json": b"{",
    "null": b"null",
    "number": b"1",
    "list": b"[]",
    "text": b'"a"',
    "latin-1": '{"messages": "é"}'.encode("latin-1"),
    "utf-16": json.dumps(chat()).encode("utf-16"),
    "null byte": b'{"messages": []}\x00',
    "lone surrogate": b'{"messages": [], "model": "\\ud800"}',
    "no messages": b"{}",
    "messages of another type": b'{"messages": {"role": "user"}}',
    "deep 100": f'{{"messages": {nested(100)}}}'.encode(),
    "deep 10000": nested(10_000).encode(),
    "deep 1000000": nested(1_000_000).encode(),
    "deep unclosed": b'{"a":' * 1_000_000,
    "deep behind a string": b'{"a": "\\\\", "messages": ' + nested(10_000).encode() + b"}",
    "deep extra": f'{{"messages": [], "x": {nested(5000)}}}'.encode(),
    "deep text": json.dumps({"messages": [{"role": "user", "content": nested(9999, '{"a":', "}")}]}).encode(),
    "many values": b'{"messages": [' + b"{}," * 2_000_000 + b"{}]}",
    "many lists": b'{"messages": [' + b"[]," * 2_000_000 + b"[]]}",
    "many commas": b'{"messages": [' + b"0," * 3_000_000 + b"0]}",
    "many strings": b'{"messages": [' + b'"",' * 2_000_000 + b'""]}',
    "many quotes": b'"' * 8_000_000,
    "many escapes": b'["' + b'\\"' * 4_000_000,
    "100000 messages": json.dumps({"messages": [{"role": "user", "content": "a"}] * 100_000}).encode(),
    "100000 parts": json.dumps({"messages": [{"role": "user", "content": [{"type": "text"}] * 100_000}]}).encode(),
    "10000 parts": json.dumps({"messages": [{"role": "user", "content": [{"type": "text"}] * 10_000}]}).encode(),
    "too many images": json.dumps({"messages": [{"role": "user", "content": PARTS * 17}]}).encode(),
    "a long model": json.dumps(chat(model="a" * 2**20)).encode(),
    "a long text": json.dumps({"messages": [{"role": "user", "content": "a" * 7_000_000}]}).encode(),
    "a long number": json.dumps(chat(threshold=0)).replace("0}", "1" + "0" * 5000 + "}").encode(),
    "a large exponent": json.dumps(chat(threshold=0)).replace("0}", "1e999999999}").encode(),
    "nan": json.dumps(chat(threshold=float("nan"))).encode(),
    "infinity": json.dumps(chat(threshold=float("inf"))).encode(),
    "infinite top_k": json.dumps(chat(top_k=float("inf"))).encode(),
    "negative": json.dumps(chat(top_k=-1)).encode(),
    "a class of another type": json.dumps(chat(classes=[[]])).encode(),
    "a large class": json.dumps(chat(classes=[10**400])).encode(),
    "a negative class": json.dumps(chat(classes=[-1])).encode(),
    "many classes": json.dumps(chat(classes=["a"] * 40_000)).encode(),
    "image of another type": json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}).encode(),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/detect"])
def test_json(service, name, path):
    body = BODIES[name]
    answer = service.post_json(path, body)
    status, _ = error_of(answer)
    assert status in (400, 404, 413)
    assert len(answer[2]) < 2000


TEXT_OF_BRACKETS = json.dumps(chat(user=nested(60_000, "[", ",") + '\\"\\\\"', metadata={"a": nested(50)}))


@pytest.mark.parametrize(
    "body",
    [
        TEXT_OF_BRACKETS,
        json.dumps(chat(top_k=10**4000)),
        json.dumps(chat(threshold=0)).replace("0}", "0." + "1" * 5_000_000 + "}"),
    ],
    ids=["brackets in strings", "a large number", "a long fraction"],
)
def test_unusual_json_that_is_right(service, body):
    assert service.post_json("/v1/chat/completions", body.encode())[0] == 200


def png(width: int, height: int, *, rows: int = 1) -> bytes:
    """Return a PNG that says it has this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(min(width * 3 + 1, 10**6)) * rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(kind: str, size: tuple[int, int] = (3000, 3000), mode: str = "L", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + encoded("GIF", (1, 1))[10:]


def icon() -> bytes:
    """Return an icon that says 16 x 16 and holds a PNG of 3000 x 3000."""
    image = encoded("PNG", mode="RGB")
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(image), 22) + image


BOMBS = {
    "png": lambda: png(50_000, 50_000),
    "png with data": lambda: png(2001, 2000, rows=2000),
    "png of one line": lambda: png(2**31 - 1, 1),
    "webp": lambda: encoded("WEBP", lossless=True),
    "gif": lambda: encoded("GIF"),
    "gif screen": lambda: gif(65_535, 65_535),
    "tiff": lambda: encoded("TIFF", compression="tiff_deflate"),
    "jpeg": lambda: encoded("JPEG"),
    "bmp": lambda: encoded("BMP", (10, 10)).replace(struct.pack("<ii", 10, 10), struct.pack("<ii", 60_000, 60_000)),
    "ppm": lambda: b"P6 100000 100000 255\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs(service, name):
    assert error_of(service.detect(BOMBS[name]())) == (413, "image_too_large")


NO_IMAGES = {
    "text": b"hello",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "pdf": b"%PDF-1.7\n",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "an icon that holds a larger image": icon(),
    "0 pixels": png(0, 0),
    "no rows": png(10, 0),
    "truncated jpeg": image_bytes()[:500],
    "truncated png": image_bytes("PNG")[:500],
    "zeros": bytes(1000),
    "7 MB of nothing": b"\xff\xd8" + bytes(7_000_000),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image(service, name):
    assert error_of(service.detect(NO_IMAGES[name])) == (400, "invalid_image")


STRINGS = [
    "data:",
    "data:image/png",
    "data:image/png;base64,",
    "data:image/png;base64,!!!!",
    "data:image/png,abc",
    "data:;base64," + "%41" * 2_000_000,
    "data:text/html;base64,aGVsbG8=",
    "A" * 7_000_000,
    "aa " * 2_300_000,
    "é" * 1000,
    "=" * 1000,
    "ftp://127.0.0.1/a.png",
    "file:///etc/passwd",
    "/etc/passwd",
    "~/image.png",
    "\x00",
    " ",
]


@pytest.mark.parametrize("text", STRINGS, ids=lambda text: repr(text[:24]))
def test_strings_that_are_no_image(service, text):
    assert error_of(service.post_json("/v1/detect", {"inputs": text})) == (400, "invalid_image")


def test_multipart(service):
    def form(body: bytes, boundary: str = "x"):
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        return service.request("POST", "/v1/detect", body, headers)

    part = b'--x\r\ncontent-disposition: form-data; name="%d"; filename="a"\r\n\r\nabc\r\n'
    bodies = [b"".join(part % i for i in range(100_000)) + b"--x--\r\n", part % 1, b"", b"--x--", bytes(1000)]
    bodies += [b"--x\r\n" + b"a: b\r\n" * 100_000, b"--x\r\ncontent-disposition: " + b"a" * 5_000_000]
    for body in bodies:
        assert error_of(form(body))[0] in (400, 413)
    assert error_of(form(part % 1, "y" * 50_000))[0] == 400
    assert error_of(service.request("POST", "/v1/detect", b"abc", {"content-type": "multipart/form-data"}))[0] == 400


@pytest.mark.parametrize("kind", ["close", "reset"])
def test_clients_that_do_not_wait_for_their_answers(service, kind):
    """Their places in the queue are given back, at whatever point they leave."""
    image = image_bytes()
    head = HEAD + b"content-length: %d\r\n\r\n" % len(image)
    for i in range(60):
        with service.connect() as connection:
            if kind == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head + image[: len(image) * (i % 4) // 3])
            time.sleep(0.005 * (i % 3))
    gauge = "conditional_detr_requests_in_progress "
    wait_until(lambda: gauge + "1.0" in service.get("/metrics")[2].decode(), 20)
    with ThreadPoolExecutor(8) as pool:  # as many as fit in the queue
        assert [answer[0] for answer in pool.map(service.detect, [image] * 8)] == [200] * 8


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:80/a.png", "HTTPS://example.org/a.png", "http://169.254.169.254/", "http://\r\n"]
)
def test_urls_are_off(service, url):
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    answer = service.post_json("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})
    assert error_of(answer) == (400, "url_refused")


@pytest.fixture(scope="module")
def detector():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the service, for equal last digits
    yield Detector.from_pretrained("shapes")
    torch.set_num_threads(threads)


KINDS = {
    "1 x 1": lambda image: (image.resize((1, 1)), "PNG", {}),
    "1 x 500": lambda image: (image.resize((1, 500)), "PNG", {}),
    "16 bits": lambda image: (Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG", {}),
    "animation": lambda image: (image, "GIF", {"save_all": True, "append_images": [image.rotate(90)]}),
    "cmyk": lambda image: (image.convert("CMYK"), "JPEG", {}),
    "palette": lambda image: (image.convert("P"), "PNG", {"transparency": 0}),
    "rotated": lambda image: (image.transpose(Image.Transpose.ROTATE_90), "JPEG", {"exif": orientation(6)}),
    "webp": lambda image: (image, "WEBP", {"lossless": True}),
}


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("kind", KINDS)
def test_unusual_images_give_what_the_detector_gives(service, detector, kind):
    image, format_, options = KINDS[kind](draw_image(1, 0)[0].crop((0, 0, 150, 100)))
    file = io.BytesIO()
    image.save(file, format_, **options)
    status, _, body = service.detect(file.getvalue())
    assert status == 200
    expected = detector(file.getvalue())
    assert json.loads(body) == json.loads(json.dumps(plain_detections(expected)))
    if kind == "rotated":
        assert expected.size == (100, 150)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(URL),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = ["model", "stream", "threshold", "top_k", "classes", "messages", "input", "inputs", "parameters"]
NAMES += ["stream_options", "response_format"]
CONTENT = st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", "input_text", "input_image"]) | VALUES})
    | st.fixed_dictionaries({"type": st.just("text"), "text": VALUES})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": VALUES | st.just({"url": URL})}),
    max_size=3,
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.just("user") | VALUES, "content": CONTENT | VALUES}), max_size=3)
REQUESTS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
PATHS = st.sampled_from(["/v1/chat/completions", "/v1/responses", "/v1/detect", "/v1/infer"])


@LIMITS
@given(PATHS, REQUESTS, MESSAGES | VALUES)
def test_any_json_gives_an_answer_or_a_4xx(service, path, body, messages):
    name = "messages" if path.startswith("/v1/chat") else "input"
    status, _, answer = service.post_json(path, json.dumps({name: messages, **body}).encode())
    assert status == 200 or 400 <= status < 500, answer


@settings(LIMITS, max_examples=50)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]), st.binary(max_size=300), st.integers(0, 2000))
def test_any_damage_to_an_image_gives_an_answer_or_a_4xx(service, kind, damage, place):
    content = image_bytes(kind)
    status, _, answer = service.detect(content[:place] + damage + content[place + len(damage) :])
    assert status == 200 or 400 <= status < 500, answer
