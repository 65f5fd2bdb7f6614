"""What the tests of the page share: images, answers of the service, and actions in the browser."""

import io
import re

from PIL import Image

from conditional_detr.data.synthetic import draw_image

CONSOLE_KINDS = ("error", "warning")  # that a page must not print
DETECT = re.compile(r"/v1/detect\?")


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


SHAPES = png(draw_image(7, 3, size=(480, 640))[0])
BLANK = png(Image.new("RGB", (200, 100), "white"))


def choose(page, data, name="image.png", kind="image/png"):
    page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})


def detection(label, score, *box):
    return {"label": label, "score": score, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}


def reply(page, detections):
    page.route(DETECT, lambda route: route.fulfill(json=detections))


def slide(page, value):
    page.locator("#threshold").fill(str(value))


def expect_count(page, count):
    from playwright.sync_api import expect

    expect(page.locator("#rows tr")).to_have_count(count)
    expect(page.locator("#overlay .box")).to_have_count(count)
    expect(page.locator("#overlay .label")).to_have_count(count)
