"""Quantised models: which operations are in int8, their accuracy, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import conditional_detr.deploy.quantize as module
from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing, optimize
from conditional_detr.cli import app
from conditional_detr.data.synthetic import CLASS_NAMES, draw_image, image_index, write_shapes
from conditional_detr.deploy.export import openvino_network
from conditional_detr.deploy.quantize import quantize
from conditional_detr.evaluation.coco import evaluate
from conditional_detr.inference.exported import ExportedModel
from conditional_detr.inference.runtimes import openvino_core
from helpers.exports import OneTrace
from helpers.models import TINY_CONFIG, card_metric

THRESHOLDS = dict.fromkeys(CLASS_NAMES, 0.25)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def drawn(count):
    return [draw_image(1, image_index("calibration", index))[0] for index in range(count)]


@pytest.fixture(scope="module")
def shapes():
    return ConditionalDETR.from_pretrained("shapes")


@pytest.fixture(scope="module", autouse=True)
def _converted_once():
    """Trace and convert a model once for all tests: nncf quantises copies of the network, which stays as it is."""
    networks = {}

    def convert_once(traced):
        if id(traced) not in networks:
            networks[id(traced)] = openvino_network(traced)
        return networks[id(traced)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", OneTrace())
        patch.setattr(module, "openvino_network", convert_once)
        yield
    assert networks
    assert not any(node.get_type_name() == "FakeQuantize" for one in networks.values() for node in one.get_ops())


@pytest.fixture(scope="module")
def quantised(shapes, tmp_path_factory):
    """The checkpoint "shapes" in int8 with post-processing, its description and its progress messages."""
    path = tmp_path_factory.mktemp("int8") / "shapes.xml"
    steps = []
    described = quantize(
        shapes,
        path,
        drawn(12),
        top_k=20,
        thresholds=THRESHOLDS,
        measure=lambda _: {"AP": np.float32(0.5)},
        progress=steps.append,
    )
    return path, described, steps


def operations(path, kind):
    """Return the operations of a type, and whether the input of each is quantised."""
    network = openvino_core().read_model(path)
    found = [node for node in network.get_ordered_ops() if node.get_type_name() == kind]
    return [(node.get_friendly_name(), _source(node) == "FakeQuantize") for node in found]


def _source(node):
    """Return the type of operation that computes the first input, skipping reshapes, scales and pooling."""
    while True:
        node = node.input_value(0).get_node()
        if node.get_type_name() not in ("Reshape", "Transpose", "Multiply", "MaxPool"):
            return node.get_type_name()


def test_thresholds_are_stored(quantised):
    path, described, _ = quantised
    assert Detector.from_file(path).thresholds == described.thresholds == THRESHOLDS


def test_quantised_operations(quantised):
    """The backbone with its additions, and all linear layers except heads and λ_q; no attention and no norm."""
    path, *_ = quantised
    convolutions = operations(path, "Convolution")
    assert len(convolutions) == 16  # of a ResNet-18 up to stage 3, and the projection
    assert all(rounded for _, rounded in convolutions)
    sums = [rounded for name, rounded in operations(path, "Add") if "aten.add" in name]
    assert sum(sums) == 6  # two blocks in each stage
    assert len(sums) > 20  # with those of positions and before norms
    for kind in ("ScaledDotProductAttention", "MVN"):
        assert not any(rounded for _, rounded in operations(path, kind))
    linear = operations(path, "MatMul")
    rounded = {name.split("/")[0] for name, is_rounded in linear if is_rounded}
    # 3 encoder layers of 5; keys and values of the decoder, whose positional part is constant (16); its layers, with
    # λ_q between them twice
    numbers = (*range(1, 16), *range(17, 22), *range(24, 31), *range(33, 38))
    assert {f"linear_{i}" for i in numbers} | {"linear"} == rounded
    kept = {f"linear_{i}" for i in (22, 23, 31, 32, 38, 39, 40, 41)}
    assert not kept & rounded
    assert kept <= {name.split("/")[0] for name, _ in linear}


def test_parts_can_be_kept(shapes, tmp_path):
    """In a file whose suffix is in capitals."""
    quantize(shapes, tmp_path / "kept.XML", drawn(2), keep=("encoder", "backbone"))
    assert {file.name for file in tmp_path.iterdir()} == {"kept.XML", "kept.bin"}
    assert ExportedModel(tmp_path / "kept.XML").description.precision == "int8"
    for kind in ("Convolution", "Add"):
        assert not any(rounded for _, rounded in operations(tmp_path / "kept.XML", kind))
    rounded = {name.split("/")[0] for name, is_rounded in operations(tmp_path / "kept.XML", "MatMul") if is_rounded}
    assert "linear_15" in rounded
    assert not {"linear_3", "linear_4"} & rounded


def test_attention_and_norms_of_a_backbone_stay_in_float(tmp_path):
    config = replace(TINY_CONFIG, backbone="pvt_v2_b0", backbone_stage=2, encoder_layers=0, decoder_layers=1)
    model = ConditionalDETR(config, Metadata.numbered(7)).eval()
    model.metadata = replace(model.metadata, preprocessing=Preprocessing(96, 160))
    quantize(model, tmp_path / "int8.xml", drawn(1))
    for kind, outside in (("ScaledDotProductAttention", 1), ("MVN", 3)):  # of the decoder
        found = operations(tmp_path / "int8.xml", kind)
        assert len(found) > outside
        assert not any(rounded for _, rounded in found)
    assert all(rounded for _, rounded in operations(tmp_path / "int8.xml", "Convolution"))


def test_a_backbone_whose_convolutions_have_other_names(tmp_path):
    """OpenVINO makes multiplications of some depthwise convolutions' names."""
    config = replace(TINY_CONFIG, backbone="mobilenetv3_small_100", encoder_layers=0, decoder_layers=1)
    model = ConditionalDETR(config, Metadata.numbered(7)).eval()
    model.metadata = replace(model.metadata, preprocessing=Preprocessing(96, 160))
    quantize(model, tmp_path / "kept.xml", drawn(1), keep=("backbone",))
    for kind in ("Convolution", "GroupConvolution"):
        found = operations(tmp_path / "kept.xml", kind)
        assert len(found) > 5
        assert not any(rounded for _, rounded in found)


def test_detections_are_similar(quantised, shapes):
    path, *_ = quantised
    detector = Detector.from_file(path)
    for index in range(4):
        image, *_ = draw_image(0, image_index("demo", index))
        expected = Detector(shapes)(image, threshold=0.6)
        found = detector(image, threshold=0.3)
        assert len(expected) > 0
        for box, score, name in expected:
            same = found.filter(classes=[name])
            distances = (same.boxes - torch.tensor(box)).abs().amax(dim=1)
            assert distances.min() < 6  # pixels of 192 x 256
            assert same.scores[distances.argmin()] == pytest.approx(score, abs=0.2)


def test_description_of_a_quantised_model(quantised, shapes):
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
    """On the official test split, calibrated on the training split."""
    data = shared / "data" / "bccd"
    training = json.loads((data / "instances_train.json").read_text())["images"]
    images = [data / "images" / image["file_name"] for image in training[::16]]
    quantize(ConditionalDETR.from_pretrained("bccd"), tmp_path / "bccd.xml", images)
    result = evaluate(Detector.from_file(tmp_path / "bccd.xml"), data / "instances_test.json", data / "images")
    assert result.metrics["AP"] >= card_metric("bccd", "AP") - 5e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"target": "x.onnx"},
            ValueError,
            r"x\.onnx: expected a file name that ends in \.xml, for OpenVINO",
        ),
        ({"target": "none/x.xml"}, FileNotFoundError, "none: no such folder"),
        ({"images": []}, ValueError, "images: expected at least one, got none"),
        ({"images": "x.png"}, TypeError, "images: expected a list, got str"),
        ({"images": Path("x.png")}, TypeError, "images: expected a list, got PosixPath"),
        ({"keep": "encoder"}, TypeError, "keep: expected a list, got str"),
        ({"images": ["x.png"]}, FileNotFoundError, r"x\.png: no such file"),
        ({"keep": ["head"]}, ValueError, "keep: expected parts among backbone, encoder, decoder, got 'head'"),
        ({"top_k": 0}, ValueError, "top_k: expected an int of at least 1, got 0"),
    ],
)
def test_errors(shapes, tmp_path, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        quantize(shapes, **{"target": "x.xml", "images": drawn(1), **change})
    assert list(tmp_path.iterdir()) == []


def test_error_names_an_unreadable_image(shapes, tmp_path):
    with pytest.raises(TypeError, match=r"images\[1\]: expected"):
        quantize(shapes, tmp_path / "x.xml", [*drawn(1), 3])
    with pytest.raises(ValueError, match="model: expected a plain model, got an optimised copy"):
        quantize(optimize(shapes), tmp_path / "x.xml", drawn(1))
    assert list(tmp_path.iterdir()) == []


def test_missing_package_raises(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("conditional_detr.deploy.quantize.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs nncf, which is not installed: pip install 'conditional-detr"):
        quantize(shapes, tmp_path / "x.xml", drawn(1))


# ---- the command


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return write_shapes(folder, 6, seed=2, split="val"), folder / "val"


def test_command_measures_the_loss_of_ap(dataset, tmp_path):
    annotations, images = dataset
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

    info = run("info", target)
    assert info.exit_code == 0, info.output
    assert f"AP             float32 {ap['float32']:.4f}, int8 {ap['int8']:.4f}" in info.stdout
    assert "also in float nothing" in info.stdout

    again = run("quantize", "shapes", target, *options)
    assert again.exit_code == 2
    assert "shapes.xml: already exists; set overwrite, or --overwrite, to replace it" in again.stderr


def test_command_keeps_more_parts_in_float_until_ap_is_high_enough(least, dataset, tmp_path, monkeypatch):
    """With a fake AP: it is high enough only with encoder and decoder in float, or never."""
    annotations, images = dataset
    target = tmp_path / "least.xml"
    kept, converted = [], []
    convert = module.openvino_network
    monkeypatch.setattr(module, "openvino_network", lambda traced: converted.append(traced) or convert(traced))

    def pretend(least):
        def ap(detector, *_, **__):
            if not isinstance(detector.model, ExportedModel):
                return SimpleNamespace(metrics={"AP": 0.6})
            kept.append(tuple(detector.model.description.measured["calibration"]["also in float"]))
            return SimpleNamespace(metrics={"AP": 0.58 + 0.01 * len(kept[-1]) if least else 0.5})

        monkeypatch.setattr("conditional_detr.evaluation.coco.evaluate", ap)

    options = ["--calibration", images, "--samples", 1, "--data", annotations, "--images", images]
    pretend(least=True)
    done = run("quantize", least, target, *options, "--max-loss", 0.0001)
    assert done.exit_code == 0, done.output
    assert kept == [(), ("encoder",), ("decoder", "encoder")]
    assert len(converted) == 1
    assert "AP 0.6000 before, 0.5900 after: lost more than 0.0001" in done.stderr
    assert "parts kept in float32: decoder, encoder" in done.stdout
    pretend(least=False)
    before = target.read_bytes()
    failed = run("quantize", least, target, *options, "--overwrite", "--keep", "encoder")
    assert failed.exit_code == 1
    assert "not written: AP was 0.6000 before and at best 0.5000 after, lost more than 0.005" in failed.stderr
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "x.json"), "expected both --data and --images, to measure AP, or neither"),
        (("--keep", "head"), "keep: expected parts among backbone, encoder, decoder, got 'head'"),
        (
            ("--keep", "head", "--data", "no.json", "--images", "."),
            "keep: expected parts among backbone, encoder, decoder",
        ),
    ],
)
def test_command_refuses(dataset, tmp_path, arguments, message):
    refused = run("quantize", "shapes", tmp_path / "x.xml", "--calibration", dataset[1], *arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert list(tmp_path.iterdir()) == []
