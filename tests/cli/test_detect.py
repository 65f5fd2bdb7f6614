"""``conditional-detr detect`` and ``attention``: from the shell's words to files and exit codes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path, PurePath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou
from typer.testing import CliRunner

from conditional_detr import DETR, Detections, Detector, Preprocessing
from conditional_detr.cli import app
from conditional_detr.data.synthetic import draw_image, image_index
from conditional_detr.inference.listing import ListedImage, list_images
from conditional_detr.inference.results import open_results
from helpers.models import TINY_CONFIG

PLAIN = Preprocessing(480, 640)


def run(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def detect(small, tmp_path):
    """Run the command with the tiny weights, into a folder of the test."""

    def detect(*arguments, output=tmp_path / "out", stdin=None):
        return run("detect", "--weights", small, "--output", output, "--device", "cpu", *arguments, stdin=stdin)

    return detect


def test_demo_finds_the_shapes_that_were_drawn(tmp_path, monkeypatch):
    """An image that no training has seen, with the weights that are shipped, and no network; again, the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()  # as a data set of shapes may be called
    result = run("detect", "--demo", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert files_in(tmp_path) == [f"detections/{name}" for name in ("demo-image.png", "demo.json", "demo.png")]
    assert len(Detector.from_pretrained("shapes")("detections/demo-image.png")) > 2
    _, boxes, labels = draw_image(0, image_index("demo", 23))
    with Image.open("detections/demo-image.png") as image:
        assert image.tobytes() == draw_image(0, image_index("demo", 23))[0].tobytes()
    written = json.loads(Path("detections/demo.json").read_text())
    found = [(entry["label"], entry["box"]) for entry in written["detections"]]
    for label, box in zip(labels.tolist(), boxes, strict=True):
        same = torch.tensor([place for which, place in found if which == label])
        assert box_iou(same, torch.tensor(box[None], dtype=same.dtype)).max() > 0.7
    assert len(found) == len(labels)
    again = run("detect", "--demo", "--device", "cpu")
    assert again.exit_code == 0, again.output
    assert json.loads(Path("detections/demo.json").read_text()) == written


def test_demo_leaves_an_image_of_that_name(tmp_path, small):
    """Nothing is written, until it is asked for."""
    Image.new("RGB", (9, 9)).save(tmp_path / "demo-image.png")
    before = (tmp_path / "demo-image.png").read_bytes()
    result = run("detect", "--demo", "--weights", small, "--device", "cpu", "--output", tmp_path)
    assert result.exit_code == 2
    assert "expected no file or the demo image, got another image" in result.stderr
    assert (tmp_path / "demo-image.png").read_bytes() == before
    assert files_in(tmp_path) == ["demo-image.png"]
    result = run("detect", "--demo", "--weights", small, "--device", "cpu", "--output", tmp_path, "--overwrite")
    assert result.exit_code == 0, result.output


def test_demo_takes_other_weights_and_no_images(small, detect, photograph):
    result = detect("--demo", "--threshold", 0)
    assert result.exit_code == 0, result.output
    assert "77 objects" in result.output
    for arguments, got in [(("--demo", photograph), "both"), ((), "neither")]:
        refused = detect(*arguments)
        assert refused.exit_code == 2
        assert refused.stderr == f"error: images: expected either images or --demo, got {got}\n"


@pytest.fixture
def folder(tmp_path):
    """Images of several sizes, in folders, and what is no image."""
    generator = np.random.default_rng(5)
    folder = tmp_path / "images"
    for name, size in [("b.png", (40, 60)), ("a.jpg", (60, 40)), ("deep/er/c.webp", (40, 60)), ("deep/a.bmp", (9, 9))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def files_in(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_one_image_is_printed_drawn_and_written(detect, small, photograph, tmp_path):
    result = detect(photograph, "--threshold", 0.3, "--top-k", 4)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "photograph.json").read_text())
    expected = Detector.from_pretrained(small)(photograph, threshold=0.3, top_k=4)
    settings = written.pop("settings")
    assert (settings["threshold"], settings["top_k"], settings["classes"]) == (0.3, 4, None)
    assert written == {"image": str(photograph), **expected.to_dict()}
    with Image.open(tmp_path / "out" / "photograph.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(expected.draw()))
    assert "4 objects" in result.output
    assert f"{expected.scores[0]:.3f}" in result.output
    assert f"1 image, 4 objects; written to {tmp_path / 'out'}" in result.output


def test_a_folder_with_all_below_it(detect, folder, tmp_path):
    result = detect(folder, "--threshold", 0)
    assert result.exit_code == 0, result.output
    names = ["a.jpg", "a.json", "b.json", "b.png", "deep/a.json", "deep/a.png", "deep/er/c.json", "deep/er/c.png"]
    assert files_in(tmp_path / "out") == names
    assert "4 images, 308 objects" in result.output
    assert "skipped files in folders that are no images: 1" in result.stderr
    rows = {line.split("│")[1].strip(): line.split("│")[2:4] for line in result.stdout.splitlines() if "│" in line}
    counts = {name: [int(cell) for cell in cells] for name, cells in rows.items() if name.startswith("LABEL")}
    assert counts == {f"LABEL_{i}": [44, 4] for i in range(7)}


def test_globs_lists_and_doubles(detect, folder, tmp_path):
    result = detect(str(folder / "**" / "a.*"), "-", "--no-draw", stdin=f"{folder / 'b.png'}\n\n{folder / 'a.jpg'}\n")
    assert result.exit_code == 0, result.output
    assert files_in(tmp_path / "out") == ["a-2.json", "a.json", "b.json", "deep/a.json"]
    sources = [json.loads((tmp_path / "out" / f"{n}.json").read_text())["image"] for n in ("a", "deep/a", "a-2")]
    assert sources == [str(folder / "a.jpg"), str(folder / "deep" / "a.bmp"), str(folder / "a.jpg")]


def test_names_of_results():
    listed = list_images(
        ["x/a.jpg", "y/A.png", "http://host/p/my%20cat.jpg?q=1", "http://host/", "a-2.gif", "no.jpg"],
        output=Path("out"),
    )
    assert [str(which.output) for which in listed.images] == ["a", "A-2", "my_cat", "image", "a-2-2", "no"]


def test_former_results_are_no_images_of_a_folder(folder):
    shutil.copytree(folder / "deep", folder / "out" / "deep")
    assert len(list_images([str(folder)], output=folder / "out").images) == 4
    assert len(list_images([str(folder)], output=folder / "other").images) == 6


def test_a_bad_image_stops_nothing_and_is_listed(detect, folder, tmp_path):
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    result = detect(folder, "missing.png", "--no-draw", "--batch-size", 1)
    assert result.exit_code == 1
    assert len(files_in(tmp_path / "out")) == 4
    assert "2 of 6 images failed:" in result.stderr
    assert f"  {folder / 'broken.jpg'}: the image cannot be read" in result.stderr
    assert "  missing.png: no such file" in result.stderr
    assert "4 images, " in result.stdout
    assert f"; written to {tmp_path / 'out'}" in result.stdout
    nothing = detect("missing.png", output=tmp_path / "none")
    assert nothing.exit_code == 1
    assert "written" not in nothing.output


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (None, ("--threshold", "2"), "error: threshold: expected 0..1, got 2.0"),
        (None, ("--device", "abacus"), "error: device: expected one that this machine has, got 'abacus'"),
        (
            None,
            ("--class", "cow"),
            "error: classes: expected names or rows of the model's classes, got 'cow'; the names are LABEL_0, LABEL_1",
        ),
        ("no*.jpg", (), "error: no*.jpg: no file matches"),
        (".", (), "error: .: expected a folder with images, got one with 0 other files"),
        ("-", (), "error: images: expected at least one, got none"),
    ],
)
def test_what_cannot_begin(detect, photograph, tmp_path, monkeypatch, images, options, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    result = detect(images or photograph, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists() or files_in(tmp_path / "out") == []


def test_originals_are_never_overwritten(detect, folder):
    before = (folder / "a.jpg").read_bytes()
    result = detect(folder, output=folder)
    assert result.exit_code == 2
    assert "is one of the input images and would be overwritten by an annotated image" in result.stderr
    assert (folder / "a.jpg").read_bytes() == before
    assert detect(folder, "--no-draw", output=folder).exit_code == 0


def test_resuming_json_passes_over_what_is_there(detect, folder, tmp_path):
    detect(folder / "a.jpg", "--no-draw")
    marked = tmp_path / "out" / "a.json"
    marked.write_text(marked.read_text().replace('"size"', '"mark": 1, "size"'))
    result = detect(folder, "--resume", "--no-draw")
    assert result.exit_code == 0
    assert "skipped images that already have results: 1 of 4" in result.stderr
    assert "mark" in json.loads(marked.read_text())
    assert len(files_in(tmp_path / "out")) == 4
    assert detect(folder, "--no-draw").exit_code == 0
    assert "mark" not in json.loads(marked.read_text())


@pytest.mark.parametrize("format", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (("--threshold", 0.3), r"threshold 0\.5, not 0\.3"),
        (("--top-k", 7), "top_k 100, not 7"),
        (("--class", "LABEL_1"), r"classes None, not \['LABEL_1'\]"),
        (("--weights", "shapes"), r"model \w{16}, not \w{16}"),
    ],
)
def test_results_of_other_settings_are_not_added_to(detect, folder, tmp_path, format, options, difference):
    """Whatever decides the detections is recorded with them; a run with the same settings continues."""
    same = ("--no-draw", "--format", format)
    assert detect(folder / "a.jpg", *same).exit_code == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    result = detect(folder, *same, "--resume", *options)
    assert result.exit_code == 2
    pattern = f"expected results of the settings of this run, got {difference}; --overwrite replaces them"
    assert re.search(pattern, result.stderr), result.stderr
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")} == before
    result = detect(folder, *same, "--resume", "--batch-size", 1)
    assert result.exit_code == 0, result.stderr
    assert "skipped images that already have results: 1 of 4" in result.stderr


def test_tiles_are_those_of_python(detect, small, photograph, tmp_path):
    """And are recorded: a run with others does not continue the results."""
    options = ("--tile", "48x64", "--overlap", 0.3, "--augment", "--threshold", 0.1, "--top-k", 300)
    result = detect(photograph, *options)
    assert result.exit_code == 0, result.output
    written = json.loads(next((tmp_path / "out").rglob("*.json")).read_text())
    expected = Detector.from_pretrained(small)(
        photograph, tile=(48, 64), overlap=0.3, augment=True, threshold=0.1, top_k=300
    )
    assert len(expected) > 5
    found = written["detections"]
    assert [entry["name"] for entry in found] == list(expected.names)
    torch.testing.assert_close(torch.tensor([entry["box"] for entry in found]), expected.boxes, rtol=0, atol=0.01)
    recorded = {name: written["settings"][name] for name in ("tile", "overlap", "augment")}
    assert recorded == {"tile": [48, 64], "overlap": 0.3, "augment": True}
    refused = detect(photograph, *options[:3], 0.2, *options[4:], "--resume")
    assert refused.exit_code == 2
    assert "expected results of the settings of this run, got overlap 0.3, not 0.2" in refused.stderr
    refused = detect(photograph, "--tile", "800,600", output=tmp_path / "other")
    assert refused.exit_code == 2
    assert "--tile: expected a side such as 800, or height and width such as 600x800, got '800,600'" in refused.stderr


def test_the_settings_name_the_weights(small, tmp_path):
    """The same weights under another path are the same; another value, class name or preprocessing is not."""
    shutil.copytree(small, tmp_path / "copy")
    first, copy = Detector.from_pretrained(small), Detector.from_pretrained(tmp_path / "copy")
    expected = first.settings(first.postprocessing())
    assert copy.settings(copy.postprocessing()) == expected
    with torch.no_grad():
        copy.model.box_head.layers[-1].bias[0] += 1e-3
    others = [copy]
    for field, value in (("class_names", ("other", *first.model.metadata.class_names[1:])), ("preprocessing", PLAIN)):
        model = Detector.from_pretrained(small).model
        model.metadata = replace(model.metadata, **{field: value})
        others.append(Detector(model))
    assert len({other.settings(other.postprocessing())["model"] for other in others} | {expected["model"]}) == 4


@pytest.mark.parametrize("format", ["json", "jsonl", "csv"])
def test_one_image_by_several_names_has_one_result(detect, folder, tmp_path, monkeypatch, format):
    """With ./, as an absolute path, and through a link."""
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to(folder)
    options = ("--no-draw", "--format", format)
    assert detect("images", *options).exit_code == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    for name in ("./images", folder, "link"):
        result = detect(name, *options, "--resume")
        assert "skipped images that already have results: 4 of 4" in result.stderr, result.stderr
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")} == before


@pytest.mark.parametrize("option", ["--resume", "--no-draw"])
def test_what_is_not_this_images_is_never_overwritten(detect, folder, tmp_path, option):
    """Another image's results, somebody's own json, somebody's own image: an error, unless told to."""
    detect(folder / "a.jpg", "--no-draw")
    other = detect(folder / "deep" / "a.bmp", option)
    assert other.exit_code == 2
    assert f"a.json: expected the detections of {folder / 'deep' / 'a.bmp'}, got a file with" in other.stderr
    assert f"the detections of {folder / 'a.jpg'}; --overwrite replaces it" in other.stderr
    (tmp_path / "out" / "b.json").write_text('{"shapes": []}')
    foreign = detect(folder / "b.png", option)
    assert foreign.exit_code == 2
    assert "got a file with something other than detections" in foreign.stderr
    (tmp_path / "out" / "c.png").write_bytes(b"mine")
    image = detect(folder / "deep" / "er" / "c.webp")
    assert image.exit_code == 2
    assert "c.png: expected no file, or the annotated image of an earlier run" in image.stderr
    assert (tmp_path / "out" / "c.png").read_bytes() == b"mine"
    assert detect(folder / "b.png", folder / "deep" / "er" / "c.webp", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "out" / "b.json").read_text())["image"] == str(folder / "b.png")
    assert detect(folder, "--resume", "--overwrite").exit_code == 2


def test_lines_resumed_after_a_kill_are_those_of_one_run(detect, folder, tmp_path):
    assert detect(folder, "--format", "jsonl", "--no-draw", output=tmp_path / "whole").exit_code == 0
    whole = (tmp_path / "whole" / "detections.jsonl").read_bytes()
    assert [Path(json.loads(line)["image"]).name for line in whole.splitlines()] == [
        "a.jpg",
        "b.png",
        "a.bmp",
        "c.webp",
    ]
    (tmp_path / "out").mkdir()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out" / "detections.jsonl").write_bytes(lines[0] + lines[1][:50])
    refused = detect(folder, "--format", "jsonl", "--no-draw")
    assert refused.exit_code == 2
    assert "detections.jsonl: already exists; --resume adds to it, --overwrite replaces it" in refused.stderr
    assert detect(folder, "--format", "jsonl", "--no-draw", "--resume").exit_code == 0
    again = [json.loads(line) for line in (tmp_path / "out" / "detections.jsonl").read_bytes().splitlines()]
    assert [line["image"] for line in again] == [json.loads(line)["image"] for line in lines]
    assert detect(folder, "--format", "jsonl", "--no-draw", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "detections.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-2", "'-2"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("  =1", "'  =1"),
        ("\t1", "'\t1"),
        ("\n=1", "'\n=1"),
        ("\uff1d1", "'\uff1d1"),
        ("dog=1", "dog=1"),
        ('a,"b"', 'a,"b"'),
        ("\ud800", r"\ud800"),
    ],
)
def test_csv_for_spreadsheets(tmp_path, name, safe):
    """Names are written as they are; with csv_safe no cell is a formula. Numbers stay numbers."""
    made = Detections(
        boxes=torch.tensor([[-1.0, 2, 3, 4]]),
        scores=torch.tensor([0.5]),
        labels=torch.tensor([0]),
        names=(name,),
        category_ids=(0,),
        queries=torch.tensor([0]),
        size=(9, 9),
        source=None,
    )
    for csv_safe, expected in ((False, safe if "\\" in safe else name), (True, safe)):
        folder = tmp_path / str(csv_safe)
        with open_results("csv", folder, csv_safe=csv_safe) as results:
            results.write(ListedImage("=a.jpg", PurePath("a")), made)
        with (folder / "detections.csv").open(newline="", encoding="utf-8") as file:
            _, row = csv.reader(file)
        assert row == ["'=a.jpg" if csv_safe else "=a.jpg", expected, "0.5", "-1.0", "2.0", "3.0", "4.0", "0"]


def test_csv_safe_needs_a_table(detect, folder):
    result = detect(folder, "--csv-safe")
    assert result.exit_code == 2
    assert result.stderr == "error: --csv-safe: expected --format csv with it, got json\n"
    assert detect(folder, "--csv-safe", "--format", "csv", "--no-draw").exit_code == 0


@pytest.mark.parametrize("change", [{"image": 3}, {"detections": 3}, {"settings": [1]}, {"settings": "none"}])
@pytest.mark.parametrize("format", ["json", "jsonl"])
def test_results_of_another_form_are_named(detect, folder, tmp_path, change, format):
    options = (folder / "a.jpg", "--no-draw", "--format", format)
    assert detect(*options).exit_code == 0
    path = tmp_path / "out" / ("a.json" if format == "json" else "detections.jsonl")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) + "\n")
    result = detect(*options, "--resume")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}")
    assert "expected" in result.stderr


def test_csv_has_a_row_an_object(detect, folder, tmp_path):
    result = detect(folder, "--format", "csv", "--no-draw", "--threshold", 0, "--top-k", 3)
    assert result.exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "detections.jsonl").read_text().splitlines()]
    with (tmp_path / "out" / "detections.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    objects = [(line["image"], found) for line in lines for found in line["detections"]]
    for row, (image, found) in zip(rows, objects, strict=True):
        assert (row["image"], row["name"], int(row["label"])) == (image, found["name"], found["label"])
        assert [float(row[key]) for key in ("x0", "y0", "x1", "y1")] == found["box"]
        assert float(row["score"]) == found["score"]


def test_a_journal_of_something_else_is_named(detect, folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.jsonl").write_text('{"epoch": 3}\n')
    result = detect(folder, "--format", "jsonl", "--resume", "--no-draw")
    assert result.exit_code == 2
    assert "detections.jsonl, line 1: expected the detections of one image as JSON" in result.stderr


def torchrun(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", "from conditional_detr.cli import app; app()", "detect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_processes_share_the_images(small, detect, folder, tmp_path):
    """An image that one of them cannot read costs the others nothing, and all end with 1."""
    (folder / "aa.jpg").write_bytes(b"no image")
    options = ("--weights", small, "--output", tmp_path / "out", "--device", "cpu", "--format", "csv", "--no-draw")
    result = torchrun(folder, *options)
    assert result.returncode == 1, result.stderr
    assert "exitcode  : 1" in result.stderr
    assert "aa.jpg: expected an image, got a text file" in result.stderr
    parts = [(tmp_path / "out" / f"detections-{rank}-of-2.jsonl").read_text().splitlines() for rank in (1, 2)]
    assert [len(part) for part in parts] == [3, 1]
    lines = [json.loads(line) for part in parts for line in part]
    with (tmp_path / "out" / "detections.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(len(line["detections"]) for line in lines)
    (folder / "aa.jpg").unlink()
    assert (
        "skipped images that already have results: 4 of 4"
        in detect(folder, "--format", "jsonl", "--resume", "--no-draw").stderr
    )
    images = {line["image"] for line in lines}
    assert images == {which.image for which in list_images([str(folder)], output=tmp_path / "out").images}


def test_a_closed_standard_input(detect, monkeypatch):
    monkeypatch.setattr("conditional_detr.inference.listing.sys", SimpleNamespace(stdin=None))
    refused = detect("-")
    assert refused.exit_code == 2
    assert refused.stderr == "error: images: expected one per line from standard input, got a closed one\n"


def test_results_in_a_file(detect, photograph, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused = detect(photograph, output=tmp_path / "file")
    assert refused.exit_code == 2
    assert refused.stderr.endswith("file: expected a folder for results, got a file\n")


def test_processes_cannot_share_standard_input(small, folder, tmp_path, monkeypatch):
    from torch import distributed

    monkeypatch.setattr(distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("detect", "-", "--weights", small, "--output", tmp_path, stdin=str(folder / "a.jpg"))
    assert result.exit_code == 2
    assert "'-' can be read only once" in result.stderr
    monkeypatch.setenv("RANK", "5")
    result = run("detect", folder, "--weights", small, "--output", tmp_path)
    assert result.stderr.startswith("error: expected RANK and WORLD_SIZE as torchrun sets them, got {'RANK': '5'")


@pytest.mark.skipif(os.name != "posix", reason="file names as POSIX has them")
def test_odd_names_stop_nothing(detect, folder, tmp_path):
    image = (folder / "b.png").read_bytes()
    odd = ["-dash.png", "new\nline.png", "[bold]b.png", "ü 猫.png", "x" * 251 + ".png"]
    for name in odd:
        (folder / name).write_bytes(image)
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.png")).write_bytes(image)
    result = detect(folder)
    assert result.exit_code == 1, result.output
    assert "1 of 10 images failed:" in result.stderr
    assert f"{'x' * 251}.png" in result.stderr
    assert "cannot be written: File name too long" in result.stderr
    assert len(list((tmp_path / "out").rglob("*.json"))) == 9
    assert not list((tmp_path / "out").glob(".*"))
    again = detect(folder, "--format", "csv", "--no-draw", output=tmp_path / "csv")
    assert again.exit_code == 0, again.output


def test_links_in_circles_and_to_folders(folder, tmp_path):
    (folder / "deep" / "circle").symlink_to(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "b.png", elsewhere / "linked.png")
    (folder / "link").symlink_to(elsewhere)
    listed = list_images([str(folder)], output=tmp_path / "out").images
    assert [str(which.output) for which in listed] == ["a", "b", "deep/a", "deep/er/c", "link/linked"]
    matched = list_images([str(folder / "**" / "b.png")], output=tmp_path / "out").images
    assert [which.image for which in matched] == [str(folder / "b.png")]


def test_a_glob_passes_over_former_results(folder, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copytree("deep", "detections/deep")
    listed = list_images(["**/*.bmp"], output=Path("detections")).images
    assert [which.image for which in listed] == ["deep/a.bmp"]


def test_lines_of_standard_input_are_names_and_no_patterns(detect, folder):
    result = detect("-", "--no-draw", stdin=f"\ufeff{folder / 'a.jpg'}\ngone[1].jpg\n{'A' * 5000}\n")
    assert result.exit_code == 1
    assert "2 of 3 images failed:" in result.stderr
    assert "  gone[1].jpg: no such file" in result.stderr
    assert detect("").exit_code == 2


def test_class_names_are_no_markup(detect, small, photograph, tmp_path):
    from conditional_detr import ConditionalDETR, Metadata

    model = ConditionalDETR.from_pretrained(small)
    model.metadata = Metadata([f"dog [/b] {i} [small]" for i in range(7)], preprocessing=model.metadata.preprocessing)
    model.save_pretrained(tmp_path / "named")
    result = detect(photograph, "--threshold", 0, "--weights", tmp_path / "named")
    assert result.exit_code == 0, result.output
    assert "[/b]" in result.stdout
    assert "[small]" in result.stdout


def test_a_font_that_is_none_is_told_at_once(detect, photograph, tmp_path):
    result = detect(photograph, "--font", photograph)
    assert result.exit_code == 2
    assert "photograph.png: expected a TrueType font file that can be read" in result.stderr


def test_a_full_disk_stops_with_one_line(detect, folder, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    result = detect(folder)
    assert result.exit_code == 1
    error, told = result.stderr.splitlines()[-2:]
    assert re.fullmatch(r"error: .*\.(jpg|png): cannot be written: No space left on device", error)
    assert told == "stopped after 0 of 4 images; --resume continues"
    assert files_in(tmp_path / "out") == []


def test_too_many_pixels(detect, folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    result = detect(folder, "--max-pixels", 1000, "--no-draw")
    assert result.exit_code == 1
    assert "3 of 4 images failed:" in result.stderr
    assert "b.png: Image size (2400 pixels) exceeds limit of 1000 pixels" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_ctrl_c_says_how_to_go_on(small, folder, tmp_path):
    """A process of its own, interrupted amid a thousand images; resuming does the rest."""
    listed = tmp_path / "list.txt"
    listed.write_text(f"{folder / 'b.png'}\n" * 1000)
    # a shell that starts the tests in the background has its children ignore the signal
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "\nfrom conditional_detr.cli import app; app()"
    command = [sys.executable, "-c", code, "detect", "-", "--no-draw"]
    command += ["--weights", small, "--output", tmp_path / "out", "--device", "cpu"]
    with listed.open() as stdin:
        process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (tmp_path / "out").exists() or len(list((tmp_path / "out").iterdir())) < 3:
            time.sleep(0.05)
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    done = len(files_in(tmp_path / "out"))
    told = int(re.search(r"interrupted after (\d+) of 1000 images; --resume continues", stderr)[1])
    assert done - told in (0, 1), "the signal may come between writing and counting"
    assert "Traceback" not in stderr
    assert all(json.loads((tmp_path / "out" / name).read_text()) for name in files_in(tmp_path / "out"))


def test_without_network_one_line_says_what_to_do(photograph, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    result = run("detect", photograph)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: weights 'microsoft/conditional-detr-resnet-50': no such file or folder;")
    assert "pass a folder or file on disk" in result.stderr
    assert result.stderr.count("\n") == 1


def test_attention(small, photograph, tmp_path):
    options = ("--weights", small, "--output", tmp_path, "--device", "cpu", "--class", "LABEL_3", "--layer", 0)
    result = run("attention", photograph, "--object", 2, *options)
    assert result.exit_code == 0, result.output
    detector = Detector.from_pretrained(small)
    found = detector(photograph, threshold=0, top_k=2, classes=["LABEL_3"])
    with Image.open(tmp_path / "photograph-attention-2.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(detector.draw_attention(found, 1, layers=(0,))))
    assert result.stdout.startswith(f"LABEL_3 {found.scores[1]:.3f} at ")
    refused = run("attention", photograph, "--object", 99, *options)
    assert refused.exit_code == 2
    assert refused.stderr == "error: --object: expected 1 to 11, the number of detections, got 99\n"
    refused = run("attention", photograph, *options[:-1], 3)
    assert refused.stderr.startswith("error: layers: expected one or more of -3..2, got (3,)")


def test_attention_of_several_models_for_the_same_object(small, photograph, tmp_path):
    """Below one another, each for its detection that overlaps the first model's most: here its own, found again."""
    torch.manual_seed(1)
    other = DETR(replace(TINY_CONFIG, num_queries=9), Detector.from_pretrained(small).model.metadata)
    other.save_pretrained(tmp_path / "other")
    names = [small, tmp_path / "other", small]
    options = [part for name in names for part in ("--weights", name)]
    result = run("attention", photograph, "--object", 3, *options, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    detectors = [Detector.from_pretrained(name) for name in names]
    found = [detector(photograph, threshold=0, top_k=11) for detector in detectors]
    overlaps = [box_iou(found[0].boxes[2:3], one.boxes)[0] for one in found]
    chosen = [int(overlap.argmax()) for overlap in overlaps]
    assert chosen[0] == chosen[2] == 2
    drawn = [
        np.asarray(detector.draw_attention(one, index, name=str(name)))
        for detector, one, index, name in zip(detectors, found, chosen, names, strict=True)
    ]
    with Image.open(tmp_path / "photograph-attention-3.png") as image:
        assert np.array_equal(np.asarray(image), np.concatenate(drawn))
    assert f"IoU {overlaps[1].max():.2f} with the first" in result.stdout.splitlines()[1]
    assert "IoU 1.00 with the first" in result.stdout.splitlines()[2]


def test_help_version_and_completion(monkeypatch):
    from importlib.metadata import version

    shown = run("--help").output
    assert all(command in shown for command in ("detect", "attention", "info", "convert"))
    assert run("--version").output == version("conditional-detr") + "\n"
    assert run().exit_code == 2
    complete = {"_CONDITIONAL_DETR_COMPLETE": "complete_bash", "COMP_WORDS": "conditional-detr at", "COMP_CWORD": "1"}
    words = CliRunner().invoke(app, [], env=complete, prog_name="conditional-detr").output
    assert words.split() == ["attention"]
