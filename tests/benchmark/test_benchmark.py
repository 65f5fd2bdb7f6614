"""The benchmark: the same work for all engines, ratios by hand, and what it writes."""

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
from conditional_detr.benchmark.growth import measure_growth, thread_counts
from conditional_detr.benchmark.measure import Reading, available, check, measure
from conditional_detr.benchmark.report import Report, table
from conditional_detr.benchmark.timing import product_rate, threads_set, warm_up
from conditional_detr.benchmark.training import OURS, TrainingReading, measure_training, peak_of_step
from conditional_detr.benchmark.worker import Task, Worker
from conditional_detr.cli import app
from conditional_detr.cli.benchmark import _printable
from helpers.models import TINY_CONFIG
from helpers.set_prediction import transformers_losses

NOT_COMPILED = [name for name in ENGINES if "compiled" not in name]
OUR_FILES = ["torch.export", "torch.export fp16", "ONNX Runtime", "OpenVINO", "OpenVINO bf16", "OpenVINO int8"]
CPU = torch.device("cpu")


def times(engine, seconds, theirs):
    ratios = tuple(b / a for a, b in zip(seconds, theirs, strict=True))
    return {"engine": engine, "seconds": seconds, "ratios": ratios}


def reading(engine, seconds, theirs, **options):
    values = {"height": 64, "width": 96, "batch": 1, "threads": 2, "logits": 2e-5, "boxes": 0.0, **options}
    return Reading(**times(engine, seconds, theirs), **values)


def trained(work, engine, seconds, theirs, **options):
    values = {"of": "all", "threads": 2, "loss": 28.95, "trained": 9, **options}
    return TrainingReading(work=work, **times(engine, seconds, theirs), **values)


def test_every_engine_does_the_same_work(small):
    """On two images, of a size that is no multiple of the stride; in half precision and in integers roughly."""
    names = [name for name in NOT_COMPILED if "cpu" in ENGINES[name].devices]
    assert set(names) <= set(available("cpu"))
    assert {*OUR_FILES} - {"torch.export fp16"} <= set(names)
    found = measure(ConditionalDETR.from_pretrained(small), names, size=(70, 90), batch=2, rounds=2)
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
    """A slow second round strikes both: the ratio does not see it."""
    one = reading("plain", (1.0, 4.0, 1.0), (2.0, 8.0, 3.0))
    assert (one.median, one.ratio) == (1.0, 2.0)
    assert one.to_dict()["ratios"] == (2.0, 2.0, 3.0)


class Pretended:
    """Stands for a process: one engine cannot be started, another ends in its second round."""

    calls: ClassVar[list[str]] = []

    def __init__(self, task):
        self.name, self.found, self.ended = task.engine, {"logits": 0.0, "boxes": 0.0, "megabytes": 9.0}, False
        if self.name == "torch.export":
            raise OSError("torch.export: its process failed: no memory left")

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
def pretended(monkeypatch):
    monkeypatch.setattr(measuring, "Worker", Pretended)
    monkeypatch.setattr(Pretended, "calls", [])
    return Pretended.calls


def test_rounds_are_interleaved(small, pretended):
    """The first engine before each call of another, which is compared with that call."""
    found = measure(ConditionalDETR.from_pretrained(small), ["plain", "optimised"], size=(64, 64), rounds=2)
    alone, together = ["plain ready", "plain", "plain"], ["plain", "optimised", "plain", "optimised"]
    assert pretended == [*alone, "optimised ready", *together, "end of optimised", "end of plain"]
    assert [one.seconds for one in found] == [(2.0, 3.0), (6.0, 8.0)]
    assert found[1].ratios == (5 / 6, 7 / 8)
    assert {one.threads for one in found} == {torch.get_num_threads()}


def test_an_engine_that_fails_is_told_and_left_out(small, pretended):
    model = ConditionalDETR.from_pretrained(small)
    names, told = ["plain", "torch.export", "optimised bf16", "optimised"], []
    found = measure(model, names, size=(64, 64), rounds=2, missing=told.append)
    assert [one.engine for one in found] == ["plain", "optimised"]
    assert told == [
        "torch.export: its process failed: no memory left",
        "optimised bf16: its process failed: exit code -9",
    ]
    with pytest.raises(OSError, match="its process failed: no memory left"):
        measure(model, names, size=(64, 64), rounds=2)


def test_an_engine_whose_files_cannot_be_written_is_told_and_left_out(small, pretended, monkeypatch):
    def broken(*_):
        raise RuntimeError("\nno such operator\nat great length")

    monkeypatch.setitem(ENGINES, "OpenVINO", replace(ENGINES["OpenVINO"], write=broken))
    model, told = ConditionalDETR.from_pretrained(small), []
    found = measure(model, ["plain", "OpenVINO", "optimised"], size=(64, 64), rounds=1, missing=told.append)
    assert [one.engine for one in found] == ["plain", "optimised"]
    assert told == ["OpenVINO: its files could not be written: RuntimeError: no such operator"]
    for names, missing in ((["plain", "OpenVINO"], None), (["OpenVINO", "plain"], told.append)):
        with pytest.raises(OSError, match="OpenVINO: its files could not be written: RuntimeError: no such op"):
            measure(model, names, size=(64, 64), rounds=1, missing=missing)


def test_what_a_process_says_last_is_told(tmp_path):
    """Here there is no model for it; and one that is killed has an exit code."""
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
    """What lay there before the last call of the warm-up does not count, nor an earlier call's peak."""
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


def test_what_cannot_run_is_named(small, monkeypatch):
    model = ConditionalDETR.from_pretrained(small)
    with pytest.raises(ValueError, match=r"engines: expected some of transformers, .*, got 'fast'"):
        check("fast", "cpu")
    with pytest.raises(ValueError, match="transformers bf16 compiled: runs on cuda, got cpu"):
        check("transformers bf16 compiled", "cpu")
    with pytest.raises(ValueError, match="at least one round and one engine, got 0 and 1"):
        measure(model, ["plain"], size=(64, 64), rounds=0)
    with pytest.raises(ValueError, match="at least one round and one engine, got 0 and 2"):
        measure_training(model, rounds=0)
    with pytest.raises(ValueError, match="side: expected one of transformers, this library, got 'plain'"):
        peak_of_step(model, "plain")
    monkeypatch.setattr("conditional_detr.benchmark.engines.find_spec", lambda name: None)
    for wanting in (lambda: check("transformers", "cpu"), lambda: measure_training(model)):
        with pytest.raises(ModuleNotFoundError, match=r"transformers: needs packages .* installed: transformers"):
            wanting()
    assert not any("transformers" in name for name in available("cpu"))


def test_memory_and_a_plain_product(small):
    """Of this process, which has torch loaded: more than a hundred megabytes, less than all of a large machine."""
    for side in (OURS, REFERENCE):
        assert 100 < peak_of_step(ConditionalDETR.from_pretrained(small), side, size=(64, 64), batch=1) < 1e6
    assert 0.01 < product_rate(torch.float32, CPU, side=128, rounds=1) < 1e6


def test_engines_of_a_file_share_it():
    """What one of them has written is there for the next, and half precision has a file of its own."""
    files = {name: engine.make.keywords["name"] for name, engine in ENGINES.items() if name in OUR_FILES}
    assert files["OpenVINO"] == files["OpenVINO bf16"]
    assert len(set(files.values())) == len(files) - 1


# ---- training


def test_both_sides_of_training_do_the_same_work(monkeypatch):
    """The same loss of the same weights and as many gradients; the model is neither trained nor moved.

    The criterion is that of the tests of the loss, on what it is given here.
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
    told = []
    found = measure_training(model, size=(64, 96), batch=2, rounds=2, progress=told.append)
    assert [one.engine for one in found] == [REFERENCE, OURS] * 2
    assert [one.work for one in found] == ["step"] * 2 + ["criterion"] * 2
    steps, criteria = found[:2], found[2:]
    assert steps[1].loss == pytest.approx(steps[0].loss, rel=1e-5)
    assert criteria[1].loss == pytest.approx(criteria[0].loss, rel=1e-5)
    assert criteria[1].loss == pytest.approx(transformers_losses(*given[-1])[0].item(), rel=1e-5)
    trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert [one.trained for one in steps] == [trains] * 2
    assert [one.trained for one in criteria] == [2 * 3 * 20 * (5 + 4)] * 2
    for one in found:
        assert len(one.seconds) == 2
        assert min(one.seconds) > 0
    assert steps[0].ratios == criteria[0].ratios == (1.0, 1.0)
    assert steps[1].ratios == tuple(b / a for a, b in zip(steps[1].seconds, steps[0].seconds, strict=True))
    assert steps[0].of == "64 x 96, 2 at a time"
    assert criteria[0].of == "3 images, 20 queries, 5 classes, 2 layers, 7 boxes an image"
    assert "training step, transformers: getting ready" in told
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- growth


def test_thread_counts():
    assert [thread_counts(most) for most in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_one_thing_grows_at_a_time_and_threads_are_set_back(small, monkeypatch, pretended):
    tasks = []

    class Spy(Pretended):
        def __init__(self, task):
            tasks.append((*task.size, task.batch, task.threads))
            super().__init__(task)

    monkeypatch.setattr(measuring, "Worker", Spy)
    model = ConditionalDETR.from_pretrained(small)
    with threads_set(3):
        found = measure_growth(model, ["plain"], heights=(48, 96), batches=(1, 2), common=96, rounds=1)
        assert torch.get_num_threads() == 3
    cases = [(48, 64, 1, 3), (96, 128, 1, 3), (96, 128, 2, 3), (96, 128, 1, 1), (96, 128, 1, 2)]
    assert [(one.height, one.width, one.batch, one.threads) for one in found] == cases
    assert tasks == cases
    with threads_set(2):  # it fails with one thread, the first case
        with pytest.raises(OSError, match="no memory left"):
            measure_growth(model, ["torch.export"], heights=(), batches=(), common=48, rounds=1)
        assert torch.get_num_threads() == 2


# ---- the report


def whole_report(engines=(REFERENCE, "plain")):
    """Numbers as large as they come, so as wide."""
    readings = [reading(name, (20.0, 20.0), (205.0, 222.2), megabytes=12345.6) for name in engines]
    cases = [(64, 1, 2), (128, 1, 2), (64, 2, 2), (64, 4, 2), (64, 1, 1)]
    growth = [reading("plain", (1.0,), (1.0,), height=h, batch=b, threads=t) for h, b, t in cases]
    training = [
        trained("step", REFERENCE, (2.0, 2.0), (2.0, 2.0), of="512 x 512, 2 at a time", megabytes=2058.4),
        trained("step", OURS, (1.0, 1.25), (2.0, 2.0), of="512 x 512, 2 at a time", megabytes=2012.4),
        trained("criterion", REFERENCE, (0.06, 0.06), (0.06, 0.06), of="8 images"),
        trained("criterion", OURS, (0.01, 0.01), (0.06, 0.06), of="8 images"),
    ]
    return Report("a title", {"float32": 100.0}, readings, growth, training)


def test_tables():
    readings = [reading(REFERENCE, (2.0, 2.0), (2.0, 2.0)), reading("plain", (1.0, 1.25), (2.0, 2.0), megabytes=812.3)]
    assert table(readings).rows[1] == ("plain", "1125", "1.80", "1.60 to 2.00", "812", "2e-05", "0e+00")
    assert table(readings).rows[0][4] == ""
    written = table(readings).markdown().splitlines()
    assert written[0] == "| engine | ms | times as fast | least to most | peak MB | logits | boxes |"
    assert written[-1] == "| plain | 1125 | 1.80 | 1.60 to 2.00 | 812 | 2e-05 | 0e+00 |"
    lines = whole_report().markdown().splitlines()
    assert lines[0] == "a title"
    assert lines[7] == "Training: step of 512 x 512, 2 at a time; criterion of 8 images"
    assert lines[9] == "| training | ms | times as fast | least to most | peak MB | loss |"
    assert lines[12] == "| step, this library | 1125 | 1.80 | 1.60 to 2.00 | 2012 | 28.9 |"
    assert lines[14] == "| criterion, this library | 10.0 | 6.00 | 6.00 to 6.00 |  | 28.9 |"


def test_80_columns_hold_the_tables():
    """With the longest name, and numbers as wide as they come, each stands whole in its row."""
    report = whole_report([*ENGINES])
    for one in report.tables():
        file = io.StringIO()
        Console(width=80, file=file).print(_printable(one))
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= 80
        for row in one.rows:
            found = [re.split(r" {2,}", line.strip()) for line in lines if line.startswith(f"{row[0]}  ")]
            assert found == [[cell for cell in row if cell]]


def test_image(tmp_path):
    """Wider with training or growth, taller with growth."""
    whole = whole_report()
    sizes = {}
    for name, report in {
        "all": whole,
        "bars": replace(whole, growth=()),
        "lines": replace(whole, training=()),
        "engines": replace(whole, growth=(), training=()),
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
    assert "Compared with: optimised. A plain matrix product reaches, in GFLOP/s: float32" in result.output
    told = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert [one["engine"] for one in told["readings"]] == ["optimised", "plain"]
    assert told["readings"][0]["ratios"] == [1.0, 1.0]
    assert [(one["work"], one["engine"]) for one in told["training"]] == [
        ("step", REFERENCE),
        ("step", OURS),
        ("criterion", REFERENCE),
        ("criterion", OURS),
    ]
    assert min(one["megabytes"] for one in (*told["readings"], *told["training"][:2])) > 100
    assert {one["megabytes"] for one in told["training"][2:]} == {None}
    assert {one["threads"] for one in (*told["readings"], *told["training"])} == {1}
    assert told["growth"] == []
    lines = (tmp_path / "new" / "benchmark.md").read_text().splitlines()
    assert lines[2].startswith("| engine | ms |")
    assert lines[7] == (
        "Training: step of 64 x 64, 1 at a time;"
        " criterion of 8 images, 300 queries, 91 classes, 6 layers, 7 boxes an image"
    )
    assert len(lines) == 15
    assert (tmp_path / "new" / "benchmark.png").stat().st_size > 0
    for wrong, message in [
        (["--engine", "fast"], "error: engines: expected some of"),
        (["--device", "nowhere"], "error: "),
        (["--engine", "optimised compiled", "--growth"], "error: --growth: expected one of transformers, plain, "),
    ]:
        refused = run(*options[:2], *wrong)
        assert refused.exit_code == 2
        assert message in refused.output


def test_what_fails_is_named_and_nothing_else_is_lost(small, tmp_path, monkeypatch):
    """Processes are stand-ins that fail for one engine and for one side of training, as where memory is short."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        '#!/bin/sh\ncase "$*" in *\'"engine": "optimised"\'*|*\'--alone transformers\'*)'
        " printf 'one\\nno memory left\\n' >&2; exit 3;; esac\n"
        f"exec '{sys.executable}' \"$@\"\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    options = ["--weights", small, "--height", 64, "--width", 96, "--rounds", 1, "--device", "cpu", "--training"]
    options += ["--training-size", 64, "--training-batch-size", 1]
    result = run(*options, "--engine", "plain", "--engine", "optimised", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: left out: optimised: its process failed: no memory left",
        "warning: transformers: its peak memory is missing, the process for it failed: no memory left",
    ]
    told = json.loads((tmp_path / "benchmark.json").read_text())
    (plain,) = told["readings"]
    assert plain["megabytes"] > 100
    theirs, ours, *_ = told["training"]
    assert (theirs["megabytes"], len(theirs["seconds"])) == (None, 1)
    assert ours["megabytes"] > 100
    lines = (tmp_path / "benchmark.md").read_text()
    assert re.search(r"\| step, transformers \| [\d.]+ \| \d+\.\d\d \| [^|]+ \|  \|", lines)
