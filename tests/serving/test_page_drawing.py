"""What the page draws in a real browser: boxes, labels, the annotated image, and the camera."""

import io
import re

import pytest
from PIL import Image

from helpers.browser import BLANK, DETECT, choose, detection, expect_count, png, reply

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect


def test_boxes_lie_where_the_service_says(page):
    reply(page, [detection("a", 0.9, 20, 10, 120, 60)])
    choose(page, BLANK)
    expect_count(page, 1)
    frame, box = page.locator("#frame").bounding_box(), page.locator("#overlay .box rect").last.bounding_box()
    assert (frame["width"], frame["height"]) == (600, 300)  # small images are shown three times as large
    assert box["x"] - frame["x"] == pytest.approx(60, abs=2)  # Chromium's bounding boxes include the line
    assert box["y"] - frame["y"] == pytest.approx(30, abs=2)
    assert (box["width"], box["height"]) == pytest.approx((300, 150), abs=4)


def test_an_image_is_shown_upright(page):
    image, buffer = Image.new("RGB", (80, 40)), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(buffer, "JPEG", exif=exif)
    choose(page, buffer.getvalue(), "image.jpg", "image/jpeg")
    expect(page.locator("#status")).to_contain_text("40 \u00d7 80 pixels")


def test_the_downloaded_image_has_full_resolution_and_the_boxes(page):
    reply(page, [detection("a", 0.9, 500, 400, 1500, 1200)])
    choose(page, png(Image.new("RGB", (2000, 1600), "white")))
    expect_count(page, 1)
    with page.expect_download() as saved:
        page.locator("#download").click()
    assert saved.value.suggested_filename == "image-detections.png"
    image = Image.open(saved.value.path()).convert("RGB")
    assert image.size == (2000, 1600)
    assert image.getpixel((1000, 800)) == image.getpixel((100, 100)) == (255, 255, 255)
    fill = page.locator("#overlay .label rect").get_attribute("fill")
    colour = tuple(map(int, re.findall(r"\d+", fill)))
    assert [image.getpixel(at) for at in ((500, 800), (1500, 800), (1000, 400), (1000, 1200))] == [colour] * 4


def luminance(colour):
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_names_contrast_with_the_colours_of_their_classes(page):
    reply(page, [detection(f"class {i}", 0.9, 5, 5, 50, 50) for i in range(91)])
    choose(page, BLANK)
    expect_count(page, 91)
    script = "label => [label.querySelector('rect'), label.querySelector('text')].map(it => it.getAttribute('fill'))"
    colours = page.locator("#overlay .label").evaluate_all(f"labels => labels.map({script})")
    assert len({back for back, _ in colours}) > 80
    for back, front in colours:
        values = [luminance([int(part) / 255 for part in re.findall(r"\d+", back)]), {"#000": 0.0, "#fff": 1.0}[front]]
        assert (max(values) + 0.05) / (min(values) + 0.05) >= 4.5  # WCAG 2, level AA


def test_labels_of_equal_boxes_lie_apart_and_inside_the_image(page):
    reply(page, [detection("name", 0.9 - i / 100, 0, 0, 150, 60) for i in range(5)])
    choose(page, BLANK)
    expect_count(page, 5)
    frame = page.locator("#frame").bounding_box()
    places = [label.bounding_box() for label in page.locator("#overlay .label rect").all()]
    for i, a in enumerate(places):
        assert frame["x"] <= a["x"] + 0.1
        assert a["x"] + a["width"] <= frame["x"] + frame["width"] + 0.1
        for b in places[:i]:
            beside = a["x"] + a["width"] <= b["x"] + 0.1 or b["x"] + b["width"] <= a["x"] + 0.1
            assert beside or a["y"] + a["height"] <= b["y"] + 0.1 or b["y"] + b["height"] <= a["y"] + 0.1


def test_a_label_without_room_is_shown_while_its_row_is_highlighted(page):
    reply(page, [detection("name", 0.9, 0, 0, 150, 60) for _ in range(60)])
    choose(page, BLANK)
    expect_count(page, 60)
    last = page.locator("#overlay .label[data-index='59']")
    expect(page.locator("#overlay .label[data-index='0']")).to_be_visible()
    expect(last).to_be_hidden()
    page.locator("#rows tr").last.hover()
    expect(last).to_be_visible()


def test_live_detection_asks_one_frame_at_a_time(page):
    page.context.grant_permissions(["camera"])
    open_requests, most, answered = 0, 0, 0

    def began(request):
        nonlocal open_requests, most
        open_requests += "/v1/detect" in request.url
        most = max(most, open_requests)

    def ended(request):
        nonlocal open_requests, answered
        open_requests -= "/v1/detect" in request.url
        answered += "/v1/detect" in request.url

    page.on("request", began)
    page.on("requestfinished", ended)
    reply(page, [detection("seen", 0.9, 5, 5, 90, 50)])
    page.locator("#camera").click()
    page.locator("#live").click()
    expect(page.locator("#status")).to_have_text(
        re.compile(r"\d+ \u00d7 \d+ pixels · 1 detection · \d+\.\d frames a second")
    )
    page.wait_for_timeout(500)
    assert answered > 2
    assert most == 1
    page.locator("#camera-close").click()  # the last frame stays
    expect(page.locator("#image")).to_be_visible()
    expect_count(page, 1)
    before = answered
    page.wait_for_timeout(300)
    assert answered == before
    assert page.locator("#video").evaluate("video => video.srcObject") is None


def test_a_photo_is_an_image(page):
    page.context.grant_permissions(["camera"])
    page.locator("#camera").click()
    with page.expect_request(DETECT) as asked:
        page.locator("#photo").click()
    assert asked.value.headers["content-type"] == "image/jpeg"
    expect(page.locator("#name")).to_have_text("photo.jpg")
    expect(page.locator("#status")).to_have_text(re.compile(r"\d+ \u00d7 \d+ pixels · \d+ detections? · \d+ ms"))


def test_a_camera_that_is_denied_is_an_error(page):
    page.locator("#camera").click()
    expect(page.get_by_role("alert")).to_have_text("The browser does not allow this page to use the camera.")
