"""8-bit integers: what is in them and what is not, what they cost, and what the command does about it."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing, optimize
from conditional_detr.cli import app
from conditional_detr.data.synthetic import draw_image, index_in, write_shapes
from conditional_detr.deploy.quantize import quantize
from conditional_detr.evaluation.coco import evaluate
from conditional_detr.inference.exported import ExportedModel
from conditional_detr.inference.runtimes import openvino_core
from helpers.models import TINY_CONFIG, told


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def drawn(count):
    return [draw_image(1, index_in("calibration", place))[0] for place in range(count)]


@pytest.fixture(scope="module")
def shapes():
    return ConditionalDETR.from_pretrained("shapes")


@pytest.fixture(scope="module")
def quantised(shapes, tmp_path_factory):
    """The weights "shapes" in 8 bits, with post-processing, and what was told of them."""
    path = tmp_path_factory.mktemp("int8") / "shapes.xml"
    steps = []
    described = quantize(
        shapes, path, drawn(12), top_k=20, measure=lambda _: {"AP": np.float32(0.5)}, progress=steps.append
    )
    return path, described, steps


def operations(path, kind):
    """Return the operations of a kind, and whether each reads what was rounded to 8 bits."""
    network = openvino_core().read_model(path)
    found = [node for node in network.get_ordered_ops() if node.get_type_name() == kind]
    return [(node.get_friendly_name(), _source(node) == "FakeQuantize") for node in found]


def _source(node):
    """Return what gives an operation its first input, through what only moves or scales it."""
    while True:
        node = node.input_value(0).get_node()
        if node.get_type_name() not in ("Reshape", "Transpose", "Multiply", "MaxPool"):
            return node.get_type_name()


def test_what_is_in_integers(quantised):
    """The backbone, its additions too, and all linear layers, but no product of attention, no head and no λ_q."""
    path, *_ = quantised
    convolutions = operations(path, "Convolution")
    assert len(convolutions) == 16  # of a ResNet-18 up to stage 3, and the projection
    assert all(rounded for _, rounded in convolutions)
    sums = [rounded for name, rounded in operations(path, "Add") if "aten.add" in name]
    assert sum(sums) == 6  # two blocks in each stage
    assert len(sums) > 20  # and those of positions and of what attention gives, before it is normalised
    for kind in ("ScaledDotProductAttention", "MVN"):
        assert not any(rounded for _, rounded in operations(path, kind))
    linear = operations(path, "MatMul")
    rounded = {name.split("/")[0] for name, is_rounded in linear if is_rounded}
    # 3 encoder layers of 5; the keys and values of the decoder, whose positions no image changes (16); its layers,
    # with λ_q between them twice
    numbers = (*range(1, 16), *range(17, 22), *range(24, 31), *range(33, 38))
    assert {f"linear_{i}" for i in numbers} | {"linear"} == rounded
    kept = {f"linear_{i}" for i in (22, 23, 31, 32, 38, 39, 40, 41)}
    assert not kept & rounded
    assert kept <= {name.split("/")[0] for name, _ in linear}


def test_parts_can_be_kept(shapes, tmp_path):
    quantize(shapes, tmp_path / "kept.xml", drawn(2), keep=("encoder", "backbone"))
    for kind in ("Convolution", "Add"):
        assert not any(rounded for _, rounded in operations(tmp_path / "kept.xml", kind))
    rounded = {name.split("/")[0] for name, is_rounded in operations(tmp_path / "kept.xml", "MatMul") if is_rounded}
    assert "linear_15" in rounded
    assert not {"linear_3", "linear_4"} & rounded


def test_attention_and_norms_of_a_backbone_stay_in_float(tmp_path):
    config = replace(TINY_CONFIG, backbone="pvt_v2_b0", backbone_stage=2)
    model = ConditionalDETR(config, Metadata.numbered(7)).eval()
    model.metadata = replace(model.metadata, preprocessing=Preprocessing(96, 160))
    quantize(model, tmp_path / "int8.xml", drawn(1))
    for kind, outside in (("ScaledDotProductAttention", 7), ("MVN", 13)):  # of encoder and decoder
        found = operations(tmp_path / "int8.xml", kind)
        assert len(found) > outside
        assert not any(rounded for _, rounded in found)
    assert all(rounded for _, rounded in operations(tmp_path / "int8.xml", "Convolution"))


def test_a_backbone_whose_convolutions_have_other_names(tmp_path):
    """OpenVINO makes multiplications of some depthwise convolutions' names."""
    config = replace(TINY_CONFIG, backbone="mobilenetv3_small_100", backbone_stage=3)
    model = ConditionalDETR(config, Metadata.numbered(7)).eval()
    model.metadata = replace(model.metadata, preprocessing=Preprocessing(96, 160))
    quantize(model, tmp_path / "kept.xml", drawn(1), keep=("backbone",))
    for kind in ("Convolution", "GroupConvolution"):
        found = operations(tmp_path / "kept.xml", kind)
        assert len(found) > 5
        assert not any(rounded for _, rounded in found)


def test_the_same_objects(quantised, shapes):
    path, *_ = quantised
    detector = Detector.from_file(path)
    for place in range(4):
        image, *_ = draw_image(0, index_in("demo", place))
        expected = Detector(shapes)(image, threshold=0.6)
        found = detector(image, threshold=0.3)
        assert len(expected) > 0
        for box, score, name in expected:
            same = found.filter(classes=[name])
            distances = (same.boxes - torch.tensor(box)).abs().amax(dim=1)
            assert distances.min() < 6  # pixels of 192 x 256
            assert same.scores[distances.argmin()] == pytest.approx(score, abs=0.2)


def test_what_stands_in_the_file(quantised, shapes):
    path, described, steps = quantised
    read = ExportedModel(path).description
    assert read == described
    assert read.precision == "int8"
    assert read.top_k == 20
    assert read.measured == {"calibration": {"images": 12, "also in float": []}, "AP": 0.5}
    assert read.versions.keys() == {"conditional-detr", "torch", "openvino", "nncf"}
    assert [(one.height, one.width) for one in read.parity] == [(256, 341), (129, 172)]
    assert 1e-4 < max(one.logits for one in read.parity) < 3  # neither float32 nor nonsense
    assert "measuring ranges, pass 1: 12 of 12 images" in steps
    size = path.with_suffix(".bin").stat().st_size
    assert size < 0.45 * sum(tensor.nbytes for tensor in shapes.state_dict().values())


def test_bccd_loses_at_most_half_a_point(shared, tmp_path):
    """On the official test split, with ranges of images of the training split."""
    data = shared / "data" / "bccd"
    training = json.loads((data / "instances_train.json").read_text())["images"]
    images = [data / "images" / image["file_name"] for image in training[::4]]
    quantize(ConditionalDETR.from_pretrained("bccd"), tmp_path / "bccd.xml", images)
    result = evaluate(Detector.from_file(tmp_path / "bccd.xml"), data / "instances_test.json", data / "images")
    assert result.metrics["AP"] >= told("bccd", "AP") - 5e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"target": "x.onnx"},
            ValueError,
            r"x\.onnx: expected a file's name that ends in \.xml: int8 is",
        ),
        ({"target": "none/x.xml"}, FileNotFoundError, "none: no such folder"),
        ({"images": []}, ValueError, "images: expected at least one, got none"),
        ({"images": "x.png"}, TypeError, "images: expected a list, got str"),
        ({"images": Path("x.png")}, TypeError, "images: expected a list, got PosixPath"),
        ({"keep": "encoder"}, TypeError, "keep: expected a list, got str"),
        ({"images": ["x.png"]}, FileNotFoundError, r"x\.png: no such file"),
        ({"keep": ["head"]}, ValueError, "keep: expected some of backbone, encoder, decoder, got 'head'"),
        ({"top_k": 0}, ValueError, "top_k: expected an int of at least 1, got 0"),
    ],
)
def test_what_it_refuses(shapes, tmp_path, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        quantize(shapes, **{"target": "x.xml", "images": drawn(1), **change})
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_read_is_named(shapes, tmp_path):
    with pytest.raises(TypeError, match=r"images\[1\]: expected"):
        quantize(shapes, tmp_path / "x.xml", [*drawn(1), 3])
    with pytest.raises(ValueError, match="model: expected a plain model, got one that was optimised before"):
        quantize(optimize(shapes), tmp_path / "x.xml", drawn(1))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_told(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("conditional_detr.deploy.quantize.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs nncf, not installed here: pip install 'conditional-detr"):
        quantize(shapes, tmp_path / "x.xml", drawn(1))


# ---- the command


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_shapes(folder, 6, seed=2, split="val"), folder / "val"


def test_command_measures_what_is_lost(data_set, tmp_path):
    annotations, images = data_set
    target = tmp_path / "shapes.xml"
    measured = ["--data", annotations, "--images", images]
    options = ["--calibration", images, "--samples", 4]
    done = run("quantize", "shapes", target, *options, *measured, "--max-loss", 1)
    assert done.exit_code == 0, done.output
    assert f"wrote {target} (int8, " in done.stdout
    found = re.search(r"AP (0\.\d+) before, (0\.\d+) after, on instances_val\.json", done.stdout)
    ap = ExportedModel(target).description.measured["AP"]
    assert [float(number) for number in found.groups()] == [round(ap["float32"], 4), round(ap["int8"], 4)]
    result = evaluate(Detector.from_file(target), annotations, images)
    assert result.metrics["AP"] == pytest.approx(ap["int8"], abs=1e-9)
    plain = evaluate(Detector.from_pretrained("shapes"), annotations, images)
    assert plain.metrics["AP"] == pytest.approx(ap["float32"], abs=1e-3)
    assert ExportedModel(target).description.measured["calibration"]["images"] == 4

    told = run("info", target)
    assert told.exit_code == 0, told.output
    assert f"AP             float32 {ap['float32']:.4f}, int8 {ap['int8']:.4f}" in told.stdout
    assert "also in float nothing" in told.stdout

    again = run("quantize", "shapes", target, *options)
    assert again.exit_code == 2
    assert "already exists: shapes.xml, shapes.bin; use --overwrite to replace" in again.stderr


def test_command_keeps_more_in_float_until_little_is_lost(data_set, tmp_path, monkeypatch):
    """What AP says is made up: only with encoder and decoder in float it is high enough, or not even then."""
    annotations, images = data_set
    target = tmp_path / "shapes.xml"
    kept = []

    def pretend(least):
        def ap(detector, *_, **__):
            if not isinstance(detector.model, ExportedModel):
                return SimpleNamespace(metrics={"AP": 0.6})
            kept.append(tuple(detector.model.description.measured["calibration"]["also in float"]))
            return SimpleNamespace(metrics={"AP": 0.58 + 0.01 * len(kept[-1]) if least else 0.5})

        monkeypatch.setattr(sys.modules["conditional_detr.cli.quantize"], "evaluate", ap)

    options = ["--calibration", images, "--samples", 1, "--data", annotations, "--images", images]
    pretend(least=True)
    done = run("quantize", "shapes", target, *options, "--max-loss", 0.0001)
    assert done.exit_code == 0, done.output
    assert kept == [(), ("encoder",), ("decoder", "encoder")]
    assert "AP 0.6000 before, 0.5900 after: lost more than 0.0001" in done.stderr
    assert "parts kept in float32: decoder, encoder" in done.stdout
    pretend(least=False)
    before = target.read_bytes()
    failed = run("quantize", "shapes", target, *options, "--overwrite", "--keep", "encoder")
    assert failed.exit_code == 1
    assert "not written: AP was 0.6000 before and at best 0.5000 after, lost more than 0.005" in failed.stderr
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "x.json"), "expected both --data and --images, to measure AP, or neither"),
        (("--keep", "head"), "keep: expected some of backbone, encoder, decoder, got 'head'"),
        (
            ("--keep", "head", "--data", "no.json", "--images", "."),
            "keep: expected some of backbone, encoder, decoder",
        ),
    ],
)
def test_command_refuses(data_set, tmp_path, arguments, message):
    refused = run("quantize", "shapes", tmp_path / "x.xml", "--calibration", data_set[1], *arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert list(tmp_path.iterdir()) == []
