"""Images from URLs: their bytes, or an error that contains the name, within the deadline."""

import gc
import http.server
import io
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

from conditional_detr.inference.downloads import DOWNLOAD, Limits
from conditional_detr.inference.images import open_image
from conditional_detr.inference.sources import resolve_source

RGB = np.random.default_rng(2).integers(0, 255, (24, 32, 3), dtype=np.uint8)
_buffer = io.BytesIO()
Image.fromarray(RGB).save(_buffer, "PNG")
PNG = _buffer.getvalue()


@pytest.fixture(scope="module")
def server():
    """Start a web server that answers each path in another way, and return its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.lstrip("/")
            if path == "headers":
                try:
                    self.wfile.write(b"HTTP/1.0 200 OK\r\n")
                    for _ in range(40):
                        self.wfile.write(b"X: y\r\n")
                        time.sleep(0.05)
                except OSError:
                    pass  # the client has disconnected
                return
            if path in ("moved.png", "moved-endless.png"):
                self.send_response(302)
                self.send_header("Location", "/image.png")
                self.end_headers()
                try:
                    while path == "moved-endless.png":
                        self.wfile.write(b"X")
                        time.sleep(0.05)
                except OSError:
                    pass  # the client has disconnected
                return
            known = path.split("?")[0] in ("image.png", "an%20image%20%C3%BC.png")
            self.send_response(200 if known or path in ("trickle", "silent", "lies", "page", "endless") else 404)
            body = b"<!doctype html><p>no image" if path == "page" else PNG
            if path != "endless":
                self.send_header("Content-Length", str(len(body) + (path in ("lies", "trickle", "silent"))))
            self.end_headers()
            try:
                if path == "trickle":
                    for byte in PNG:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.05)
                elif path == "silent":
                    time.sleep(1)
                elif path == "endless":
                    for _ in range(10_000):
                        self.wfile.write(bytes(1 << 16))
                else:
                    self.wfile.write(body)
            except OSError:
                pass  # the client has disconnected

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "path", ["image.png", "moved.png", "moved-endless.png", "an image ü.png", "image.png?size=1&x=%20"]
)
def test_url(server, path):
    assert resolve_source(server + path, "image") == PNG
    assert np.array_equal(np.asarray(open_image(server + path, "image")), RGB)


@pytest.mark.parametrize(
    ("path", "limits", "error", "message"),
    [
        ("none.png", Limits(), OSError, "none.png: the URL cannot be fetched: HTTP Error 404"),
        ("image.png", Limits(max_bytes=100), ValueError, "image.png: expected at most 100 bytes, got"),
        ("endless", Limits(max_bytes=10**6), ValueError, "endless: expected at most 1000000 bytes, got"),
        ("silent", Limits(timeout=0.2), OSError, "silent: the URL cannot be fetched: .*timed out"),
        (
            "trickle",
            Limits(timeout=0.3),
            OSError,
            r"trickle: the URL cannot be .* (timed out after|expected \d+ bytes, got)",
        ),
        ("headers", Limits(timeout=0.3), OSError, "headers: the URL cannot be fetched: timed out after 0.3 s"),
        ("lies", Limits(), OSError, r"lies: the URL cannot be fetched: .*expected \d+ bytes, got|IncompleteRead"),
        ("page", Limits(), ValueError, "page: expected an image, got a web page"),
    ],
)
def test_url_without_an_image(server, path, limits, error, message):
    start = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        open_image(server + path, "image", limits)
    assert str(caught.value).startswith(server + path)
    assert time.monotonic() - start < 1.5
    assert_downloads_end()


def assert_downloads_end():
    """A server that goes on sending holds no thread, and so no connection, beyond the deadline."""
    end = time.monotonic() + 0.5  # seconds; the slow answers take at least 2
    while any(thread.name == DOWNLOAD for thread in threading.enumerate()):
        assert time.monotonic() < end, "a download goes on"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("url", "first"),
    [
        ("http://{}/a.png", b"HTTP/1.1 200 OK\r\n"),
        ("https://{}/a.png", b"\x16\x03\x03\x40\x00"),  # TLS: a record of the handshake with 16 KiB
        ("https://host.invalid/a.png", b"HTTP/1.1 200 OK\r\n"),  # the answer of a proxy
    ],
    ids=["headers", "handshake", "proxy"],
)
def test_the_deadline_closes_the_connection(url, first, monkeypatch):
    ended = threading.Event()

    def answer(listening):
        client, _ = listening.accept()
        with client:
            try:
                client.recv(1 << 16)
                client.sendall(first)
                for _ in range(100):
                    client.sendall(b"X")
                    time.sleep(0.05)
            except OSError:  # closed by the client
                ended.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("https_proxy", f"http://{address}" if "host" in url else "")
        monkeypatch.setenv("no_proxy", "" if "host" in url else "*")
        thread = threading.Thread(target=answer, args=(listening,), daemon=True)
        thread.start()
        with pytest.raises(OSError, match=r"a\.png: the URL cannot be fetched: timed out"):
            resolve_source(url.format(address), "image", Limits(timeout=0.3))
        assert_downloads_end()
        assert ended.wait(2)
        gc.collect()  # a socket that nobody closed warns


def test_refused_connection():
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:9/a\.jpg: the URL cannot be fetched: .*refused"):
        resolve_source("http://127.0.0.1:9/a.jpg", "image")
    with pytest.raises(OSError, match=r"http://\[a\.jpg: the URL cannot be fetched: "):
        resolve_source("http://[a.jpg", "image")
