"""Benchmark: equal work for all engines, computed ratios, and output files."""

import io
import json
import re
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Output, SetLoss
from conditional_detr.benchmark import measure as measuring
from conditional_detr.benchmark import timing
from conditional_detr.benchmark import training as training_module
from conditional_detr.benchmark.engines import ENGINES, REFERENCE
from conditional_detr.benchmark.figure import draw
from conditional_detr.benchmark.measure import Measurement, available, check, measure
from conditional_detr.benchmark.report import Report, table
from conditional_detr.benchmark.scaling import measure_scaling, thread_counts
from conditional_detr.benchmark.timing import product_rate, torch_threads, warm_up
from conditional_detr.benchmark.training import OURS, TrainingMeasurement, measure_training, step_peak_memory
from conditional_detr.benchmark.worker import Task, Worker
from conditional_detr.cli import app
from conditional_detr.cli.benchmark import _printable
from conditional_detr.deploy import export as export_module
from conditional_detr.deploy import quantize as quantize_module
from helpers.exports import OneTrace
from helpers.models import TINY_CONFIG
from helpers.set_prediction import transformers_losses

NOT_COMPILED = [name for name in ENGINES if "compiled" not in name]
OUR_FILES = ["torch.export", "torch.export fp16", "ONNX Runtime", "OpenVINO", "OpenVINO bf16", "OpenVINO int8"]
CPU = torch.device("cpu")


def times(engine, seconds, theirs):
    ratios = tuple(b / a for a, b in zip(seconds, theirs, strict=True))
    return {"engine": engine, "seconds": seconds, "ratios": ratios}


def measurement(engine, seconds, theirs, **options):
    values = {"height": 64, "width": 96, "batch": 1, "threads": 2, "logits": 2e-5, "boxes": 0.0, **options}
    return Measurement(**times(engine, seconds, theirs), **values)


def training_measurement(kind, engine, seconds, theirs, **options):
    values = {"inputs": "all", "threads": 2, "loss": 28.95, "gradients": 9, **options}
    return TrainingMeasurement(kind=kind, **times(engine, seconds, theirs), **values)


def test_every_engine_does_the_same_work(least, monkeypatch):
    """On two images, of a size that is no multiple of the stride; in half precision and in integers roughly."""
    trace = OneTrace()
    for module in (export_module, quantize_module):
        monkeypatch.setattr(module, "trace", trace)
    names = [name for name in NOT_COMPILED if "cpu" in ENGINES[name].devices]
    assert set(names) <= set(available("cpu"))
    assert {*OUR_FILES} - {"torch.export fp16"} <= set(names)
    found = measure(ConditionalDETR.from_pretrained(least), names, size=(70, 90), batch=2, rounds=2)
    assert [one.engine for one in found] == names
    assert names[0] == REFERENCE
    assert found[0].ratios == (1.0, 1.0)
    for one in found:
        assert (one.height, one.width, one.batch, len(one.seconds)) == (70, 90, 2, 2)
        rough = "bf16" in one.engine or "int8" in one.engine
        assert one.logits < (0.5 if rough else 1e-4), one
        assert one.boxes < (0.1 if rough else 1e-5), one
        assert not rough or one.logits > 1e-4, "this was computed in float32"
        assert one.megabytes > 100


def test_ratios_are_those_of_rounds():
    """A slow second round affects both, so the ratio does not change."""
    one = measurement("plain", (1.0, 4.0, 1.0), (2.0, 8.0, 3.0))
    assert (one.median, one.ratio) == (1.0, 2.0)
    assert one.to_dict()["ratios"] == (2.0, 2.0, 3.0)


class FakeWorker:
    """Stub of a worker: one engine cannot start, another ends in its second round."""

    calls: ClassVar[list[str]] = []

    def __init__(self, task):
        self.name, self.results, self.ended = task.engine, {"logits": 0.0, "boxes": 0.0, "megabytes": 9.0}, False
        if self.name == "optimised compiled":
            raise OSError("optimised compiled: its process failed: no memory left")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.calls.append(f"end of {self.name}")

    def ready(self):
        self.calls.append(f"{self.name} ready")

    def seconds(self):
        self.calls.append(self.name)
        if self.name == "optimised bf16" and self.calls.count(self.name) == 2:
            raise OSError("optimised bf16: its process failed: exit code -9")
        return float(len(self.calls))

    def finish(self):
        pass


@pytest.fixture
def fake_worker(monkeypatch):
    monkeypatch.setattr(measuring, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "calls", [])
    return FakeWorker.calls


def test_rounds_are_interleaved(small, fake_worker):
    """The first engine before each call of another, which is compared with that call."""
    found = measure(ConditionalDETR.from_pretrained(small), ["plain", "optimised"], size=(64, 64), rounds=2)
    alone, together = ["plain ready", "plain", "plain"], ["plain", "optimised", "plain", "optimised"]
    assert fake_worker == [*alone, "optimised ready", *together, "end of optimised", "end of plain"]
    assert [one.seconds for one in found] == [(2.0, 3.0), (6.0, 8.0)]
    assert found[1].ratios == (5 / 6, 7 / 8)
    assert {one.threads for one in found} == {torch.get_num_threads()}


def test_engine_that_fails_is_reported_and_skipped(small, fake_worker):
    model = ConditionalDETR.from_pretrained(small)
    names, messages = ["plain", "optimised compiled", "optimised bf16", "optimised"], []
    found = measure(model, names, size=(64, 64), rounds=2, on_failure=messages.append)
    assert [one.engine for one in found] == ["plain", "optimised"]
    assert messages == [
        "optimised compiled: its process failed: no memory left",
        "optimised bf16: its process failed: exit code -9",
    ]
    with pytest.raises(OSError, match="its process failed: no memory left"):
        measure(model, names, size=(64, 64), rounds=2)


def test_engine_whose_files_cannot_be_written_is_reported_and_skipped(small, fake_worker, monkeypatch):
    def broken(*_):
        raise RuntimeError("\nno such operator\nat great length")

    monkeypatch.setitem(ENGINES, "OpenVINO", replace(ENGINES["OpenVINO"], write=broken))
    model, messages = ConditionalDETR.from_pretrained(small), []
    found = measure(model, ["plain", "OpenVINO", "optimised"], size=(64, 64), rounds=1, on_failure=messages.append)
    assert [one.engine for one in found] == ["plain", "optimised"]
    assert messages == ["OpenVINO: its files could not be written: RuntimeError: no such operator"]
    for names, on_failure in ((["plain", "OpenVINO"], None), (["OpenVINO", "plain"], messages.append)):
        with pytest.raises(OSError, match="OpenVINO: its files could not be written: RuntimeError: no such op"):
            measure(model, names, size=(64, 64), rounds=1, on_failure=on_failure)


def test_error_contains_the_last_line_of_the_process(tmp_path):
    """The checkpoint is missing; a killed process reports its exit code."""
    task = Task("plain", str(tmp_path), "cpu", 1, (64, 64), 1, 0)
    with (
        Worker(task) as worker,
        pytest.raises(OSError, match=r"plain: its process failed: FileNotFoundError: .*weights"),
    ):
        worker.ready()
    with Worker(task) as worker:
        worker._process.kill()
        with pytest.raises(OSError, match="plain: its process failed: exit code -9"):
            worker.ready()
        assert worker.ended


def test_memory_of_a_call_on_a_gpu_is_what_it_adds(monkeypatch):
    """Memory allocated before the last warm-up call does not count, nor an earlier call's peak."""
    now, peak, calls = [300_000_000], [900_000_000], []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, now[0]))

    def call():
        calls.append(1)
        peak[0] = max(peak[0], now[0] + 50_000_000)
        return "found"

    assert warm_up(call, torch.device("cuda")) == ("found", 50.0)
    assert warm_up(call, CPU) == ("found", None)
    assert len(calls) == 2 * timing.WARM_UP


def test_errors_name_what_cannot_run(small, monkeypatch):
    model = ConditionalDETR.from_pretrained(small)
    with pytest.raises(ValueError, match=r"engines: expected names among transformers, .*, got 'fast'"):
        check("fast", "cpu")
    with pytest.raises(ValueError, match="transformers bf16 compiled: expected a device of type cuda, got cpu"):
        check("transformers bf16 compiled", "cpu")
    with pytest.raises(ValueError, match="at least one round and one engine, got 0 and 1"):
        measure(model, ["plain"], size=(64, 64), rounds=0)
    with pytest.raises(ValueError, match="at least one round and one engine, got 0 and 2"):
        measure_training(model, rounds=0)
    with pytest.raises(ValueError, match="library: expected one of transformers, this library, got 'plain'"):
        step_peak_memory(model, "plain")
    monkeypatch.setattr("conditional_detr.benchmark.engines.find_spec", lambda name: None)
    for wanting in (lambda: check("transformers", "cpu"), lambda: measure_training(model)):
        with pytest.raises(ModuleNotFoundError, match=r"transformers: needs packages .* installed: transformers"):
            wanting()
    assert not any("transformers" in name for name in available("cpu"))


def test_memory_and_matrix_product(small):
    """A process that has loaded torch needs more than 100 MB and less than a large machine has."""
    for side in (OURS, REFERENCE):
        assert 100 < step_peak_memory(ConditionalDETR.from_pretrained(small), side, size=(64, 64), batch=1) < 1e6
    assert 0.01 < product_rate(torch.float32, CPU, side=128, rounds=1) < 1e6


def test_engines_of_a_file_share_it():
    """Engines of one exported model share its file; half precision has another file."""
    files = {name: engine.make.keywords["name"] for name, engine in ENGINES.items() if name in OUR_FILES}
    assert files["OpenVINO"] == files["OpenVINO bf16"]
    assert len(set(files.values())) == len(files) - 1


# ---- training


def test_both_libraries_do_the_same_training_work(monkeypatch):
    """Loss and number of gradients are equal; the model is neither trained nor moved.

    The criterion equals transformers' in the tests of the loss, on the same inputs.
    """
    for name, value in {"LAYERS": 2, "IMAGES": 3, "QUERIES": 20, "CLASSES": 5}.items():
        monkeypatch.setattr(training_module, name, value)
    given = []

    class Spy(SetLoss):
        def __call__(self, output, targets):
            given.append((Output(*(tensor.detach().clone() for tensor in output)), targets))
            return super().__call__(output, targets)

    monkeypatch.setattr(training_module, "SetLoss", Spy)
    model = ConditionalDETR(replace(TINY_CONFIG, dropout=0.0)).eval()
    torch.nn.init.xavier_uniform_(model.box_head.layers[-1].weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    messages = []
    found = measure_training(model, size=(64, 96), batch=2, rounds=2, progress=messages.append)
    assert [one.engine for one in found] == [REFERENCE, OURS] * 2
    assert [one.kind for one in found] == ["step"] * 2 + ["criterion"] * 2
    steps, criteria = found[:2], found[2:]
    assert steps[1].loss == pytest.approx(steps[0].loss, rel=1e-5)
    assert criteria[1].loss == pytest.approx(criteria[0].loss, rel=1e-5)
    assert criteria[1].loss == pytest.approx(transformers_losses(*given[-1])[0].item(), rel=1e-5)
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert [one.gradients for one in steps] == [trains] * 2
    assert [one.gradients for one in criteria] == [2 * 3 * 20 * (5 + 4)] * 2
    for one in found:
        assert len(one.seconds) == 2
        assert min(one.seconds) > 0
    assert steps[0].ratios == criteria[0].ratios == (1.0, 1.0)
    assert steps[1].ratios == tuple(b / a for a, b in zip(steps[1].seconds, steps[0].seconds, strict=True))
    assert steps[0].inputs == "64 x 96, batch size 2"
    assert criteria[0].inputs == "3 images, 20 queries, 5 classes, 2 layers, 7 boxes per image"
    assert "training step, transformers: preparing" in messages
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- scaling


def test_thread_counts():
    assert [thread_counts(most) for most in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_one_quantity_varies_at_a_time_and_threads_are_restored(small, monkeypatch, fake_worker):
    tasks = []

    class Spy(FakeWorker):
        def __init__(self, task):
            tasks.append((*task.size, task.batch, task.threads))
            super().__init__(task)

    monkeypatch.setattr(measuring, "Worker", Spy)
    model = ConditionalDETR.from_pretrained(small)
    with torch_threads(3):
        found = measure_scaling(model, ["plain"], heights=(48, 96), batches=(1, 2), common=96, rounds=1)
        assert torch.get_num_threads() == 3
    cases = [(48, 64, 1, 3), (96, 128, 1, 3), (96, 128, 2, 3), (96, 128, 1, 1), (96, 128, 1, 2)]
    assert [(one.height, one.width, one.batch, one.threads) for one in found] == cases
    assert tasks == cases
    with torch_threads(2):  # it fails with one thread, the first case
        with pytest.raises(OSError, match="no memory left"):
            measure_scaling(model, ["optimised compiled"], heights=(), batches=(), common=48, rounds=1)
        assert torch.get_num_threads() == 2


# ---- the report


def full_report(engines=(REFERENCE, "plain")):
    """Return a report with the widest numbers to expect."""
    measurements = [measurement(name, (20.0, 20.0), (205.0, 222.2), megabytes=12345.6) for name in engines]
    cases = [(64, 1, 2), (128, 1, 2), (64, 2, 2), (64, 4, 2), (64, 1, 1)]
    scaling = [measurement("plain", (1.0,), (1.0,), height=h, batch=b, threads=t) for h, b, t in cases]
    training = [
        training_measurement(
            "step", REFERENCE, (2.0, 2.0), (2.0, 2.0), inputs="512 x 512, batch size 2", megabytes=2058.4
        ),
        training_measurement(
            "step", OURS, (1.0, 1.25), (2.0, 2.0), inputs="512 x 512, batch size 2", megabytes=2012.4
        ),
        training_measurement("criterion", REFERENCE, (0.06, 0.06), (0.06, 0.06), inputs="8 images"),
        training_measurement("criterion", OURS, (0.01, 0.01), (0.06, 0.06), inputs="8 images"),
    ]
    return Report("a title", {"float32": 100.0}, measurements, scaling, training)


def test_tables():
    measurements = [
        measurement(REFERENCE, (2.0, 2.0), (2.0, 2.0)),
        measurement("plain", (1.0, 1.25), (2.0, 2.0), megabytes=812.3),
    ]
    assert table(measurements).rows[1] == ("plain", "1125", "1.80", "1.60 to 2.00", "812", "2e-05", "0e+00")
    assert table(measurements).rows[0][4] == ""
    written = table(measurements).markdown().splitlines()
    assert written[0] == "| engine | ms | speedup | speedup range | peak MB | logits diff | boxes diff |"
    assert written[-1] == "| plain | 1125 | 1.80 | 1.60 to 2.00 | 812 | 2e-05 | 0e+00 |"
    lines = full_report().markdown().splitlines()
    assert lines[0] == "a title"
    assert lines[7] == "Training: step on 512 x 512, batch size 2; criterion on 8 images"
    assert lines[9] == "| training | ms | speedup | speedup range | peak MB | loss |"
    assert lines[12] == "| step, this library | 1125 | 1.80 | 1.60 to 2.00 | 2012 | 28.9 |"
    assert lines[14] == "| criterion, this library | 10.0 | 6.00 | 6.00 to 6.00 |  | 28.9 |"


def test_80_columns_hold_the_tables():
    """With the longest name and the widest numbers, no cell is truncated or wrapped."""
    report = full_report([*ENGINES])
    for one in report.tables():
        file = io.StringIO()
        Console(width=80, file=file).print(_printable(one))
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        for row in one.rows:
            found = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith(f"{row[0]}  ")]
            assert found == [[cell for cell in row if cell]]


def test_image(tmp_path):
    """The image is wider with training or scaling, and taller with scaling."""
    whole = full_report()
    sizes = {}
    for name, report in {
        "all": whole,
        "bars": replace(whole, scaling=()),
        "lines": replace(whole, training=()),
        "engines": replace(whole, scaling=(), training=()),
    }.items():
        draw(report, tmp_path / name)
        data = (tmp_path / name).read_bytes()
        assert data[:4] == b"\x89PNG"
        sizes[name] = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    assert sizes["all"][0] == sizes["bars"][0] == sizes["lines"][0] > sizes["engines"][0]
    assert sizes["all"][1] - sizes["bars"][1] == sizes["lines"][1] - sizes["engines"][1] == 350


# ---- the command


def run(*arguments):
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, list(map(str, ["benchmark", *arguments])))
    finally:
        torch.set_num_threads(threads)


def test_command(small, tmp_path):
    options = ["--weights", small, "--height", 64, "--width", 96, "--rounds", 2, "--device", "cpu", "--threads", 1]
    training = ["--training", "--training-size", 64, "--training-batch-size", 1]
    result = run(*options, *training, "--engine", "optimised", "--engine", "plain", "--output", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "Reference: optimised. Matrix product in GFLOP/s: float32" in result.output
    messages = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert [one["engine"] for one in messages["measurements"]] == ["optimised", "plain"]
    assert messages["measurements"][0]["ratios"] == [1.0, 1.0]
    assert [(one["kind"], one["engine"]) for one in messages["training"]] == [
        ("step", REFERENCE),
        ("step", OURS),
        ("criterion", REFERENCE),
        ("criterion", OURS),
    ]
    assert min(one["megabytes"] for one in (*messages["measurements"], *messages["training"][:2])) > 100
    assert {one["megabytes"] for one in messages["training"][2:]} == {None}
    assert {one["threads"] for one in (*messages["measurements"], *messages["training"])} == {1}
    assert messages["scaling"] == []
    lines = (tmp_path / "new" / "benchmark.md").read_text().splitlines()
    assert lines[2].startswith("| engine | ms |")
    assert lines[7] == (
        "Training: step on 64 x 64, batch size 1;"
        " criterion on 8 images, 300 queries, 91 classes, 6 layers, 7 boxes per image"
    )
    assert len(lines) == 15
    assert (tmp_path / "new" / "benchmark.png").stat().st_size > 0
    for wrong, message in [
        (["--engine", "fast"], "error: engines: expected names among"),
        (["--device", "nowhere"], "error: "),
        (["--engine", "optimised compiled", "--scaling"], "error: --scaling: expected one of transformers, plain, "),
    ]:
        refused = run(*options[:2], *wrong)
        assert refused.exit_code == 2
        assert message in refused.output


def test_failures_are_reported_and_the_rest_is_measured(small, tmp_path, monkeypatch):
    """A stub of Python fails for one engine and for one library's training, as if memory were short."""
    fake_python = tmp_path / "python"
    fake_python.write_text(
        '#!/bin/sh\ncase "$*" in *\'"engine": "optimised"\'*|*\'--peak-memory transformers\'*)'
        " printf 'one\\nno memory left\\n' >&2; exit 3;; esac\n"
        f"exec '{sys.executable}' \"$@\"\n"
    )
    fake_python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake_python))
    options = ["--weights", small, "--height", 64, "--width", 96, "--rounds", 1, "--device", "cpu", "--training"]
    options += ["--training-size", 64, "--training-batch-size", 1]
    result = run(*options, "--engine", "plain", "--engine", "optimised", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: skipped: optimised: its process failed: no memory left",
        "warning: transformers: peak memory was not measured, the process failed: no memory left",
    ]
    messages = json.loads((tmp_path / "benchmark.json").read_text())
    (plain,) = messages["measurements"]
    assert plain["megabytes"] > 100
    theirs, ours, *_ = messages["training"]
    assert (theirs["megabytes"], len(theirs["seconds"])) == (None, 1)
    assert ours["megabytes"] > 100
    lines = (tmp_path / "benchmark.md").read_text()
    assert re.search(r"\| step, transformers \| [\d.]+ \| \d+\.\d\d \| [^|]+ \|  \|", lines)
