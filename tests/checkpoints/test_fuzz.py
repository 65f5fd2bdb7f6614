"""Checkpoints of any content are loaded, or refused by one of the documented errors."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conditional_detr.checkpoints.files import open_checkpoint
from conditional_detr.checkpoints.hf_config import read_config, read_metadata
from conditional_detr.checkpoints.loading import from_pretrained
from conditional_detr.checkpoints.preprocessor_config import read_preprocessor, write_preprocessor
from helpers.fuzzing import LIMITS

DOCUMENTED = (ValueError, TypeError, OSError)
FEW = settings(LIMITS, max_examples=60)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e308, 5e-324, -0.0])
TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(
    ["", "0", "1", "resnet18", "hf-hub:a/b", "\0", "x" * 300]
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint as this library saves it, and its weights as a torch file."""
    folder = tmp_path_factory.mktemp("original")
    from_pretrained(tiny.folder).save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "weights.pth")
    return folder


def loads_or_says_why(where, load, *arguments):
    """Call a function that may raise a documented error, which must say which file is wrong."""
    try:
        load(*arguments)
    except DOCUMENTED as error:
        assert where in str(error)  # noqa: PT017


def fields_of(content):
    return st.dictionaries(st.sampled_from(sorted(content)), ANYTHING, min_size=1, max_size=3)


@LIMITS
@given(data=st.data())
def test_any_config(original, data):
    config = json.loads((original / "config.json").read_text())
    backbone = config["backbone_config"]
    changes = data.draw(fields_of({**config, "num_labels": 1, "backbone_kwargs": 1, "backbone": 1}))
    inner = data.draw(fields_of({**backbone, "depths": 1, "layer_type": 1, "hidden_sizes": 1}) | st.just({}))
    config |= {"backbone_config": backbone | inner} | changes
    for read in (read_config, lambda json, path: read_metadata(json, None, path, path)):
        loads_or_says_why("config.json: ", read, config, "config.json")


@LIMITS
@given(data=st.data())
def test_any_preprocessor(data):
    from conditional_detr import Preprocessing

    names = ("height", "width", "max_height", "max_width", "shortest_edge", "longest_edge")
    sizes = st.dictionaries(st.sampled_from(names), st.integers(1, 99) | LEAVES, max_size=3)
    content = write_preprocessor(Preprocessing()) | data.draw(
        fields_of({**write_preprocessor(Preprocessing()), "max_size": 1, "pad_size": 1})
    )
    if data.draw(st.booleans()):
        content["size"] = data.draw(sizes)
    try:
        read = read_preprocessor(content, "file")
    except ValueError as error:
        assert str(error).startswith("file: ")  # noqa: PT017
    else:
        assert read_preprocessor(write_preprocessor(read), "file") == read


def changed(content: bytes, data, header: int) -> bytes:
    """Return bytes of which some are changed, most of them in the header, or which end early."""
    changed = bytearray(content)
    places = st.integers(0, header - 1) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, max_size=6)):
        changed[place] = data.draw(st.integers(0, 255))
    return bytes(changed[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])


@FEW
@given(data=st.data())
@pytest.mark.parametrize("file", ["model.safetensors", "weights.pth"])
def test_any_bytes(original, tmp_path_factory, file, data):
    folder = tmp_path_factory.mktemp("changed")
    content = (original / file).read_bytes()
    tail = data.draw(st.booleans()) and file.endswith(".pth")  # a zip archive lists its files at its end
    whole = content[::-1] if tail else content
    whole = changed(whole, data, 4000)
    (folder / file).write_bytes(whole[::-1] if tail else whole)
    shutil.copy(original / "config.json", folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loads_or_says_why(str(folder), from_pretrained, folder / file)
    shutil.rmtree(folder)


TENSORS = st.sampled_from(
    [torch.zeros(2), torch.zeros(()), torch.zeros(0, 9), torch.zeros(2, dtype=torch.int8), torch.zeros(2).half()]
)
NAMES = TEXT | st.sampled_from(["model", "state_dict", "args", "module.decoder.layers.0.ca_qpos_sine_proj.weight"])
ANY_TENSORS = st.recursive(
    TENSORS | LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.integers(), inner, max_size=4),
)


@FEW
@given(content=ANY_TENSORS, replaced=st.dictionaries(st.integers(0, 200), TENSORS, max_size=3), bare=st.booleans())
def test_any_torch_file(original, tmp_path_factory, content, replaced, bare):
    folder = tmp_path_factory.mktemp("any")
    if replaced:
        tensors = dict(load_file(original / "model.safetensors"))
        names = sorted(tensors)
        content = tensors | {names[i % len(names)]: tensor for i, tensor in replaced.items()}
    if not bare:
        shutil.copy(original / "config.json", folder)
    torch.save(content, folder / "x.pth")
    for load in (open_checkpoint, from_pretrained):
        loads_or_says_why(str(folder), load, folder / "x.pth")
    shutil.rmtree(folder)
