"""``conditional-detr compare``: from the shell's words to runs, table and curves."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from conditional_detr import DETR, ConditionalDETR, from_pretrained
from conditional_detr.cli import app
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from helpers.training_runs import steps_of

SIZES = "backbone=resnet18 backbone_stage=2 width=32 heads=4 encoder_layers=1 decoder_layers=2 num_queries=9"
COMMON = f"{SIZES} epochs=2 batch_size=4 workers=0 lr=1e-3"


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """Run the command on six small images with other candidates and settings."""
    folder = tmp_path_factory.mktemp("shapes")
    for split, images in (("train", 6), ("val", 2)):
        write_shapes(folder, images, seed=0, split=split, size=(64, 96))
    data = ["--data", folder / "instances_train.json", "--images", folder / "train"]
    data += ["--val-data", folder / "instances_val.json", "--val-images", folder / "val", "--shortest-edge", 64]

    def compare(*candidates, output, common=COMMON, seeds="0"):
        named = [part for candidate in candidates for part in ("--candidate", candidate)]
        options = [*data, *named, "--output", output, "--common", common, "--seeds", seeds]
        return CliRunner().invoke(app, [str(argument) for argument in ("compare", *options)])

    return compare


@pytest.mark.filterwarnings("default")
def test_compares_the_two_networks_of_the_paper(compare, tmp_path):
    candidates = ("ours: num_queries=8", "baseline: model=detr lr=5e-4")
    result = compare(*candidates, output=tmp_path / "out")
    assert result.exit_code == 0, result.output
    networks = {"ours": (ConditionalDETR, 8, 1e-3), "baseline": (DETR, 9, 5e-4)}
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for name, (network, queries, lr) in networks.items():
        run = tmp_path / "out" / name / "seed-0"
        model = from_pretrained(run / "last")
        assert type(model) is network
        assert (model.config.num_queries, model.metadata.class_names) == (queries, CLASS_NAMES)
        steps = steps_of(run)
        assert len(steps) == 4
        assert steps[0]["lr"] == pytest.approx(lr)
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        evaluated = [[i + 1, entry["AP"], entry["AP50"]] for i, entry in enumerate(e for e in log if "AP" in e)]
        assert [list(point.values()) for point in report["candidates"][name]["curves"][0]] == evaluated
        assert report["settings"]["candidates"][name]["lr"] == lr
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert [line.rstrip() for line in table.splitlines()] == result.stdout.splitlines()[: len(table.splitlines())]
    assert Image.open(tmp_path / "out" / "comparison.png").width > 500
    other = compare(*candidates, output=tmp_path / "out", common=COMMON.replace("epochs=2", "epochs=3"))
    assert other.exit_code == 2
    assert "expected no file, or that of this comparison" in other.stderr


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        (("lr=1e-3", "b:"), {}, "--candidate: expected 'NAME: field=value ...', got 'lr=1e-3'"),
        (("a/b: lr=1e-3", "b:"), {}, "--candidate: expected 'NAME: field=value ...', got 'a/b: lr=1e-3'"),
        (("a: lr=1e-3", "a: lr=1e-2"), {}, "--candidate: expected different names, got two of one name"),
        (("comparison.md: lr=1e-3", "b:"), {}, "--candidate: expected 'NAME: field=value ...', got 'comparison.md"),
        (("a|b: lr=1e-3", "b:"), {}, "--candidate: expected 'NAME: field=value ...', got 'a|b"),
        (("a: lr", "b:"), {}, "--candidate: expected field=value, got 'lr'"),
        (("a: lr=fast", "b:"), {}, "lr: expected a number, got 'fast'"),
        (("a: epochs=3", "b:"), {}, "b: expected epochs=3, as a has, got 2"),
        (("a: layers=3", "b:"), {}, "layers"),
        (("a:",), {}, "candidates: expected at least two, got 1"),
        (("a:", "b:"), {"seeds": "0 x"}, "--seeds: expected integers such as '0 1 2', got 'x'"),
        (("a:", "b:"), {"seeds": "1 1"}, "seeds: expected different ones, got [1, 1]"),
    ],
)
def test_what_cannot_be_compared(compare, candidates, options, message, tmp_path):
    """One line, before anything is trained or written."""
    result = compare(*candidates, output=tmp_path / "out", **options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
