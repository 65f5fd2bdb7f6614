"""Checkpoints as other programs write, wrap, split and change them, and files whose sizes are not true."""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conditional_detr import ConditionalDETR, Config, Metadata
from conditional_detr.checkpoints.files import open_checkpoint
from conditional_detr.checkpoints.hf_config import read_metadata
from conditional_detr.checkpoints.labels import COCO_NAMES
from conditional_detr.checkpoints.loading import from_pretrained
from conditional_detr.checkpoints.tensor_checks import allocate, copy_values
from helpers.models import assert_same
from helpers.name_formats import to_original


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.folder, tmp_path / "checkpoint"))


def stale(ids, names, **more) -> Metadata:
    config = {"id2label": {str(i): name for i, name in enumerate(names)}, "category_ids": ids, **more}
    return read_metadata(config, None, "config.json", "preprocessor_config.json")


# ---- category ids and unused rows


@pytest.mark.parametrize("names", [("dent", "scratch", "rust"), ("dent", "scratch"), ("b", "a", "c")])
def test_ids_of_other_classes_are_not_used(tiny, tmp_path, names, caplog):
    """transformers keeps the fields that it does not know when it trains other classes."""
    from transformers import ConditionalDetrForObjectDetection

    model = from_pretrained(tiny.folder, class_names=["a", "b", "c"])
    model.metadata = Metadata(("a", "b", "c"), (7, 8, 9))
    model.save_pretrained(tmp_path / "ours")
    assert from_pretrained(tmp_path / "ours").metadata.category_ids == (7, 8, 9)
    theirs = ConditionalDetrForObjectDetection.from_pretrained(
        tmp_path / "ours", id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    theirs.save_pretrained(tmp_path / "theirs")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="conditional_detr"):
        metadata = from_pretrained(tmp_path / "theirs").metadata
    assert (metadata.class_names, metadata.category_ids) == (names, tuple(range(len(names))))
    path = tmp_path / "theirs" / "config.json"
    assert caplog.messages == [f"{path}: category_ids were written for other classes; using 0, 1, 2, ..."]


def test_ids_stay_when_transformers_saves_the_same_classes(tiny, tmp_path, caplog):
    from transformers import ConditionalDetrForObjectDetection

    model = from_pretrained(tiny.folder, class_names=["N/A", None, "c"])
    model.metadata = Metadata(("N/A", None, "c"), (7, 8, 2**70))
    model.save_pretrained(tmp_path / "ours")
    ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    caplog.clear()
    assert from_pretrained(tmp_path / "theirs").metadata == model.metadata
    assert caplog.text == ""


def test_ids_without_the_names_that_they_were_written_for(caplog):
    """As version 0.1.0 wrote them."""
    assert stale([4, 5], ["cat", "N/A"]) == Metadata(("cat", None), (4, 5))
    assert caplog.text == ""
    assert stale([4, 5], ["cat", "dog"], transformers_version="5.0.0").category_ids == (4, 5)
    assert caplog.messages == ["config.json: saved by transformers; category_ids may belong to other classes"]
    assert stale([4, 5], ["cat", "dog", "N/A"]) == Metadata(("cat", "dog", "N/A"))
    assert caplog.messages[1:] == ["config.json: category_ids were written for other classes; using 0, 1, 2, ..."]


def test_a_class_called_na(tiny, tmp_path):
    model = from_pretrained(tiny.folder, class_names=["OK", "N/A", "scratch", None])
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).metadata == Metadata(("OK", "N/A", "scratch", None))


def test_only_cocos_own_ids_are_unused():
    published = ["N/A" if name is None else name for name in COCO_NAMES]
    assert stale(None, published).class_names == COCO_NAMES
    assert stale(None, ["N/A", *published[1:12], "N/A"]).class_names[::12] == ("N/A", "N/A")
    more = [*published[:1], "N/A", *published[2:]]
    assert stale(None, more).class_names == tuple(more)


# ---- wrapped, nested and split weights


PREFIXES = ("module.", "_orig_mod.", "model.", "module._orig_mod.", "net.detector.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name_format", ["native", "published", "original"])
def test_a_prefix_of_all_names(tiny, folder, prefix, name_format):
    expected = from_pretrained(tiny.folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {"native": expected.state_dict(), "published": tensors, "original": to_original(tensors)}[name_format]
    for nested in (None, "model", "state_dict"):
        content = {prefix + name: tensor for name, tensor in tensors.items()}
        torch.save(content if nested is None else {"epoch": 3, nested: content}, folder / "x.pth")
        model = from_pretrained(folder / "x.pth")
        assert_same(model, expected)
        assert model.load_report.name_format == f"{name_format} after {prefix!r}"


def test_native_names_without_a_config(tiny, tmp_path):
    model = from_pretrained(tiny.folder)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    loaded = from_pretrained(tmp_path / "x.pth", config=model.config)
    assert_same(loaded, model)
    assert loaded.load_report.name_format == "native"


def test_a_prefix_of_some_names_is_an_error(folder):
    tensors = {f"module.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    torch.save({**tensors, "criterion.weight": torch.ones(2)}, folder / "x.pth")
    with pytest.raises(
        ValueError, match=r"expected the prefix 'module\.' in all .* or in none; got criterion\.weight$"
    ):
        from_pretrained(folder / "x.pth")


def split(folder: Path, kind: str) -> dict[str, str]:
    """Split a checkpoint into shards of ``kind`` with an index; return the index's weight_map."""
    tensors = load_file(folder / "model.safetensors")
    name = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(3):
        file = f"{name}-{i + 1:05d}-of-00003.{kind}"
        part = dict(sorted(tensors.items())[i::3])
        weight_map |= dict.fromkeys(part, file)
        (save_file if kind == "safetensors" else torch.save)(part, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / f"{name}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_with_an_index(tiny, folder, kind):
    split(folder, kind)
    model = from_pretrained(folder)
    assert_same(model, from_pretrained(tiny.folder))
    index = next(folder.glob("*.index.json"))
    assert model.load_report.source == str(index)
    assert model.load_report.size == sum(file.stat().st_size for file in folder.glob(f"*.{kind}"))
    assert_same(from_pretrained(index), model)


def test_shards_as_transformers_writes_them(tiny, tmp_path):
    tiny.transformers.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(from_pretrained(tmp_path), from_pretrained(tiny.folder))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda files, f: files | {"extra": min(files.values())}, ValueError, "got extra in the index only"),
        (lambda files, f: dict([*files.items()][1:]), ValueError, "expected the same tensors as in .* only"),
        (
            lambda files, f: files | {"extra": "../secret.safetensors"},
            ValueError,
            r"names of \.safetensors files in the",
        ),
        (lambda files, f: files | {"extra": 3}, ValueError, "in the same folder, got 3"),
        (lambda files, f: files | {"extra": "x.bin"}, ValueError, r"got 'x\.bin'"),
        (lambda files, f: [], ValueError, "expected a weight_map of tensor names to files, got list"),
        (lambda files, f: f.unlink() or files, FileNotFoundError, "which does not exist"),
    ],
)
def test_an_index_that_does_not_agree_with_its_shards(folder, change, error, message):
    files = split(folder, "safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(files, folder / min(files.values()))}))
    with pytest.raises(error, match=message) as caught:
        from_pretrained(folder)
    assert str(caught.value).startswith(str(index))


# ---- sizes that are not true


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (
            torch.zeros(1, 1).expand(2 * 10**7, 256),
            r"expected tensors of at most the file's \d+ bytes, got more up to",
        ),
        (torch.empty(9, device="meta"), "expected a plain tensor, got torch.strided on meta"),
        (torch.eye(3).to_sparse(), "expected a plain tensor, got torch.sparse_coo on cpu"),
    ],
)
def test_tensors_that_are_not_in_the_file(folder, tensor, message):
    tensors = to_original(load_file(folder / "model.safetensors")) | {"class_embed.weight": tensor}
    torch.save({"model": tensors, "args": argparse.Namespace(nheads=4)}, folder / "x.pth")
    with pytest.raises(ValueError, match=rf"x\.pth: (class_embed\.weight: )?{message}"):
        open_checkpoint(folder / "x.pth")


def test_keys_and_arguments_of_the_wrong_type(tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: .* got keys that are not strings: \[1\]"):
        from_pretrained(tmp_path / "x.pth")
    torch.save({"model": {"a": torch.zeros(2)}, "args": [1]}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: expected args as a Namespace or dict, got list"):
        from_pretrained(tmp_path / "x.pth")


def test_a_compressed_torch_file_is_an_error(tmp_path):
    """Its memory mapping would give the compressed bytes as numbers."""
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as old,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for file in old.infolist():
            new.writestr(file.filename, old.read(file))
    with pytest.raises(ValueError, match=r"y\.pth: .*its content is compressed"):
        from_pretrained(tmp_path / "y.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 10**5, "expected valid json"),
        (" " * (2**24 + 1), "expected at most 16777216 bytes of json, got 16777217"),
    ],
)
def test_json_that_is_too_deep_or_too_large(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        from_pretrained(folder)


def test_a_byte_order_mark_in_json(folder):
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert from_pretrained(folder).config.num_queries == 11


def test_many_names_take_linear_time(tiny):
    from conditional_detr.checkpoints.head_replacement import replace_heads

    model = from_pretrained(tiny.folder)
    names = [f"c{i}" for i in range(20_000)]
    start = time.process_time()
    replace_heads(model, class_names=names)
    changes = replace_heads(model, class_names=names[::-1])
    assert time.process_time() - start < 5  # 40 s if each name were looked for in the list
    assert (len(changes.kept_classes), changes.dropped_classes) == (20_000, ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "strides"), [((40_000,), None), ((), None), ((7, 70, 90), (1, 7, 490))])
def test_copies_equal_those_of_torch(dtype, size, strides):
    source = torch.randn(size).to(dtype)
    source = source if strides is None else torch.empty_strided(size, strides, dtype=dtype).copy_(source)
    copy = torch.full(size, torch.nan)
    assert copy_values(source, copy)
    assert torch.equal(copy, source.float())
    for value in (torch.nan, torch.inf, -torch.inf):
        source[(-1,) * len(size)] = value
        assert not copy_values(source, copy)
        torch.testing.assert_close(copy, source.float(), rtol=0, atol=0, equal_nan=True)
    assert copy_values(torch.full(size, 1e300, dtype=torch.float64), copy) is False, "beyond float32"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_tensors_in_one_block_behave_like_others(tmp_path, platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    shapes = [torch.Size(shape) for shape in [(3, 5), (), (1000, 17), (1,)]]
    tensors = allocate(shapes)
    for number, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tensor.shape, tensor.dtype, tensor.data_ptr() % 64) == (shape, torch.float32, 0)
        assert tensor.untyped_storage().nbytes() == 4 * shape.numel()
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]
    torch.save(tensors[1], tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4000, "only its own values are saved"
    assert tensors[2].share_memory_().is_shared()
    assert tensors[2].eq(2).all()
    assert not tensors[0].is_shared()


# ---- names that do not exist


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", "weights './nothing': no such file or folder; expected a file"),
        ("~/nothing here", "weights '~/nothing here': no such file or folder; expected a file"),
        ("run/best", "weights 'run/best': no such file or folder; as a hub id: neither"),
        ("a/b/c", "weights 'a/b/c': no such file or folder; expected a file"),
        ("bcdd", r"weights 'bcdd': no such file or folder \(did you mean bccd\?\); expected a file"),
        (
            "checkpoint/bset",
            r"weights 'checkpoint/bset': no such file or folder \(did you mean checkpoint/best\?\); as a",
        ),
        ("checkpoint", r"checkpoint: expected model\.safetensors or .*; did you mean checkpoint/best\?$"),
    ],
)
def test_names_that_do_not_exist(tiny, tmp_path, monkeypatch, name, message):
    shutil.copytree(tiny.folder, tmp_path / "checkpoint/best")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=message):
        from_pretrained(name, cache_dir=tmp_path / "cache", local_files_only=True)


def test_the_home_folder(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny.folder, tmp_path / "weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_pretrained("~/weights").config == Config(**from_pretrained(tiny.folder).config.__dict__)


# ---- forks


@pytest.mark.skipif(sys.platform != "linux", reason="other systems start processes without fork")
def test_a_process_that_has_loaded_can_be_forked(tmp_path):
    """Every kind of checkpoint; the tensors are large enough for torch's thread pool."""
    config = Config(num_classes=3, num_queries=300, backbone="resnet18", encoder_layers=1, decoder_layers=1)
    model = ConditionalDETR(config)
    model.save_pretrained(tmp_path / "large")
    torch.save(model.state_dict(), tmp_path / "large" / "native.pth")
    torch.save(model.backbone.body.state_dict(), tmp_path / "backbone.pth")
    code = f"""
import multiprocessing, sys
import torch
import numpy as np
from conditional_detr import Detector
from conditional_detr.checkpoints.backbone_weights import load_backbone_weights
torch.set_num_threads(2)
def work(detectors):
    for detector in detectors:
        assert len(detector(np.zeros((96, 128, 3), np.uint8), threshold=0)) > 0
names = ["model.safetensors", "native.pth"]
detectors = [Detector.from_pretrained(f"{tmp_path / "large"!s}/{{name}}", num_queries=500) for name in names]
load_backbone_weights(detectors[0].model, "{tmp_path / "backbone.pth"!s}")
child = multiprocessing.get_context("fork").Process(target=work, args=(detectors,))
child.start()
child.join(60)
hangs = child.is_alive()
child.kill()
sys.exit("the child hangs" if hangs else child.exitcode)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_messages_name_the_file_once_and_what_it_is(tmp_path, least):
    """A pipe, a precision that torch cannot read everywhere, and a count that no memory holds."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match=r"pipe\.safetensors: expected a file or a folder, got a pipe or device$"):
        ConditionalDETR.from_pretrained(tmp_path / "pipe.safetensors")
    weights = ConditionalDETR.from_pretrained(least).state_dict()
    weights["class_head.weight"] = weights["class_head.weight"].to(torch.float8_e4m3fn)
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"a\.pth: class_head\.weight: expected floating .*, got dtype .*float8_e4m3fn"
    ):
        ConditionalDETR.from_pretrained(tmp_path / "a.pth")
    config = json.loads((least / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("id2label", "label2id")}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_labels": 10**9}))
    shutil.copy(least / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"^[^ ]*config\.json: num_classes: expected at most 1000000, got 10+$"):
        ConditionalDETR.from_pretrained(tmp_path)
