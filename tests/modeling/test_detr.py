"""DETR as an nn.Module: its initialisation, size, gradients and attention maps; parity is tested with the others."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conditional_detr import DETR, ConditionalDETR, Config
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.deploy.summary import count_flops
from conditional_detr.modeling.attention import attention_weights
from conditional_detr.modeling.encoder import SelfAttention
from helpers.models import TINY_CONFIG, pixels_of, two_images
from helpers.reference import IDLE


@pytest.fixture(scope="module")
def model(tiny_detr) -> DETR:
    return DETR.from_pretrained(tiny_detr.folder)


def test_what_is_the_same_in_both_networks_is_the_same_class(model):
    conditional = ConditionalDETR(TINY_CONFIG)
    for name in ("backbone", "projection", "encoder", "object_queries", "class_head", "box_head"):
        assert type(getattr(model, name)) is type(getattr(conditional, name))
    assert type(model.decoder.layers[0]) is type(conditional.decoder.layers[0])
    assert type(model.decoder.layers[0].self_attention) is SelfAttention
    assert DETR.forward is ConditionalDETR.forward


def test_parameters_and_flops_of_the_papers_table():
    """The table has 41 M parameters and 86 G; these are multiply-adds, and a mean over COCO's image sizes."""
    with MetaInit():
        model = DETR()
    assert sum(p.numel() for p in model.parameters()) == 41_524_768
    assert model.class_head.weight.shape == (92, 256)
    assert count_flops(DETR.default_config, 800, 1333, DETR) / 2e9 == pytest.approx(101.67, abs=0.01)


@torch.no_grad()
def test_flops_equal_those_of_transformers(tiny_detr):
    reference = copy.deepcopy(tiny_detr.transformers)
    reference.set_attn_implementation("eager")  # the counter does not see all of torch's fused attention
    with FlopCounterMode(display=False) as counter:
        reference(pixels_of(1, 96, 128))
    assert count_flops(TINY_CONFIG, 96, 128, DETR) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_new_model_has_the_authors_initialisation():
    """PyTorch's for both heads; Xavier's bound for (3D, D) matrices in both attentions of the decoder."""
    torch.manual_seed(0)
    model = DETR(Config(num_classes=3, num_queries=20, backbone="resnet18"))
    assert model.class_head.weight.shape == (4, 256)
    for head in (model.class_head, model.box_head.layers[-1]):
        assert 0.9 / 16 < head.weight.abs().max() <= 1 / 16
        assert 0 < head.bias.abs().max() <= 1 / 16
    for attention in (model.decoder.layers[0].self_attention, model.decoder.layers[0].cross_attention):
        for weight, rows in ((attention.query.weight, 1024), (attention.output.weight, 512)):
            assert 0.999 < weight.abs().max() / (6 / rows) ** 0.5 <= 1
        assert not any(getattr(attention, name).bias.any() for name in ("query", "key", "value", "output"))


def test_every_trainable_parameter_gets_a_gradient(model):
    output = model(*two_images(96, 128))
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) for x in output]
    model.zero_grad()
    sum((x * w).sum() for x, w in zip(output, weights, strict=True)).backward()
    trained = {n: p.grad.abs().max() for n, p in model.named_parameters() if p.requires_grad and not IDLE.search(n)}
    assert {name for name, gradient in trained.items() if not gradient > 1e-4} == set()
    model.zero_grad()


@torch.no_grad()
def test_attention_maps_against_transformers_and_by_their_formulas(tiny_detr, model):
    """The combined map is transformers' cross-attention; content is left without positions, and spatial without c."""
    pixels, padding = two_images(96, 128)
    reference = copy.deepcopy(tiny_detr.transformers)
    reference.set_attn_implementation("eager")  # others return no maps
    outputs = reference.model(pixels, pixel_mask=(~padding).long(), output_attentions=True)
    for layer in range(3):
        maps = model.attention_maps(pixels, padding, layers=[layer])
        expected = outputs.cross_attentions[layer].unflatten(-1, maps.combined.shape[-2:])
        torch.testing.assert_close(maps.combined, expected, rtol=0, atol=1e-5)
        for part in maps:
            torch.testing.assert_close(part.sum((-2, -1)), torch.ones(2, 4, 11), rtol=0, atol=1e-5)
            assert part[1, ..., -1].abs().max() == 0, "padded cells"
    features, cells = model.backbone(pixels, padding)
    memory, p_k = model.encode(features, cells)
    cross, o_q = model.decoder.layers[2].cross_attention, model.object_queries.weight.expand(2, -1, -1)
    q, k = (x.unflatten(-1, (4, 8)).transpose(1, 2) for x in (cross.query(o_q), cross.key(p_k)))
    spatial = attention_weights(q @ k.transpose(-2, -1) / 8**0.5, cells.flatten(1))
    torch.testing.assert_close(maps.spatial.flatten(-2), spatial, rtol=0, atol=1e-6)
    f = model.decoder.run(o_q, memory, p_k, cells.flatten(1))[2]
    c = model.decoder.layers[2].self_attend(f, o_q)
    _, _, content = cross.attention_maps(c, o_q * 0, memory, p_k * 0, cells.flatten(1))
    torch.testing.assert_close(maps.content.flatten(-2), content, rtol=0, atol=1e-6)
    assert (maps.content - maps.combined).abs().max() > 0.01


def test_shapes_match_the_docstring(model):
    pixels, padding = two_images(96, 128)
    features, cells = model.backbone(pixels, padding)
    memory, positions = model.encode(features, cells)
    (f,) = model.decode(memory, positions, cells)
    assert f.shape == (3, 2, 11, 32)
    logits, boxes = model.predict(f)
    assert logits.shape == (3, 2, 11, 8)
    assert boxes.shape == (3, 2, 11, 4)
    assert model.scores(logits).shape == (3, 2, 11, 7)
