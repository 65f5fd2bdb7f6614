"""The real-time table: all frames, detections and AP are those of the detector at that size; errors come first."""

import json
import re
import statistics

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing
from conditional_detr.benchmark.realtime import VideoMeasurement, available, measure_realtime
from conditional_detr.benchmark.report import VIDEO_HEAD, video_table
from conditional_detr.cli import app
from conditional_detr.cli.benchmark import _printable
from conditional_detr.evaluation.coco import evaluate
from helpers.films import images_of, write_film
from helpers.models import LEAST_CONFIG

ENGINES = ["optimised", "optimised bf16", "ONNX Runtime", "OpenVINO", "OpenVINO bf16", "OpenVINO int8"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ConditionalDETR(LEAST_CONFIG).eval()
    torch.nn.init.normal_(model.class_head.bias, 0.0, 0.5)  # scores on both sides of the threshold
    model.metadata = Metadata(tuple("abcdefg"), preprocessing=Preprocessing(64, 96))
    return model


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4", 7, audio=None)


@pytest.fixture(scope="module")
def data(film, model):
    """The first frame as a dataset whose annotations are detections of the model at half the size."""
    folder = film.parent / "data"
    folder.mkdir()
    image = Image.fromarray(images_of(film)[0])
    image.save(folder / "0.png")
    half = ConditionalDETR(LEAST_CONFIG).eval()
    half.load_state_dict(model.state_dict())
    half.metadata = Metadata(tuple("abcdefg"), preprocessing=Preprocessing(32, 48))
    entries = [
        {"id": i + 1, "image_id": 0, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (box, label) in enumerate(
            ([x0, y0, x1 - x0, y1 - y0], int(label))
            for (x0, y0, x1, y1), label in zip(*_found(Detector(half), image), strict=True)
        )
    ]
    images = [{"id": 0, "file_name": "0.png", "width": image.width, "height": image.height}]
    categories = [{"id": i, "name": name} for i, name in enumerate("abcdefg")]
    path = film.parent / "data.json"
    path.write_text(json.dumps({"images": images, "annotations": entries, "categories": categories}))
    return path, folder, Detector(half)


def _found(detector, image):
    found = detector(image, threshold=0.6, top_k=5)
    return found.boxes.tolist(), found.labels.tolist()


def test_frames_detections_and_ap_are_those_of_the_detector(model, film, data):
    path, images, half = data
    steps = []
    options = {"data": path, "images": images, "rounds": 2, "progress": steps.append}
    found = measure_realtime(model, film, [32, None], engines=["optimised", "OpenVINO"], **options)
    assert [(one.engine, one.edge, one.size) for one in found] == [
        ("optimised", 32, (32, 42)),
        ("OpenVINO", 32, (32, 42)),
        ("optimised", None, (64, 85)),
        ("OpenVINO", None, (64, 85)),
    ]
    for one in found:
        detector = Detector(model) if one.edge is None else half
        counted = sum(len(detector(image)) for image in images_of(film))
        assert one.images == 7
        assert abs(one.objects - counted) <= 2  # scores at the threshold
        assert counted > 7
        assert one.ap == pytest.approx(evaluate(detector, path, images).metrics["AP"], abs=0.05)
        assert (one.ap > 0.9) == (one.edge == 32)  # whose own detections are the annotations
        assert len(one.seconds) == len(one.model_seconds) == len(one.ratios) == 2
        assert min(one.seconds) > 0
        assert one.share == pytest.approx(
            statistics.median(7 * alone / all_ for alone, all_ in zip(one.model_seconds, one.seconds, strict=True))
        )
    assert found[0].ratios == (1.0, 1.0)
    assert "OpenVINO: writing its files" in steps
    assert "7 frames, shorter side 32: OpenVINO" in steps


def test_available_engines(monkeypatch):
    assert available(torch.device("cpu")) == ENGINES
    assert available(torch.device("cuda")) == ENGINES[:2]
    monkeypatch.setattr("conditional_detr.benchmark.engines.find_spec", lambda name: None)
    assert available(torch.device("cpu")) == ENGINES[:2]


def test_the_table_fits_80_columns(capsys):
    from rich.console import Console

    case = {"threads": 2, "images": 64, "size": (480, 640), "objects": 100, "model_seconds": (0.5, 0.6), "edge": 480}
    times = {"seconds": (40.0, 32.0), "ratios": (10.25, 11.1), "megabytes": 12345.6}
    table = video_table([VideoMeasurement(engine=name, ap=0.12345, **case, **times) for name in ENGINES])
    assert table.title == "From a film to the annotated film: 64 frames, speedup over optimised"
    # a median of 36 s for 64 frames; shares 64 * 0.5 / 40 and 64 * 0.6 / 32
    assert table.rows[1] == ("optimised bf16", "480", "1.8", "100%", "10.68", "10.25 to 11.10", "12346", "0.123")
    Console(width=80).print(_printable(table))
    lines = capsys.readouterr().out.splitlines()
    for row in table.rows:
        (found,) = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith(f"{row[0]}  ")]
        assert found == [*row]
    assert len(VIDEO_HEAD) == len(table.rows[0])


def run(*arguments):
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, list(map(str, ["benchmark", "--device", "cpu", *arguments])))
    finally:
        torch.set_num_threads(threads)


def test_command(small, film, tmp_path, monkeypatch):
    monkeypatch.setattr("conditional_detr.benchmark.timing.product_rate", lambda *_: 1.0)
    options = ["--height", 64, "--width", 96, "--rounds", 1, "--engine", "optimised"]
    result = run("--weights", small, *options, "--video", film, "--video-size", 64, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    (one,) = json.loads((tmp_path / "benchmark.json").read_text())["videos"]
    assert (one["engine"], one["images"], one["edge"], one["ap"]) == ("optimised", 7, 64, None)
    assert one["rate"] == pytest.approx(7 / one["seconds"][0])
    assert f"| {' | '.join(VIDEO_HEAD)} |" in (tmp_path / "benchmark.md").read_text().splitlines()


def test_an_engine_whose_files_cannot_be_written_is_left_out(model, film, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no exporter\nand why")

    monkeypatch.setattr("conditional_detr.benchmark.realtime.export", fails)
    skipped = []
    found = measure_realtime(model, film, engines=["optimised", "OpenVINO"], rounds=1, on_failure=skipped.append)
    assert [one.engine for one in found] == ["optimised"]
    assert skipped == ["OpenVINO: its files could not be written: RuntimeError: no exporter"]
    with pytest.raises(ValueError, match=r"engines: expected names among optimised, .*, got 'plain', 'x'"):
        measure_realtime(model, film, engines=["optimised", "plain", "x"])
    with pytest.raises(OSError, match="OpenVINO: its files could not be written"):
        measure_realtime(model, film, engines=["optimised", "OpenVINO"], rounds=1)


def test_errors_come_before_anything_is_timed(small, film, data, tmp_path, monkeypatch):
    monkeypatch.setattr("conditional_detr.benchmark.measure.measure", lambda *_, **__: pytest.fail("it was timed"))
    text = tmp_path / "film.mp4"
    text.write_text("no film")
    for wrong, message in [
        (["--video-size", 64], "--video-size, --data and --images: expected --video with them"),
        (["--data", "val.json"], "--video-size, --data and --images: expected --video with them"),
        (["--video", film, "--images", tmp_path], "--images: expected --data with it"),
        (
            ["--video", film, "--data", film.parent / "data.json"],
            "data.json: expected categories that are class",
        ),
        (["--video", "gone.mp4"], "gone.mp4: no such file"),
        (["--video", text], "film.mp4: expected a video"),
        (["--video", film, "--data", "gone.json"], "gone.json: no such file"),
        (["--video", film, "--video-size", 1_000_000], "shortest_edge: expected 1 to"),
        (["--video", film, "--engine", "plain"], "--video: expected one of optimised, optimised bf16, "),
        (["--video", film, "--output", film], "film.mp4"),
    ]:
        refused = run("--weights", small, *wrong)
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr.replace("\n", " ")
