"""The service with the small network that is shipped, and its page in a real browser."""

import shutil
import socket
import threading

import pytest

from conditional_detr import Detector
from conditional_detr.data.synthetic import draw_image

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream"]
REFUSED = "Failed to load resource: the server responded with a status of"  # a request that a test lets fail


@pytest.fixture(scope="module")
def page_url():
    uvicorn = pytest.importorskip("uvicorn")
    from conditional_detr.serving import create_app

    detector = Detector.from_pretrained("shapes")
    detector(draw_image(0, 0)[0])  # the first call is slower
    config = uvicorn.Config(create_app({"shapes": detector}), log_level="warning", ws="none")
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # a browser that comes before the server waits
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, page_url):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(10_000)
    faults = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    assert "default-src 'none'" in page.goto(page_url).headers["content-security-policy"]
    yield page
    page.unroute_all(behavior="ignoreErrors")  # of requests that nobody waits for, such as the icon's
    context.close()
    assert [fault for fault in faults if not fault.startswith(REFUSED)] == []
