"""Saving in every name format: the same model, all files or none, and reports of what a format does not store."""

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForObjectDetection

from conditional_detr import ConditionalDETR, Config, Metadata, Preprocessing
from conditional_detr.checkpoints.files import open_checkpoint
from conditional_detr.checkpoints.labels import COCO_NAMES
from conditional_detr.checkpoints.loading import from_pretrained
from conditional_detr.checkpoints.saving import save_as, write_tensors
from helpers.models import TINY, TINY_CONFIG, assert_same, transformers_model, two_images
from helpers.name_formats import to_original
from helpers.reference import distance, rounding, transformers_output

TARGETS = {"published": "folder", "transformers5": "folder5", "original": "authors.pth"}


@pytest.fixture(scope="module")
def small() -> ConditionalDETR:
    """A small model whose backbone goes to its last stage, as in the authors' code; no two values are equal."""
    torch.manual_seed(0)
    model = ConditionalDETR(replace(TINY_CONFIG, backbone_stage=4, dropout=0.25)).eval()
    for tensor in model.state_dict().values():
        nn.init.normal_(tensor)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parsed(folder: Path) -> dict[str, object]:
    """Return the contents with the header of the safetensors file apart: the order of its metadata is random."""
    files = contents(folder)
    weights = files.pop("model.safetensors")
    end = 8 + int.from_bytes(weights[:8], "little")
    return {**files, "header": json.loads(weights[8:end]), "tensors": weights[end:]}


# ---- the published format, which transformers reads


def reopened_by_transformers(folder):
    from transformers import AutoModelForObjectDetection

    model, info = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_transformers_agrees(model, folder):
    """Assert that the checkpoint gives the same numbers in transformers and loads here as the same model."""
    reference = reopened_by_transformers(folder)
    pixels, padding = two_images()
    limits = rounding(reference, pixels, padding)
    with torch.no_grad():
        logits, boxes = distance(model(pixels, padding), transformers_output(reference, pixels, padding))
    assert logits <= 3 * limits[0] < 3e-5
    assert boxes <= 3 * limits[1] < 6e-6
    again = from_pretrained(folder)
    assert_same(again, model)
    assert again.config == model.config
    assert again.metadata == model.metadata


@pytest.mark.parametrize("checkpoint", ["tiny", "r50", "dc5", "tiny_detr"])
def test_saved_files_load_in_transformers(checkpoint, request, tmp_path):
    model = from_pretrained(request.getfixturevalue(checkpoint).folder)
    model.save_pretrained(tmp_path)
    assert_transformers_agrees(model, tmp_path)


def test_saved_files_with_other_classes_load_in_transformers(tiny, tmp_path):
    model = from_pretrained(tiny.folder, class_names=[None, "LABEL_3", "café"], num_queries=5)
    model.metadata = Metadata(model.metadata.class_names, (5, 6, 7), model.metadata.preprocessing)
    model.save_pretrained(tmp_path)
    assert_transformers_agrees(model, tmp_path)
    assert reopened_by_transformers(tmp_path).config.id2label == {0: "N/A", 1: "LABEL_3", 2: "café"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk(tiny, tmp_path, dtype):
    model = from_pretrained(tiny.folder)
    model.save_pretrained(tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    rounded = from_pretrained(tmp_path)
    assert torch.equal(rounded.class_head.weight, model.class_head.weight.to(dtype).float())
    assert_transformers_agrees(rounded, tmp_path)


def test_the_published_preprocessor_is_what_transformers_reads(tiny, tmp_path):
    from transformers import ConditionalDetrImageProcessorPil

    from_pretrained(tiny.folder).save_pretrained(tmp_path)
    processor = ConditionalDetrImageProcessorPil.from_pretrained(tmp_path)
    assert dict(processor.size)["shortest_edge"] == 800
    assert dict(processor.size)["longest_edge"] == 1333
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


def test_a_model_that_the_format_cannot_store(tiny, tmp_path):
    model = from_pretrained(tiny.folder)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model.class_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"class_head\.weight: not finite in torch\.float32"):
        model.save_pretrained(tmp_path)
    model = from_pretrained(tiny.folder)
    model.object_queries.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"object_queries\.weight: not finite in torch\.float16"):
        model.save_pretrained(tmp_path, dtype=torch.float16)
    model.class_head = nn.Sequential(nn.Linear(32, 7))
    with pytest.raises(
        ValueError,
        match=r"class_head\.weight: missing.*class_head\.0\.weight: expected no such parameter, got \(7, 32\)",
    ):
        model.save_pretrained(tmp_path)
    model.class_head = nn.Linear(32, 2)
    with pytest.raises(ValueError, match=r"class_head\.weight: expected \(7, 32\), got \(2, 32\)"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


# ---- every name format to every name format


@pytest.mark.parametrize("source", TARGETS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_name_format_to_every_name_format(small, tmp_path, source, target):
    first, second = tmp_path / "first", tmp_path / "second"
    save_as(small, first / TARGETS[source], source)
    read = from_pretrained(first / TARGETS[source])
    save_as(read, second / TARGETS[target], target)
    again = from_pretrained(second / TARGETS[target])
    assert (read.load_report.name_format, again.load_report.name_format) == (source, target)
    assert_same(again, small)
    assert again.config == small.config
    assert again.metadata == small.metadata, "numbered classes are assumed"


def test_transformers_loads_the_names_it_uses_in_memory(tiny, tmp_path):
    save_as(from_pretrained(tiny.folder), tmp_path, "transformers5")
    twin = transformers_model(seed=1, **TINY)
    pixels, padding = two_images()
    expected = transformers_output(tiny.transformers, pixels, padding)
    assert distance(transformers_output(twin, pixels, padding), expected)[0] > 0.1
    twin.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert distance(transformers_output(twin, pixels, padding), expected) == (0, 0)
    assert_transformers_agrees(from_pretrained(tiny.folder), tmp_path)


def test_the_authors_names_by_other_rules(small, tmp_path):
    """The file equals the published file converted by the tests' own rules."""
    small.save_pretrained(tmp_path)
    save_as(small, tmp_path / "authors.pth", "original")
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(tmp_path / "authors.pth", weights_only=True)
    expected = to_original(load_file(tmp_path / "model.safetensors"))
    assert content["model"].keys() == expected.keys()
    assert [name for name in expected if not torch.equal(content["model"][name], expected[name])] == []
    assert content["args"] == argparse.Namespace(
        backbone="resnet18",
        dilation=False,
        position_embedding="sine",
        enc_layers=2,
        dec_layers=3,
        dim_feedforward=48,
        hidden_dim=32,
        dropout=0.25,
        nheads=4,
        num_queries=11,
        pre_norm=False,
    )


def test_the_authors_file_of_the_resnet_50(shared, dc5, tmp_path, caplog):
    """Names and shapes equal the reference list; the args contain the dilation, which no tensor does."""
    model = from_pretrained(dc5.folder)
    model.metadata = Metadata(COCO_NAMES)
    path = tmp_path / "r50.pth"
    with caplog.at_level(logging.WARNING):
        assert save_as(model, path, "original") == (path,)
        again = from_pretrained(path)
    assert caplog.text == "", "nothing is lost, nothing assumed"
    tensors = open_checkpoint(path).tensors
    lines = (shared / "reference" / "keys_original.txt").read_text().splitlines()
    assert {name: ",".join(map(str, tensor.shape)) for name, tensor in tensors.items()} == dict(
        line.split("\t") for line in lines
    )
    assert_same(again, model)
    assert again.config == Config(dilation=True)
    assert again.metadata == model.metadata


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name_format", TARGETS)
def test_half_precision_in_every_name_format(small, tmp_path, name_format, dtype):
    weights, *_ = save_as(small, tmp_path / TARGETS[name_format], name_format, dtype=dtype)
    assert {tensor.dtype for tensor in open_checkpoint(weights).tensors.values()} == {dtype}
    loaded = from_pretrained(weights)
    assert loaded.load_report.dtype == str(dtype).removeprefix("torch.")
    assert loaded.load_report.size == weights.stat().st_size
    rounded = {name: tensor.to(dtype).float() for name, tensor in small.state_dict().items()}
    assert [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, rounded[name])] == []


# ---- what a format does not store


@pytest.mark.parametrize(
    ("metadata", "lost"),
    [
        (Metadata(tuple("abcdefg")), "class names"),
        (Metadata(Metadata.numbered(7).class_names, tuple(range(1, 8))), "category ids"),
        (Metadata(tuple("abcdefg"), (), Preprocessing(480, 640)), "class names, preprocessing"),
    ],
)
def test_lost_metadata_is_a_warning(small, tmp_path, caplog, metadata, lost):
    model = from_pretrained(save_as(small, tmp_path / "folder", "published")[0])
    model.metadata = metadata
    with caplog.at_level(logging.WARNING):
        save_as(model, tmp_path / "authors.pth", "original")
    assert caplog.messages == [f"{tmp_path / 'authors.pth'}: the original format does not store {lost}"]
    assert from_pretrained(tmp_path / "authors.pth").metadata == Metadata.numbered(7)


@pytest.mark.parametrize(
    ("config", "got"),
    [
        (TINY_CONFIG, "'resnet18' up to stage 3"),
        (replace(TINY_CONFIG, backbone_stage=4, dilation=True), "'resnet18' up to stage 4, dilated"),
        (replace(TINY_CONFIG, backbone="resnet26d", backbone_stage=4), "'resnet26d' up to stage 4"),
        (replace(TINY_CONFIG, backbone="convnext_femto"), "'convnext_femto' up to stage 3"),
        (replace(TINY_CONFIG, backbone="regnetx_002", backbone_stage=4), "'regnetx_002' up to stage 4"),
    ],
)
def test_a_backbone_that_the_authors_code_does_not_build(tmp_path, config, got):
    """torchvision has no such model, or cannot dilate it, or its model of that name has other parameters."""
    message = rf"original: expected a backbone that the authors' code builds, .* got {got}$"
    with pytest.raises(ValueError, match=message):
        save_as(ConditionalDETR(config), tmp_path / "authors.pth", "original")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("target", "name_format", "message"),
    [
        ("folder", "original", r"folder: expected a file \*\.pth for original names"),
        ("model.safetensors", "original", r"model\.safetensors: expected a file \*\.pth for original names"),
        ("there.pth", "original", r"there\.pth: expected a file \*\.pth"),
        ("x.pth", "published", r"x\.pth: expected a folder for published names, got a file name"),
        ("model.safetensors", "transformers5", r"expected a folder for transformers5 names"),
        ("there", "published", r"there: expected a folder"),
        ("new", "hub", "name_format: expected one of published, transformers5, original, got 'hub'"),
    ],
)
def test_a_file_instead_of_a_folder_and_a_folder_instead_of_a_file(small, tmp_path, target, name_format, message):
    (tmp_path / "there.pth").mkdir()
    (tmp_path / "there").touch()
    with pytest.raises(ValueError, match=message):
        save_as(small, tmp_path / target, name_format)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "there.pth"]


# ---- all files or none


@pytest.mark.parametrize(
    ("name_format", "writer"),
    [
        ("published", "safetensors.torch.save_file"),
        ("published", "conditional_detr.checkpoints.saving._write_json"),
        ("transformers5", "conditional_detr.checkpoints.saving._write_json"),
        ("original", "torch.save"),
    ],
)
def test_interrupted_saving_leaves_the_old_files(small, tmp_path, monkeypatch, name_format, writer):
    target = tmp_path / TARGETS[name_format]
    weights, *_ = save_as(small, target, name_format)
    before = contents(weights.parent)
    changed = from_pretrained(weights)
    changed.class_head.weight.data += 1

    def full(content, where, **_):
        where.write(b"half") if hasattr(where, "write") else Path(where).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer, full)
        with pytest.raises(OSError, match="No space left"):
            save_as(changed, target, name_format, overwrite=True)
    assert contents(weights.parent) == before
    save_as(changed, target, name_format, overwrite=True)
    assert contents(weights.parent) != before
    assert contents(weights.parent).keys() == before.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems end a process that writes beyond its limit")
@pytest.mark.parametrize("name_format", TARGETS)
def test_a_full_disk_is_an_oserror(small, tmp_path, name_format):
    """torch and safetensors raise other errors."""
    import resource

    target = tmp_path / "folder" / TARGETS[name_format]
    weights, *_ = save_as(small, target, name_format)
    before = contents(weights.parent)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{weights.name}: cannot be written; check disk space and permissions \("):
            save_as(small, target, name_format, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(weights.parent) == before


def test_class_names_of_any_text(small, tmp_path):
    """Also half of a surrogate pair, as json gives it."""
    model = ConditionalDETR(
        small.config, replace(small.metadata, class_names=("\ud800", *small.metadata.class_names[1:]))
    )
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).metadata.class_names == model.metadata.class_names


class KilledError(BaseException):
    """Nothing catches it, so that it leaves the files as a kill does."""


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("earlier", [False, True])
def test_loading_completes_what_a_killed_process_has_begun(small, tmp_path, monkeypatch, at, earlier):
    """After each of the renames: the journal, weights, config and preprocessing are those of one model."""
    new = ConditionalDETR(small.config, replace(small.metadata, preprocessing=Preprocessing(64, 96))).eval()
    if earlier:
        small.save_pretrained(tmp_path)
    renamed, plain = [], Path.replace

    def rename(self, target):
        plain(self, target)
        renamed.append(target)
        if len(renamed) == at:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", rename)
        with pytest.raises(KilledError):
            new.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.metadata == new.metadata
    assert_same(loaded, new)
    new.save_pretrained(tmp_path)  # removes the temporary folder
    assert sorted(contents(tmp_path)) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert len(list(tmp_path.iterdir())) == 3


def test_only_files_of_an_earlier_call_are_replaced(tiny, small, tmp_path):
    """A checkpoint that transformers has saved stays, also if it is one that this library wrote before."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for _ in range(2):
        small.save_pretrained(ours)
    AutoModelForObjectDetection.from_pretrained(ours).save_pretrained(theirs)
    for folder in (theirs, tiny.folder):
        before = contents(folder)
        with pytest.raises(FileExistsError, match=r"already exists; set overwrite, or --overwrite, to replace it"):
            small.save_pretrained(folder)
        assert contents(folder) == before
    small.save_pretrained(theirs, overwrite=True)
    assert parsed(theirs) | parsed(ours) == parsed(theirs)
    path, *_ = save_as(small, tmp_path / "authors.pth", "original")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"authors\.pth: already exists"):
        save_as(small, path, "original")
    assert path.read_bytes() == before


def test_files_have_the_users_default_permissions(tiny, tmp_path):
    ConditionalDETR.from_pretrained(tiny.folder).save_pretrained(tmp_path)
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_dead_worker_of_a_loader_is_no_full_disk(tmp_path):
    """Torch raises its error from a signal handler, in whatever the process does at that moment: here, writing."""

    def write(path):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid 7\) is killed"):
        write_tensors({tmp_path / "model.safetensors": write})
    assert not list(tmp_path.iterdir())
