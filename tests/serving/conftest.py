"""The service with the small network that is shipped, and its page in a real browser."""

import shutil

import pytest

from conditional_detr import Detector
from helpers.browser import CONSOLE_KINDS
from helpers.serving import served

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream"]
REFUSED = "Failed to load resource: the server responded with a status of"  # a request that a test lets fail


@pytest.fixture(scope="session")
def service():
    """A service of the shipped weights, without keys and image URLs."""
    pytest.importorskip("fastapi")
    with served({"shapes": Detector.from_pretrained("shapes")}) as running:
        yield running


@pytest.fixture(scope="session")
def page_url(service):
    return f"{service.url}/"


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
    page.on("console", lambda message: faults.append(message.text) if message.type in CONSOLE_KINDS else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    assert "default-src 'none'" in page.goto(page_url).headers["content-security-policy"]
    yield page
    page.unroute_all(behavior="ignoreErrors")  # of requests that nobody waits for, such as the icon's
    context.close()
    assert [fault for fault in faults if not fault.startswith(REFUSED)] == []
