"""The benchmark: the same work for all engines, ratios by hand, and what it writes."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR
from conditional_detr.benchmark import measure as measuring
from conditional_detr.benchmark.engines import ENGINES, REFERENCE
from conditional_detr.benchmark.measure import Reading, available, check, measure, peak_memory, product_rate
from conditional_detr.benchmark.report import draw, markdown, rows
from conditional_detr.cli import app

NOT_COMPILED = [name for name in ENGINES if "compiled" not in name]
SCRIPT = """
import json, sys
from conditional_detr import ConditionalDETR
from conditional_detr.benchmark.measure import measure
found = measure(ConditionalDETR.from_pretrained(sys.argv[1]), sys.argv[2:], size=(70, 90), batch=2, rounds=2)
print(json.dumps([one.to_dict() for one in found]))
"""


def reading(engine, seconds, theirs, **options):
    values = {"height": 64, "width": 96, "batch": 1, "logits": 2e-5, "boxes": 0.0, **options}
    return Reading(
        engine, seconds=seconds, ratios=tuple(b / a for a, b in zip(seconds, theirs, strict=True)), **values
    )


def test_every_engine_does_the_same_work(small):
    """On two pictures, of a size that is no multiple of the stride; in half precision roughly.

    In a process of its own: runtimes of others do not take part in the rest of these tests.
    """
    names = [name for name in NOT_COMPILED if "cpu" in ENGINES[name].devices]
    assert set(names) <= set(available("cpu"))
    command = [sys.executable, "-c", SCRIPT, str(small), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [one["engine"] for one in found] == names
    assert names[0] == REFERENCE
    assert found[0]["ratios"] == [1.0, 1.0]
    for one in found:
        assert (one["height"], one["width"], one["batch"], len(one["seconds"])) == (70, 90, 2, 2)
        half = "bf16" in one["engine"]
        assert one["logits"] < (0.5 if half else 1e-4), one
        assert one["boxes"] < (0.1 if half else 1e-5), one
        assert not half or one["logits"] > 1e-4, "this was not computed in half precision"


def test_ratios_are_those_of_rounds():
    """A slow second round strikes both: the ratio does not see it."""
    one = reading("plain", (1.0, 4.0, 1.0), (2.0, 8.0, 3.0))
    assert (one.median, one.ratio) == (1.0, 2.0)
    assert one.to_dict()["ratios"] == (2.0, 2.0, 3.0)


def test_rounds_are_interleaved(small, monkeypatch):
    """Both engines in a round, before the next round."""
    calls = []
    monkeypatch.setattr(measuring, "_seconds", lambda run, pixels: calls.append(run) or float(len(calls)))
    found = measure(ConditionalDETR.from_pretrained(small), ["plain", "optimised"], size=(64, 64), rounds=3)
    assert calls == [calls[0], calls[1]] * 3
    assert [one.seconds for one in found] == [(1.0, 3.0, 5.0), (2.0, 4.0, 6.0)]
    assert found[1].ratios == (1 / 2, 3 / 4, 5 / 6)


def test_what_cannot_run_is_named(small, monkeypatch):
    with pytest.raises(ValueError, match=r"engines: expected some of transformers, .*, got 'fast'"):
        check("fast", "cpu")
    with pytest.raises(ValueError, match="transformers bf16 compiled: runs on cuda, got cpu"):
        check("transformers bf16 compiled", "cpu")
    with pytest.raises(ValueError, match="at least one round and one engine, got 0 and 1"):
        measure(ConditionalDETR.from_pretrained(small), ["plain"], size=(64, 64), rounds=0)
    monkeypatch.setattr("conditional_detr.benchmark.engines.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="transformers: needs packages that are not installed: transformers"):
        check("transformers", "cpu")
    assert not any("transformers" in name for name in available("cpu"))


def test_memory_and_a_plain_product(small):
    """Of this process, which has torch loaded: more than a hundred megabytes, less than all of a large machine."""
    assert 100 < peak_memory(ConditionalDETR.from_pretrained(small), "plain", size=(64, 64)) < 1e6
    assert 0.01 < product_rate(torch.float32, torch.device("cpu"), side=128, rounds=1) < 1e6


def test_report(tmp_path):
    readings = [reading(REFERENCE, (2.0, 2.0), (2.0, 2.0)), reading("plain", (1.0, 1.25), (2.0, 2.0))]
    table = rows(readings, {"plain": 812.3})
    assert table[1] == ("plain", "1125", "1.80", "1.60 to 2.00", "812", "2e-05", "0e+00")
    assert markdown(table).splitlines()[-1] == "| plain | 1125 | 1.80 | 1.60 to 2.00 | 812 | 2e-05 | 0e+00 |"
    growth = [reading("plain", (1.0,), (1.0,), height=h, batch=b) for h, b in ((64, 1), (128, 1), (64, 2), (64, 4))]
    for name, more in (("one", []), ("three", growth)):
        draw(readings, more, "a title", tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_command(small, tmp_path):
    options = ["--weights", small, "--height", 64, "--width", 96, "--rounds", 2, "--device", "cpu", "--threads", 1]
    engines = ["--engine", "optimised", "--engine", "plain", "--output", tmp_path / "new"]
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, list(map(str, ["benchmark", *options, *engines])))
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    assert "Compared with: optimised. A plain matrix product reaches, in GFLOP/s: float32" in result.output
    told = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert [one["engine"] for one in told["readings"]] == ["optimised", "plain"]
    assert told["readings"][0]["ratios"] == [1.0, 1.0]
    assert told["peak MB"].keys() == {"optimised", "plain"}
    assert min(told["peak MB"].values()) > 100
    lines = (tmp_path / "new" / "benchmark.md").read_text().splitlines()
    assert lines[2].startswith("| engine | ms |")
    assert len(lines) == 6
    assert (tmp_path / "new" / "benchmark.png").stat().st_size > 0
    for wrong, message in [
        (["--engine", "fast"], "error: engines: expected some of"),
        (["--device", "nowhere"], "error: "),
    ]:
        refused = CliRunner().invoke(app, ["benchmark", *map(str, options[:2]), *wrong])
        assert refused.exit_code == 2
        assert message in refused.output
