"""Checkpoints of DETR: the authors' files, which class they load as, and what is refused by name."""

import argparse
import logging

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from conditional_detr import DETR, ConditionalDETR, Config, Metadata, from_pretrained
from conditional_detr.checkpoints.labels import COCO_NAMES
from conditional_detr.checkpoints.saving import save_as
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from helpers.models import TINY_CONFIG, assert_same
from helpers.name_formats import to_original

R50 = Config(num_queries=100)


@pytest.fixture(scope="module")
def authors_tensors(r50_detr):
    return to_original(load_file(r50_detr.folder / "model.safetensors"))


@pytest.fixture
def tensors(tiny_detr):
    return to_original(load_file(tiny_detr.folder / "model.safetensors"))


def test_the_authors_names_are_those_of_pytorchs_own_transformer(authors_tensors):
    """Their encoder and decoder layers have the names of PyTorch's, and their backbone is torchvision's."""
    layers = {f"transformer.encoder.layers.{i}.": nn.TransformerEncoderLayer(256, 8, 2048) for i in range(6)}
    layers |= {f"transformer.decoder.layers.{i}.": nn.TransformerDecoderLayer(256, 8, 2048) for i in range(6)}
    layers |= {"transformer.decoder.norm.": nn.LayerNorm(256), "input_proj.": nn.Conv2d(2048, 256, 1)}
    layers |= {"class_embed.": nn.Linear(256, 92), "query_embed.": nn.Embedding(100, 256)}
    layers |= {f"bbox_embed.layers.{i}.": nn.Linear(256, size) for i, size in enumerate((256, 256, 4))}
    layers["backbone.0.body."] = torchvision.models.resnet50()
    expected = {prefix + name: tensor.shape for prefix, layer in layers.items() for name, tensor in _stored(layer)}
    assert {name: tensor.shape for name, tensor in authors_tensors.items()} == expected


def _stored(layer):
    state = layer.state_dict()
    return [item for item in state.items() if not item[0].startswith("fc.") and "num_batches" not in item[0]]


def test_the_released_file_has_no_arguments(authors_tensors, r50_detr, tmp_path, caplog):
    path = tmp_path / "detr-r50.pth"
    torch.save({"model": authors_tensors}, path)
    with caplog.at_level(logging.WARNING):
        model = from_pretrained(path)
    assert "assuming heads 8, backbone resnet50, dilation False, dropout 0.1; pass config= to change it" in caplog.text
    assert isinstance(model, DETR)
    assert model.config == R50 == DETR.default_config
    assert model.metadata.class_names == COCO_NAMES
    assert model.class_head.weight.shape == (92, 256)
    assert_same(model, DETR.from_pretrained(r50_detr.folder))
    assert from_pretrained(path, config=Config(num_queries=100, dilation=True)).config.dilation


def test_the_authors_file_with_its_arguments(authors_tensors, tmp_path):
    arguments = argparse.Namespace(nheads=8, backbone="resnet50", dilation=True, dropout=0.2, lr=1e-4, eos_coef=0.1)
    torch.save({"model": authors_tensors, "args": arguments, "epoch": 499}, tmp_path / "detr-r50-dc5.pth")
    model = from_pretrained(tmp_path / "detr-r50-dc5.pth")
    assert isinstance(model, DETR)
    assert model.config == Config(num_queries=100, dilation=True, dropout=0.2)


@pytest.mark.parametrize("rows", [91, 92])
def test_the_number_of_classes_follows_from_the_rows_of_the_file(tensors, tmp_path, rows):
    """The last row is "no object"."""
    tensors |= {"class_embed.weight": torch.randn(rows, 32), "class_embed.bias": torch.randn(rows)}
    torch.save(tensors, tmp_path / "rows.pth")
    sizes = {**vars(TINY_CONFIG), "num_classes": rows - 1}
    model = from_pretrained(tmp_path / "rows.pth", config=Config(**sizes))
    assert model.config.num_classes == len(model.metadata.class_names) == rows - 1
    assert torch.equal(model.class_head.weight, tensors["class_embed.weight"])


@pytest.mark.parametrize("name_format", ["published", "transformers5", "original"])
def test_every_name_format_reads_back(tiny_detr, tmp_path, name_format, caplog):
    model = DETR.from_pretrained(tiny_detr.folder)
    target = tmp_path / ("detr.pth" if name_format == "original" else "folder")
    if name_format == "original":  # which has only whole ResNets
        model = DETR(Config(**{**vars(TINY_CONFIG), "backbone_stage": 4}), Metadata.numbered(7))
    save_as(model, target, name_format)
    again = from_pretrained(target)
    assert type(again) is DETR
    assert_same(again, model)
    assert (again.config, again.load_report.name_format) == (model.config, name_format)


def test_a_models_own_state_dict_reads_back(tiny_detr, tmp_path):
    model = DETR.from_pretrained(tiny_detr.folder)
    torch.save({f"module.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "native.pt")
    again = from_pretrained(tmp_path / "native.pt", config=TINY_CONFIG)
    assert_same(again, model)
    assert str(again.load_report.name_format) == "native after 'module.'"


def test_what_is_saved_is_what_transformers_calls_detr(tiny_detr, tmp_path):
    from transformers import AutoModelForObjectDetection, DetrForObjectDetection, DetrImageProcessorPil

    DETR.from_pretrained(tiny_detr.folder).save_pretrained(tmp_path)
    reopened = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(reopened) is DetrForObjectDetection
    assert_same(reopened, tiny_detr.transformers)
    assert dict(DetrImageProcessorPil.from_pretrained(tmp_path).size)["shortest_edge"] == 800
    content = (tmp_path / "preprocessor_config.json").read_text()
    assert '"DetrImageProcessor"' in content


def test_a_class_refuses_the_checkpoints_of_the_other(tiny, tiny_detr):
    assert type(from_pretrained(tiny.folder)) is type(DetectionTransformer.from_pretrained(tiny.folder))
    assert type(from_pretrained(tiny_detr.folder)) is type(DetectionTransformer.from_pretrained(tiny_detr.folder))
    message = (
        r"model\.safetensors: expected a checkpoint of ConditionalDETR, got one of DETR; use DETR\.from_pretrained, or"
        r" conditional_detr\.from_pretrained for both$"
    )
    with pytest.raises(ValueError, match=message):
        ConditionalDETR.from_pretrained(tiny_detr.folder)
    with pytest.raises(
        ValueError, match="expected a checkpoint of DETR, got one of ConditionalDETR; use ConditionalD"
    ):
        DETR.from_pretrained(tiny.folder, class_names=["cat"])
    with pytest.raises(ValueError, match=r"^architecture: expected one of conditional_detr, detr, got 'yolo'"):
        from_pretrained(tiny.folder, architecture="yolo")


@pytest.mark.parametrize("mask", ["bbox_attention.q_linear.weight", "mask_head.lay1.weight"])
def test_segmentation_checkpoints_are_refused_by_name(tensors, tmp_path, mask):
    """The authors put the detector behind "detr." in their panoptic files, and transformers does so, too."""
    panoptic = {f"detr.{name}": tensor for name, tensor in tensors.items()} | {mask: torch.zeros(2, 2)}
    torch.save({"model": panoptic}, tmp_path / "detr-r50-panoptic.pth")
    message = (
        r"panoptic\.pth: expected a checkpoint that detects objects, got one for panoptic or instance segmentation,"
        rf" whose mask head this library does not have: {mask}$"
    )
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "detr-r50-panoptic.pth")


def test_table_transformer_is_refused_by_its_model_type(tiny_detr, tmp_path):
    """Its parameters have DETR's names, but it normalises before each attention."""
    from transformers import TableTransformerConfig, TableTransformerForObjectDetection

    options = {"backbone_config": tiny_detr.transformers.config.backbone_config, "d_model": 32}
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    TableTransformerForObjectDetection(TableTransformerConfig(**options, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: expected model_type 'detr', got 'table-transformer'"):
        from_pretrained(tmp_path)


def test_replaced_heads_keep_the_row_of_no_object(tiny_detr):
    old = DETR.from_pretrained(tiny_detr.folder)
    model = DETR.from_pretrained(tiny_detr.folder, class_names=["LABEL_3", "new", "LABEL_0"], num_queries=15)
    head = model.class_head
    assert head.weight.shape == (4, 32)
    for row, old_row in ((0, 3), (2, 0), (3, 7)):
        assert torch.equal(head.weight[row], old.class_head.weight[old_row])
        assert head.bias[row] == old.class_head.bias[old_row]
    assert 0 < head.weight[1].abs().max() <= 32**-0.5, "the new row has PyTorch's initialisation"
    assert head.bias[1].abs() <= 32**-0.5
    assert (model.config.num_classes, model.config.num_queries) == (3, 15)
    assert torch.equal(model.object_queries.weight[:11], old.object_queries.weight)
    assert model.load_report.heads.new_classes == ("new",)
    fewer = DETR.from_pretrained(tiny_detr.folder, num_classes=2)
    assert torch.equal(fewer.class_head.weight[2], old.class_head.weight[7])
    assert fewer.load_report.heads.kept_classes == ()
