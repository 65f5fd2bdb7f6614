"""The commands with a DETR: train from an architecture, resume, evaluate, detect, describe, convert and export."""

import json

import pytest
import torch
from typer.testing import CliRunner

from conditional_detr import DETR, Config, Detector, from_pretrained
from conditional_detr.cli import app
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from helpers.models import assert_same
from helpers.training_runs import steps_of

ARCHITECTURE = "model=detr backbone=resnet18 backbone_stage=2 width=32 heads=4 encoder_layers=1 decoder_layers=2"


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for split, images in (("train", 8), ("val", 3)):
        write_shapes(folder, images, seed=0, split=split, size=(64, 96))
    return folder


@pytest.fixture(scope="module")
def options(shapes):
    data = ["--data", shapes / "instances_train.json", "--images", shapes / "train"]
    data += ["--val-data", shapes / "instances_val.json", "--val-images", shapes / "val"]
    return [
        *data,
        "--shortest-edge",
        64,
        "--batch-size",
        4,
        "--accumulation",
        1,
        "--workers",
        0,
        "--augmentation",
        "none",
    ]


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    architecture = ("--weights", "none", "--architecture", ARCHITECTURE, "--num-queries", 9)
    run("train", *options, *architecture, "--preset", "from_scratch", "--epochs", 1, "--output", output)
    return output


@pytest.mark.filterwarnings("default")
def test_trains_and_resumes_a_detr(options, trained):
    model = from_pretrained(trained / "last")
    assert type(model) is DETR
    sizes = {"num_queries": 9, "width": 32, "heads": 4, "encoder_layers": 1, "decoder_layers": 2}
    assert model.config == Config(num_classes=6, **sizes, backbone="resnet18", backbone_stage=2)
    assert model.metadata.class_names == CLASS_NAMES
    run("train", *options, "--preset", "from_scratch", "--epochs", 2, "--resume", "--output", trained)
    assert [entry["step"] for entry in steps_of(trained)] == [1, 2, 3, 4]
    assert type(from_pretrained(trained / "last")) is DETR


def test_fine_tunes_a_detr_with_other_dropout(options, trained, tmp_path):
    run(
        "train", *options, "--weights", trained / "last", "--dropout", 0.3, "--epochs", 1, "--output", tmp_path / "run"
    )
    model = from_pretrained(tmp_path / "run" / "last")
    assert type(model) is DETR
    assert model.config.dropout == 0.3


def test_an_unknown_model_is_refused(options, tmp_path):
    command = ["train", *options, "--weights", "none", "--architecture", "model=yolo", "--output", tmp_path]
    result = CliRunner().invoke(app, [str(argument) for argument in command])
    assert result.exit_code == 2
    assert "--architecture: expected model=conditional_detr or model=detr, got 'yolo'" in result.stderr


def test_evaluates_detects_and_draws_attention(shapes, trained, tmp_path):
    weights = trained / "last"
    data = ("--data", shapes / "instances_val.json", "--images", shapes / "val")
    run("evaluate", *data, "--weights", weights, "--json", tmp_path / "metrics.json")
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["AR100"] <= 1
    image = next((shapes / "val").iterdir())
    run("detect", image, "--weights", weights, "--threshold", 0, "--output", tmp_path / "found")
    (written,) = (tmp_path / "found").glob("*.json")
    found = json.loads(written.read_text())["detections"]
    expected = Detector.from_pretrained(weights)(image, threshold=0)
    assert [one["score"] for one in found] == pytest.approx(expected.scores.tolist(), abs=1e-4)
    run("attention", image, "--weights", weights, "--output", tmp_path / "attention")
    assert len([*(tmp_path / "attention").iterdir()]) == 1


def test_describes_and_converts(trained, tmp_path):
    weights = trained / "last"
    assert json.loads(run("info", weights, "--json").stdout)["network"] == "DETR"
    run("convert", weights, tmp_path / "converted", "--to", "transformers5")
    assert_same(from_pretrained(tmp_path / "converted"), from_pretrained(weights))
    run("export", weights, tmp_path / "detr.pt2")
    assert "DETR" in run("info", tmp_path / "detr.pt2").stdout.split()


def test_a_benchmark_compares_with_transformers_detr(trained):
    from conditional_detr.benchmark.measure import measure
    from conditional_detr.benchmark.training import measure_training

    model = from_pretrained(trained / "last")
    with torch.no_grad():
        model.box_head.layers[-1].weight.normal_()
    first, second = measure(model, ["transformers", "optimised"], size=(64, 96), rounds=1)
    assert max(first.boxes, second.boxes) < 1e-4
    losses = {(one.kind, one.engine): one.loss for one in measure_training(model, size=(64, 64), rounds=1)}
    assert losses["criterion", "this library"] == pytest.approx(losses["criterion", "transformers"], rel=1e-4)
