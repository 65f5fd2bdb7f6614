"""Images by URL: only from hosts that are listed, within limits; and a string of a request is never a path."""

import base64
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("uvicorn")

from helpers.service import Service, image_bytes

URL_SECONDS = 1.0
MAX_BODY = 4 * 2**20


class Images(BaseHTTPRequestHandler):
    """A server of images, and of other things."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        Images.asked.append(self.path)
        name, _, target = self.path[1:].partition("?")
        self.send_response(302 if name == "redirect" else 200)
        if name == "redirect":
            self.send_header("Location", target)
        self.end_headers()
        try:
            if name == "image":
                self.wfile.write(image_bytes())
            elif name == "text":
                self.wfile.write(b"<html>secret</html>")
            while name == "slow":
                self.wfile.write(b"a")
                time.sleep(0.1)
            while name == "large":
                self.wfile.write(bytes(2**20))
        except OSError:
            pass  # the service has closed the connection

    def log_message(self, *_):
        pass


def serve() -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Images)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def ports():
    """The port of a server that is listed, and of one that is not."""
    servers = serve(), serve()
    yield [server.server_port for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def service(tmp_path_factory, ports):
    limits = {"url_seconds": URL_SECONDS, "max_body": MAX_BODY}
    urls = [f"127.0.0.1:{ports[0]}"]
    with Service(tmp_path_factory.mktemp("service"), urls=urls, settings=limits) as service:
        yield service


def ask(service: Service, *images: str) -> tuple[int, object]:
    """Return the status, and the labels or the code of the error."""
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    status, _, body = service.post_json(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "threshold": 0.5}
    )
    content = json.loads(body)
    if status == 200:
        return status, sorted((found["image"], found["label"]) for found in content["detections"])
    return status, content["error"]["code"]


def test_a_listed_host(service, ports):
    url = f"http://127.0.0.1:{ports[0]}/image"
    uri = "data:image/jpeg;base64," + base64.b64encode(image_bytes()).decode()
    assert ask(service, url, uri) == (200, [(0, "cross"), (0, "disc"), (1, "cross"), (1, "disc")])
    assert ask(service, f"http://127.0.0.1:{ports[0]}/redirect?/image") == (200, [(0, "cross"), (0, "disc")])


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{other}/image",
        "http://127.0.0.1/image",
        "http://localhost:{listed}/image",
        "http://localhost.:{listed}/image",
        "http://2130706433:{listed}/image",
        "http://0x7f000001:{listed}/image",
        "http://0177.0.0.1:{listed}/image",
        "http://127.1:{listed}/image",
        "http://0.0.0.0:{listed}/image",
        "http://[::1]:{listed}/image",
        "http://[::ffff:127.0.0.1]:{listed}/image",
        "http://user@127.0.0.1:{listed}/image",
        "http://127.0.0.1:{listed}@127.0.0.1:{other}/image",
        "http://127.0.0.1:{other}#@127.0.0.1:{listed}/image",
        "http://127.0.0.1:{other}\\@127.0.0.1:{listed}/image",
        "http://127.0.0.1:{listed}/ima ge",
        "http://169.254.169.254/latest/meta-data",
        "https://127.0.0.1:{other}/image",
        "http://127.0.0.1:{listed}/redirect?http://127.0.0.1:{other}/image",
        "http://127.0.0.1:{listed}/redirect?http://169.254.169.254/latest/meta-data",
        "http://127.0.0.1:{listed}/redirect?http://localhost:{listed}/image",
        "http://127.0.0.1:{listed}/redirect?/redirect?/redirect?/redirect?/image",
        "http://127.0.0.1:{listed}/redirect?file:///etc/passwd",
    ],
)
def test_hosts_and_redirects_that_are_not_listed(service, ports, url):
    """The address that is not listed gets no request."""
    listed, other = ports
    Images.asked.clear()
    status, code = ask(service, url.format(listed=listed, other=other))
    assert (status, code) in [(400, "url_refused"), (400, "url_unreachable")]
    assert code == "url_refused" or url.endswith("file:///etc/passwd")
    assert "/image" not in Images.asked


def test_what_is_no_image(service, ports):
    assert ask(service, f"http://127.0.0.1:{ports[0]}/text") == (400, "invalid_image")


def test_too_large(service, ports):
    assert ask(service, f"http://127.0.0.1:{ports[0]}/large") == (413, "image_too_large")


def test_a_slow_server_delays_only_those_who_ask_for_it(service, ports):
    url = f"http://127.0.0.1:{ports[0]}/slow"
    with ThreadPoolExecutor(1) as pool:
        began = time.monotonic()
        slow = pool.submit(ask, service, *[url] * 16)
        time.sleep(0.2)
        assert service.detect(image_bytes())[0] == 200
        assert time.monotonic() - began < URL_SECONDS
        assert slow.result() == (400, "url_unreachable")
    assert time.monotonic() - began < 5 * URL_SECONDS


def test_a_string_is_never_a_path(service, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(image_bytes())
    for text in (str(path), f"file://{path}", f"file:{path}", f"~/{path.name}", path.name, f"./{path.name}"):
        for endpoint, body in (
            ("/v1/detect", {"inputs": text}),
            ("/v1/infer", {"input": [{"type": "image_url", "url": text}]}),
            ("/v1/responses", {"input": [{"type": "input_image", "image_url": text}]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image_part(text)]}]}),
        ):
            status, _, answer = service.post_json(endpoint, body)
            assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_image")


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}
