"""Benchmark from image files to detections: equal work for all engines, tables and files, and errors."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Detector
from conditional_detr.benchmark import pipeline as module
from conditional_detr.benchmark.figure import draw
from conditional_detr.benchmark.pipeline import ENGINES, REFERENCE, PipelineMeasurement, available, measure_pipeline
from conditional_detr.benchmark.report import PIPELINE_HEAD, Report, pipeline_table, stages_table
from conditional_detr.benchmark.stages import Stages, measure_stages
from conditional_detr.cli import app
from conditional_detr.cli.benchmark import _printable
from conditional_detr.data.synthetic import draw_image

CPU = torch.device("cpu")
STAGES = ["decode", "resize", "normalise", "model", "post-process"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with three images, two of them of one size."""
    folder = tmp_path_factory.mktemp("images")
    for index, size in enumerate(((160, 120), (120, 160), (120, 160))):
        draw_image(seed=1, index=index, size=size)[0].save(folder / f"{index}.png")
    return folder


def paths(folder):
    return [str(path) for path in sorted(folder.iterdir())]


def measured(engine, **options):
    values = {"threads": 2, "images": 24, "size": (800, 1066), "objects": 12345, "model_seconds": (0.5, 0.6)}
    times = {"seconds": (20.0, 24.0), "ratios": (10.25, 11.1), "megabytes": 12345.6}
    return PipelineMeasurement(engine=engine, **{**values, **times, **options})


def test_every_engine_detects_the_same(least, images, tmp_path, monkeypatch):
    """The counts are those of the detector; bfloat16 and the other resizing move a score over the threshold or two."""
    monkeypatch.setattr(module, "THRESHOLD", 0.3)
    (tmp_path / "weights").symlink_to(least)
    expected = sum(len(found) for found in Detector.from_pretrained(least)(paths(images), threshold=0.3))
    assert expected > 10
    assert list(ENGINES) == available(CPU)
    for name, make in ENGINES.items():
        run, model = make(tmp_path, CPU, paths(images))
        with torch.inference_mode():
            count = run()
            model(torch.zeros(1, 3, 96, 128))
        rough = max(2, expected // 10) if {"fast", "bf16"} & {*name.split()} or name == REFERENCE else 0
        assert abs(count - expected) <= rough, (name, count, expected)


def test_available_engines(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert available(CPU)[0] == "loop"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert available(torch.device("cuda")) == ["loop", "Detector", "optimised", "optimised fast"]


def test_rate_and_share():
    """Of 4 images in 2 s while the model takes 0.4 s each: 2 a second, four fifths of the model's own."""
    one = measured("loop", images=4, seconds=(2.0, 4.0, 2.0), model_seconds=(0.4, 0.8, 0.5), ratios=(1.0, 1.0, 1.0))
    assert (one.rate, one.share) == (2.0, 0.8)
    assert {"rate": 2.0, "share": 0.8, "size": (800, 1066)}.items() <= one.to_dict().items()


def test_tables_fit_80_columns_and_the_image_has_a_panel(tmp_path, capsys):
    from rich.console import Console

    pipeline = [measured(name) for name in ENGINES]
    stages = [Stages("torchvision", dict.fromkeys(STAGES, 1.2345))]
    for one in (pipeline_table(pipeline), stages_table(stages)):
        Console(width=80).print(_printable(one))
        lines = capsys.readouterr().out.splitlines()
        for row in one.rows:
            (found,) = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith(f"{row[0]}  ")]
            assert found == [*row]
    assert pipeline_table(pipeline).title == "From files to detections: 24 images, most 800 x 1066"
    assert pipeline_table(pipeline).rows[0] == (
        *(REFERENCE, "1.09", "10.68", "10.25 to 11.10", "60%", "12346", "12345"),
    )
    assert stages_table(stages).rows == [("torchvision", *["1234.5"] * 5, "6172.5")]
    heights = []
    for report in (Report("", {}, pipeline), Report("", {}, pipeline, pipeline=pipeline)):  # type: ignore[arg-type]
        draw(report, tmp_path / "image.png")
        heights.append(int.from_bytes((tmp_path / "image.png").read_bytes()[20:24]))
    assert heights[1] > heights[0] + 200


def test_stages(small, images):
    threads = torch.get_num_threads()
    found = measure_stages(ConditionalDETR.from_pretrained(small), paths(images))
    assert torch.get_num_threads() == threads
    assert [one.backend for one in found] == ["pil", "torchvision"]
    for one in found:
        assert list(one.seconds) == STAGES
        assert min(one.seconds.values()) > 0
        assert max(one.seconds, key=one.seconds.__getitem__) == "model"


def run(*arguments):
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, list(map(str, ["benchmark", *arguments])))
    finally:
        torch.set_num_threads(threads)


def test_command(small, images, tmp_path, monkeypatch):
    """With two engines, each in its process; the reference runs in the rounds of the other, too."""
    monkeypatch.setattr(module, "available", lambda device: ["Detector", "optimised bf16 fast"])
    monkeypatch.setattr("conditional_detr.benchmark.timing.product_rate", lambda *_: 1.0)
    options = ["--height", 64, "--width", 96, "--rounds", 2, "--threads", 1, "--device", "cpu", "--engine", "plain"]
    result = run("--weights", small, *options, "--pipeline", images, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "benchmark.json").read_text())
    first, second = content["pipeline"]
    assert (first["engine"], second["engine"]) == ("Detector", "optimised bf16 fast")
    assert first["ratios"] == [1.0, 1.0]
    for one in (first, second):
        assert (one["images"], one["size"], one["threads"]) == (3, [96, 128], 1)
        assert len(one["seconds"]) == len(one["model_seconds"]) == 2
        assert one["megabytes"] > 100
    assert [list(one["seconds"]) for one in content["stages"]] == [STAGES, STAGES]
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    assert f"| {' | '.join(PIPELINE_HEAD)} |" in lines
    assert "From files to detections: 3 images, most 96 x 128" in lines
    assert "| torchvision | " in lines[-1]


def test_errors_come_before_anything_is_timed(small, images, tmp_path, monkeypatch):
    monkeypatch.setattr("conditional_detr.benchmark.measure.measure", lambda *_, **__: pytest.fail("it was timed"))
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes((images / "0.png").read_bytes()[:-200])
    for wrong, message in [
        (tmp_path / "empty", "expected a folder with images, got one with 0 other files"),
        (tmp_path / "*.gif", "no file matches"),
        (tmp_path / "none.jpg", "--pipeline: expected image files, got "),
        ("https://example.com/a.jpg", "--pipeline: expected image files, got https://example.com/a.jpg"),
        (broken, "broken.jpg"),
        (cut, "cut.png"),
    ]:
        refused = run("--weights", small, "--device", "cpu", "--pipeline", images, "--pipeline", wrong)
        assert refused.exit_code == 2
        (line,) = refused.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
    kept = tmp_path / "benchmark.png"
    kept.write_bytes((images / "0.png").read_bytes())
    refused = run("--weights", small, "--device", "cpu", "--pipeline", kept, "--output", tmp_path, "--overwrite")
    assert "benchmark.png: expected a file to write, got an input" in refused.stderr.replace("\n", " ")
    assert kept.read_bytes() == (images / "0.png").read_bytes()
    model = ConditionalDETR.from_pretrained(small)
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        measure_pipeline(model, [])
    with pytest.raises(ValueError, match="at least one round and one engine, got 0 and 7"):
        measure_pipeline(model, paths(images), rounds=0)
