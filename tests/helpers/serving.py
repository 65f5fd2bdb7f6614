"""A service in a thread of the tests, and plain requests to it."""

import base64
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image

from conditional_detr.data.synthetic import draw_image
from helpers.browser import png


class Served(NamedTuple):
    """A running service: its URL without a slash at the end, and its application."""

    url: str
    gate: object


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


@contextmanager
def served(models, settings=None, **options) -> Iterator[Served]:
    """Serve models in a thread until the end of the context; the service is warm."""
    import uvicorn

    from conditional_detr.serving import create_app

    gate = create_app(models, settings, **options)
    server = uvicorn.Server(uvicorn.Config(gate, log_level="warning", ws="none", timeout_graceful_shutdown=5))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # a client that comes before the server waits
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    service = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", gate)
    try:
        while request(service, "GET", "/health/ready").status != 200:
            assert thread.is_alive()
        yield service
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def request(service, method, path, body=None, kind=None, **headers) -> Answer:
    """Send a request and return the answer."""
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {**named, **({"content-type": kind} if kind else {})})
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def post(service, path, body, **headers) -> Answer:
    """Send an object as JSON."""
    return request(service, "POST", path, json.dumps(body), "application/json", **headers)


def drawn(index: int, size=(192, 256)) -> Image.Image:
    """Return an image of shapes."""
    return draw_image(5, index, size=size)[0]


def base64_of(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()


def data_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{base64_of(image)}"
