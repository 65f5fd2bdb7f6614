"""The report: one page that needs nothing else, with the names of strangers as text."""

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from conditional_detr.analysis.analysis import analyse_detections
from conditional_detr.analysis.gallery import CELL, GAP, draw_gallery
from conditional_detr.analysis.report import FILES, write_report
from helpers.analysis import known_case

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<script>document.title='owned'</script>$\\frac$"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(1, 8):
        Image.new("RGB", (100, 80), (30 * i, 90, 90)).save(folder / f"{i}.png")
    return folder


def case(name="cat"):
    content, results = known_case()
    content["categories"][1]["name"] = name
    return analyse_detections(content, results)


@pytest.fixture(scope="module")
def report(images, tmp_path_factory):
    """The folder of a report whose class name is a script."""
    analysis = case(EVIL)
    folder = tmp_path_factory.mktemp("report") / "new"
    paths = write_report(analysis, folder, draw_gallery(analysis, images, count=2))
    assert [path.name for path in paths] == list(FILES)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return folder


class Page(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.tags, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_has_all_in_it(report):
    page = Page((report / "report.html").read_text())
    assert {source.partition(",")[0] for source in page.sources} == {"data:image/png;base64", "data:image/jpeg;base64"}
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert len(page.sources) == 5 + 6
    for text in (EVIL, "2.png: 1 false positives, 1 missed", "a confident detection whose box differs"):
        assert text in page.text


def test_json_files(report):
    analysis = case(EVIL)
    assert json.loads((report / "analysis.json").read_text()) == analysis.to_dict()
    assert json.loads((report / "thresholds.json").read_text()) == {"dog": 0.5, EVIL: pytest.approx(0.775)}


def test_plots_are_images(report):
    for path in report.glob("*.png"):
        with Image.open(path) as plot:
            assert plot.format == "PNG"
            assert len(np.unique(np.asarray(plot.convert("L")))) > 20


@pytest.mark.parametrize("width", [1280, 390])
def test_opens_offline_in_a_browser(report, width):
    """Without a network, without scripts, and without scrolling sideways, also on a phone."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_context(offline=True, viewport={"width": width, "height": 800}).new_page()
        faults, requests = [], []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: requests.append(request.url.partition(":")[0]))
        page.goto((report / "report.html").as_uri())
        loaded = "[...document.images].map(image => image.complete && image.naturalWidth > 0)"
        assert page.evaluate(loaded) == [True] * 11
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.title().startswith("Error analysis")
        assert page.get_by_role("heading", name="Suspicious labels").is_visible()
        assert page.get_by_role("cell", name=EVIL).first.is_visible()
        browser.close()
    assert faults == []
    assert set(requests) <= {"file", "data"}


def test_gallery_side_by_side(images):
    """The missed object of image 7, around which nothing is detected: green on the left only."""
    gallery = draw_gallery(case(), images)
    assert [len(examples) for examples in gallery.values()] == [3, 3, 2]
    example = gallery["Missed objects"][-1]
    assert example.caption == "7.png: missed dog"
    width, height = example.image.size
    assert (width, max((width - GAP) // 2, height)) == (2 * CELL + GAP, CELL)
    left, right = example.image.crop((0, 0, CELL, height)), example.image.crop((CELL + GAP, 0, width, height))
    assert len(left.getcolors(10**6)) > 1
    assert right.getcolors() == [(CELL * height, (210, 90, 90))]


def test_gallery_reports_its_progress_and_is_limited(images):
    steps = []
    gallery = draw_gallery(case(), images, count=1, progress=lambda *done: steps.append(done))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert [len(examples) for examples in gallery.values()] == [1, 1, 1]
    assert draw_gallery(case(), images, count=0) == {title: [] for title in gallery}


def test_images_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"1\.png: no such file; 7 of the 7 images"):
        draw_gallery(case(), tmp_path)


def test_a_box_outside_its_image(images):
    content, results = known_case()
    content["annotations"][0]["bbox"] = [150, 120, 10, 10]
    content["annotations"][1]["bbox"] = [-20, -20, 10, 10]
    assert draw_gallery(analyse_detections(content, results), images)["Missed objects"]


def test_many_classes(images, tmp_path):
    """More than have a curve each, and more than a confusion matrix with numbers can show."""
    content, results = known_case()
    content["categories"] += [{"id": 100 + i, "name": f"_class {i} 猫"} for i in range(30)]
    content["annotations"] += [{"image_id": 6, "category_id": 100 + i, "bbox": [i, i, 5, 5]} for i in range(30)]
    write_report(analyse_detections(content, results), tmp_path, {})
    assert "_class 29 猫" in Page((tmp_path / "report.html").read_text()).text
