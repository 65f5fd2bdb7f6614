"""The commands that look after weights: ``convert`` and ``info``."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Config, Metadata, Preprocessing
from conditional_detr.checkpoints.loading import from_pretrained
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.cli import app
from conditional_detr.deploy.summary import count_flops, summarise
from helpers.models import TINY_CONFIG, assert_same

FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def named(tiny, tmp_path) -> Path:
    """The tiny checkpoint in half precision, with names, an unused row and preprocessing of its own."""
    model = from_pretrained(tiny.folder)
    names = ("cat", None, "café", "[red]dog", None, "x", "y")
    model.metadata = Metadata(names, (3, 1, 4, 15, 9, 2, 6), Preprocessing(64, 96))
    model.save_pretrained(tmp_path / "named", dtype=torch.float16)
    return tmp_path / "named"


# ---- convert


def test_convert_there_and_back(tiny, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    result = run("convert", tiny.folder, there, "--to", "transformers5")
    assert result.exit_code == 0, result.output
    weights = there / "model.safetensors"
    size = f"{weights.stat().st_size / 1e6:.1f} MB"
    assert result.stdout == (
        f"read {tiny.folder / 'model.safetensors'} (published names, float32),"
        f" wrote {weights} (transformers5 names, float32, {size})\n"
    )
    assert files_in(there) == FILES
    assert load_file(weights).keys() == tiny.transformers.state_dict().keys()
    assert run("convert", there, back).exit_code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny.folder, back))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_convert_to_the_authors_file_in_half_precision(dc5, tmp_path):
    path = tmp_path / "dc5.pth"
    result = run("convert", dc5.folder, path, "--to", "original", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert f"wrote {path} (original names, bfloat16, {path.stat().st_size / 1e6:.1f} MB)" in result.stdout
    loaded, expected = from_pretrained(path), from_pretrained(dc5.folder)
    assert loaded.config == expected.config == Config(dilation=True)
    assert_same(loaded, expected.bfloat16().float())


def test_convert_overwrites_only_when_told(tiny, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "config.json").write_text("mine")
    refused = run("convert", tiny.folder, target)
    assert refused.exit_code == 2
    assert (
        refused.stderr
        == f"error: {target / 'config.json'}: already exists; set overwrite, or --overwrite, to replace it\n"
    )
    assert files_in(target) == ["config.json", "notes.txt"]
    assert (target / "config.json").read_text() == "mine"
    assert run("convert", tiny.folder, target, "--overwrite").exit_code == 0
    assert_same(from_pretrained(target), from_pretrained(tiny.folder))
    assert (target / "notes.txt").read_text() == "mine"


def test_convert_onto_its_own_source(tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "both")
    """An input is never written, also when asked: at half precision its weights would be lost."""
    refused = run("convert", tmp_path / "both", tmp_path / "both", "--dtype", "float16", "--overwrite")
    assert refused.exit_code == 2
    assert (
        refused.stderr == f"error: {tmp_path / 'both' / 'model.safetensors'}: expected a file to write, got an input\n"
    )
    assert_same(from_pretrained(tmp_path / "both"), from_pretrained(tiny.folder))


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        (
            "nothing",
            "target",
            (),
            "error: weights 'nothing': no such file or folder; expected a file, a folder, a short",
        ),
        (None, "target", ("--to", "original"), "target: expected a file *.pth for original names"),
        (None, "target.pth", (), "target.pth: expected a folder for published names"),
        (
            None,
            "target.pth",
            ("--to", "original"),
            "error: original: expected a backbone that the authors' code builds",
        ),
    ],
)
def test_convert_fails_in_one_line(tiny, tmp_path, source, target, options, message):
    result = run("convert", source or tiny.folder, tmp_path / target, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("options", [("--to", "onnx"), ("--dtype", "int8")])
def test_a_choice_there_is_not_is_a_usage_error(tiny, tmp_path, options):
    result = run("convert", tiny.folder, tmp_path / "target", *options)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert f"'{options[1]}' is not one of" in result.stderr
    assert files_in(tmp_path) == []


# ---- info


def test_info_of_the_papers_networks(r50):
    """The table's 44 M and 63 M; 222,400 parameters of stem and first stage are frozen."""
    summary = summarise(from_pretrained(r50.folder))
    assert summary.total == 43_418_401
    assert summary.trainable == 43_418_401 - 222_400
    assert summary.size == (800, 1333)
    assert summary.multiply_adds / 1e9 == pytest.approx(105.96, abs=0.005)
    assert summary.flops == 2 * summary.multiply_adds
    with MetaInit():
        deeper = ConditionalDETR(Config(backbone="resnet101"))
    assert summarise(deeper, (64, 64)).total == 62_358_305
    assert summarise(deeper, (64, 64)).load_report is None


def test_parameters_by_hand(tiny):
    """Width 32, feed-forward 48, 2 and 3 layers, 11 queries, 7 classes, a ResNet-18 to its third stage."""

    def linear(inputs, outputs):
        return inputs * outputs + outputs

    stem, first = 64 * 3 * 49, 4 * 64 * 64 * 9
    second = (64 + 3 * 128) * 128 * 9 + 64 * 128
    third = (128 + 3 * 256) * 256 * 9 + 128 * 256
    norm, attention_projection = 2 * 32, linear(32, 32)
    feedforward = linear(32, 48) + linear(48, 32)
    encoder_layer = 4 * attention_projection + feedforward + 2 * norm
    decoder_layer = 12 * attention_projection + feedforward + 3 * norm
    shared = norm + linear(32, 32) + linear(32, 2) + 2 * linear(32, 32)
    summary = summarise(from_pretrained(tiny.folder), (64, 64))
    assert summary.parameters == {
        "backbone": stem + first + second + third,
        "projection": linear(256, 32),
        "encoder": 2 * encoder_layer,
        "object_queries": 11 * 32,
        "decoder": 3 * decoder_layer + attention_projection + shared,  # the first layer projects o_q as well
        "heads": linear(32, 7) + 2 * linear(32, 32) + linear(32, 4),
    }
    assert summary.total - summary.trainable == stem + first


def test_flops_by_hand():
    """Multiply-adds at 64 x 96 of the same network: 24 tokens on a map of 4 x 6."""
    s, n, d, ff = 24, 11, 32, 48
    backbone = (
        64 * 3 * 49 * 32 * 48
        + 4 * 64 * 64 * 9 * 16 * 24
        + ((64 + 3 * 128) * 128 * 9 + 64 * 128) * 8 * 12
        + ((128 + 3 * 256) * 256 * 9 + 128 * 256) * s
    )
    encoder_layer = 4 * d * d * s + 2 * s * s * d + 2 * d * ff * s
    self_attention = 6 * d * d * n + 2 * n * n * d
    cross_attention = 3 * d * d * n + 3 * d * d * s + n * s * 2 * d + n * s * d  # queries and keys are twice as wide
    decoder_layer = self_attention + cross_attention + 2 * d * ff * n
    decoder = 3 * decoder_layer + d * d * n + (d * d + d * 2) * n + 2 * (2 * d * d * n)  # o_q, s, λ_q of two layers
    heads = 3 * n * (d * 7 + 2 * d * d + d * 4)
    expected = backbone + 256 * d * s + 2 * encoder_layer + decoder + heads
    assert count_flops(TINY_CONFIG, 64, 96) == 2 * expected


def test_info_as_json(named):
    result = run("info", named, "--json")
    assert result.exit_code == 0, result.output
    weights = named / "model.safetensors"
    content = json.loads(result.stdout)
    assert content["weights"] == {
        "file": str(weights),
        "bytes": weights.stat().st_size,
        "name_format": "published",
        "dtype": "float16",
    }
    assert Config(**content["architecture"]) == TINY_CONFIG
    assert content["classes"] == {
        "names": ["cat", None, "café", "[red]dog", None, "x", "y"],
        "unused_rows": 2,
        "category_ids": [3, 1, 4, 15, 9, 2, 6],
    }
    assert content["preprocessing"]["longest_edge"] == 96
    assert content["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert content["parameters"]["total"] == sum(content["parameters"]["parts"].values()) == 2_856_765
    flops = count_flops(TINY_CONFIG, 64, 96)
    assert content["cost"] == {"height": 64, "width": 96, "flops": flops, "multiply_adds": flops // 2}


def test_info_in_words(named):
    result = run("info", named, "--size", "128x192")
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    size = f"{(named / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    assert f"published names, float16, {size}" in words
    assert "backbone resnet18, stage 3 encoder 2 layers, width 32, 4 heads decoder 3 layers, 11 queries" in words
    assert "classes 5, and 2 unused rows cat, café, [red]dog, x, y" in words
    assert "shortest edge 64, longest 96" in words
    assert "parameters 2,856,765, 2,699,901 of them trainable backbone 2,778,304 projection 8,224" in words
    assert str(named / "model.safetensors") in "".join(result.stdout.split())
    flops = count_flops(TINY_CONFIG, 128, 192)
    assert f"128 x 192 {flops / 1e9:.2f} GFLOP, {flops / 2e9:.2f} G multiply-adds" in words


@pytest.mark.parametrize("size", ["800", "800x", "0x800", "-1x800", "800x1333x3", "wide"])
def test_a_size_that_is_none_is_a_usage_error(tiny, size):
    result = run("info", tiny.folder, "--size", size)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert "--size" in result.stderr
    assert "800x1333" in result.stderr


def test_info_fails_in_one_line(tiny, tmp_path):
    result = run("info", tmp_path / "nothing")
    assert result.exit_code == 2
    assert re.match("error: weights '.*nothing': no such file or folder; expected a file, a folder, a", result.stderr)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_size_that_the_backbone_cannot_take():
    with pytest.raises(ValueError, match="size: convnext_femto cannot process 2 x 2: Calculated padded input"):
        count_flops(Config(backbone="convnext_femto", backbone_stage=3), 2, 2)
    with pytest.raises(ValueError, match="size: expected at least 1 x 1, got 0 x 5"):
        count_flops(TINY_CONFIG, 0, 5)
