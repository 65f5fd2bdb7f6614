"""The page in a real browser: it shows what the service answers, whatever the user does."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from PIL import Image

from helpers.browser import BLANK, DETECT, SHAPES, choose, detection, expect_count, reply, slide

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
PIXELS = """async (image) => {
    await image.decode();
    const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
    canvas.getContext("2d").drawImage(image, 0, 0);
    const bytes = new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer());
    return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}"""  # an image as PNG in base64


def ask(page_url, call):
    request = urllib.request.Request(f"{page_url}v1/{call}", SHAPES, {"Content-Type": "image/png"})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def test_rows_and_boxes_are_those_of_the_service_and_the_slider_asks_nothing(page, page_url):
    requests = []
    page.on("request", lambda request: requests.append(request.url) if "/v1/detect" in request.url else None)
    choose(page, SHAPES)
    counts = set()
    for threshold in (0.5, 0.05, 0.3, 0.9):
        slide(page, threshold)
        expected = json.loads(ask(page_url, f"detect?model=shapes&threshold={threshold}&top_k=300"))
        expect_count(page, len(expected))
        assert page.locator("#rows .text").all_inner_texts() == [item["label"] for item in expected]
        scores = [float(score) for score in page.locator("#rows .score").all_inner_texts()]
        assert scores == pytest.approx([item["score"] for item in expected], abs=0.0051)
        noun = "detection" if len(expected) == 1 else "detections"
        expect(page.locator("#status")).to_have_text(
            re.compile(rf"640 \u00d7 480 pixels · {len(expected)} {noun} · \d+ ms")
        )
        counts.add(len(expected))
    assert len(counts) > 2
    assert len(requests) == 1


def test_classes_are_filtered_with_counts_of_the_slider(page):
    reply(page, [detection(name, score, 5, 5, 50, 50) for name, score in (("a", 0.9), ("b", 0.8), ("b", 0.3))])
    choose(page, BLANK)
    expect_count(page, 2)
    assert page.locator("#classes output").all_inner_texts() == ["1", "1"]
    slide(page, 0.2)
    assert page.locator("#classes output").all_inner_texts() == ["1", "2"]
    page.get_by_role("checkbox", name="b").uncheck()
    expect_count(page, 1)
    page.get_by_role("button", name="None").click()
    expect_count(page, 0)
    expect(page.locator("#hint")).to_have_text("None with this score and these classes.")
    page.get_by_role("button", name="All").click()
    expect_count(page, 3)


def test_box_and_row_are_highlighted_together(page):
    reply(page, [detection("a", 0.9, 5, 5, 190, 95), detection("b", 0.8, 50, 40, 80, 60)])
    choose(page, BLANK)
    expect_count(page, 2)
    page.locator("#overlay .box[data-index='1']").hover()  # it lies within the other one
    expect(page.locator("#rows tr.active")).to_contain_text("b")
    expect(page.locator("#overlay .label").last).to_have_text("b 0.80")  # over the others
    page.locator("#rows tr").first.hover()
    expect(page.locator("#overlay .label.active")).to_have_text("a 0.90")
    page.locator("h1").hover()
    expect(page.locator(".active")).to_have_count(0)


@pytest.mark.parametrize("way", ["row", "box", "keyboard", "keyboard on the image"])
def test_selecting_a_detection_shows_its_attention(page, page_url, way):
    choose(page, SHAPES)
    expect(page.locator("#rows tr").nth(1)).to_be_visible()
    with page.expect_response(re.compile("/v1/attention")):
        if way == "row":
            page.locator("#rows tr").nth(1).locator(".place").click()
        elif way == "box":
            page.locator("#overlay .label[data-index='1']").click()
        else:
            page.locator("#rows button" if way == "keyboard" else "#overlay .box[data-index='0']").first.focus()
            page.keyboard.press("ArrowDown")
            page.keyboard.press("Enter")
    expected = ask(page_url, "attention?model=shapes&threshold=0.05&top_k=300&index=1")
    shown = page.locator("#attention-image")
    expect(shown).to_be_visible()
    map_shown = Image.open(io.BytesIO(base64.b64decode(shown.evaluate(PIXELS)))).convert("RGB")
    assert map_shown.tobytes() == Image.open(io.BytesIO(expected)).convert("RGB").tobytes()
    page.keyboard.press("Escape")
    expect(page.locator("#attention")).to_be_hidden()


def test_the_whole_way_by_keyboard(page):
    choose(page, SHAPES)
    expect(page.locator("#rows tr").first).to_be_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the detections"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "threshold"
    page.keyboard.press("End")
    expect_count(page, 0)
    page.keyboard.press("Home")
    expect(page.locator("#rows tr").nth(5)).to_be_attached()
    for _ in range(3 + page.locator("#classes input").count()):
        page.keyboard.press("Tab")
    expect(page.locator("#rows button").first).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    expect(page.locator("#rows tr.active")).to_have_attribute("data-index", "1")
    page.keyboard.press("Tab")  # the table is one stop
    expect(page.locator("#code summary")).to_be_focused()


def test_names_are_text(page):
    name = '<img src=x onerror="document.title=1">'
    reply(page, [detection(name, 0.9, 5, 5, 190, 95)])
    choose(page, BLANK, name="<b>bold</b>.png")
    expect_count(page, 1)
    assert page.locator("#rows .text").inner_text() == name
    assert page.locator("#classes .text").inner_text() == name
    expect(page.locator("#overlay .label")).to_contain_text("<img src=x")
    assert page.locator("#name").inner_text() == "<b>bold</b>.png"
    assert page.locator("main img").count() == 1
    assert page.title().startswith("Object detection")


def test_a_text_file_is_an_error_and_the_next_image_clears_it(page):
    choose(page, b"no image", "notes.txt", "text/plain")
    expect(page.get_by_role("alert")).to_have_text(re.compile(r".+ \(HTTP 4\d\d\)"))
    expect_count(page, 0)
    choose(page, SHAPES)
    expect(page.locator("#rows tr").first).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (413, {"error": {"message": "too large: 9 MB"}}, "too large: 9 MB (HTTP 413)"),
        (503, {"error": {"message": "busy"}}, "busy (HTTP 503) Try again in 7 s."),
        (502, None, "Bad Gateway (HTTP 502)"),
    ],
)
def test_errors_are_shown_plainly(page, status, body, shown):
    headers = {"retry-after": "7"} if status == 503 else {}
    options = {"body": "<h1>proxy</h1>"} if body is None else {"json": body}
    page.route(DETECT, lambda route: route.fulfill(status=status, headers=headers, **options))
    choose(page, BLANK)
    expect(page.get_by_role("alert")).to_have_text(shown)


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_drop_and_paste_give_a_detection_within_two_seconds(page, kind):
    script = """([kind, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], "image.png", { type: "image/png" }));
        const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
        document.body.dispatchEvent(new (kind === "drop" ? DragEvent : ClipboardEvent)(kind, options));
    }"""
    expect(page.locator("#model")).to_be_enabled()
    began = time.monotonic()
    page.evaluate(script, [kind, base64.b64encode(SHAPES).decode()])
    expect(page.locator("#overlay .box").first).to_be_visible(timeout=2000)
    assert time.monotonic() - began < 2


def test_a_late_answer_about_an_earlier_image_is_ignored(page):
    held = []
    page.route(DETECT, lambda route: held.append(route))
    choose(page, SHAPES)
    expect(page.locator("#status")).to_contain_text("Detecting")
    page.wait_for_timeout(200)
    reply(page, [detection("second", 0.9, 5, 5, 90, 50)])
    choose(page, BLANK)
    expect_count(page, 1)
    with suppress(playwright.Error):  # the page has given it up
        held[0].fulfill(json=[detection("first", 0.9, 5, 5, 90, 50)] * 3)
    page.wait_for_timeout(300)
    expect_count(page, 1)
    expect(page.locator("#rows")).to_contain_text("second")


def test_the_key_is_asked_for_and_sent_in_a_header_only(page, page_url):
    seen = []

    def guard(route):
        seen.append(route.request.url)
        if route.request.headers.get("authorization") == "Bearer secret":
            return route.fallback()
        return route.fulfill(status=401, json={"error": {"message": "no key"}})

    page.route(re.compile("/v1/"), guard)
    page.reload()
    for key in ("wrong", "secret"):
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        if key == "wrong":
            expect(page.locator("#key-label")).to_have_text("The service does not accept this key.")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#model option")).to_have_count(1)
    assert not any("secret" in url for url in (*seen, page.url))
    assert page.evaluate("sessionStorage.length + localStorage.length") == 0
    assert "secret" not in page.locator("#snippet").text_content()


def test_the_page_works_behind_a_path_prefix(page, page_url):
    page.route(
        re.compile("/some/where/"),
        lambda route: route.fulfill(response=route.fetch(url=route.request.url.replace("/some/where/", "/"))),
    )
    page.goto(f"{page_url}some/where/")
    choose(page, SHAPES)
    expect(page.locator("#rows tr").first).to_be_visible()
    expect(page.locator("#snippet")).to_contain_text("/some/where/v1/detect?model=shapes&threshold=0.5'")


def test_the_code_to_copy_runs_also_with_quotes_in_the_name(page, page_url, tmp_path, monkeypatch):
    name = """it's "$HOME".png"""
    (tmp_path / name).write_bytes(SHAPES)
    monkeypatch.chdir(tmp_path)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    choose(page, SHAPES, name)
    expect(page.locator("#rows tr").first).to_be_visible()
    page.locator("#code summary").click()
    code = {}
    for form in ("curl", "python", "json"):
        page.locator(f"[name=form][value={form}]").check()
        page.get_by_role("button", name="Copy").click()
        expect(page.locator("#copy")).to_have_text("Copied")
        code[form] = page.evaluate("navigator.clipboard.readText()")
        expect(page.locator("#copy")).to_have_text("Copy")
    expected = json.loads(ask(page_url, "detect?model=shapes&threshold=0.5"))
    assert json.loads(code["json"]) == expected
    if shutil.which("curl"):
        assert json.loads(subprocess.check_output(["bash", "-c", code["curl"] + " --silent"])) == expected
    client = MagicMock()
    monkeypatch.setitem(sys.modules, "openai", SimpleNamespace(OpenAI=client))
    exec(code["python"], {})
    assert client.call_args.kwargs["base_url"] == f"{page_url}v1/"
    sent = client.return_value.chat.completions.create.call_args.kwargs
    assert sent["model"] == "shapes"
    prefix, data = sent["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(data) == SHAPES
