"""The network against transformers with the same weights, and its behaviour as an nn.Module."""

import copy
import pickle

import pytest
import torch

from conditional_detr import DETR, ConditionalDETR, Config, from_pretrained
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.modeling.positions import sine_of_map, sine_of_points
from helpers.models import TINY, transformers_model, two_images
from helpers.reference import IDLE, distance, rounding, transformers_output


@pytest.fixture(scope="module")
def model(tiny) -> ConditionalDETR:
    return ConditionalDETR.from_pretrained(tiny.folder)


def output_of(model, pixels, padding=None):
    with torch.no_grad():
        return model(pixels, padding)


def assert_equals_transformers(model, reference):
    """Assert that logits and boxes of every layer differ by at most three times transformers' own float32 rounding."""
    pixels, padding = two_images()
    expected = transformers_output(reference, pixels, padding)
    assert expected.logits[-1].std(dim=1).mean() > 0.02, "the queries are too similar to test anything"
    logits, boxes = distance(output_of(model, pixels, padding), expected)
    limits = rounding(reference, pixels, padding)
    most = {ConditionalDETR: (3e-5, 6e-6), DETR: (1e-4, 1e-5)}[type(model)]  # DETR's logits are larger
    assert logits <= 3 * limits[0] < most[0]
    assert boxes <= 3 * limits[1] < most[1]


@pytest.mark.parametrize("checkpoint", ["tiny", "r50", "dc5", "tiny_detr", "r50_detr"])
def test_equals_transformers_at_every_layer(checkpoint, request):
    published = request.getfixturevalue(checkpoint)
    assert_equals_transformers(from_pretrained(published.folder), published.transformers)


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "resnet101"},
        {"architecture": "detr", "backbone": "resnet101"},
        {"architecture": "detr", "dc5": True},
    ],
    ids=str,
)
def test_other_backbones_equal_transformers(tmp_path, options):
    reference = transformers_model(**options)
    reference.save_pretrained(tmp_path)
    assert_equals_transformers(from_pretrained(tmp_path), reference)


def test_dilation_halves_the_stride(dc5, r50):
    pixels = torch.randn(1, 3, 64, 96)
    plain, dilated = (ConditionalDETR.from_pretrained(p.folder).backbone for p in (r50, dc5))
    assert (plain.stride, dilated.stride) == (32, 16)
    with torch.no_grad():
        assert plain(pixels)[0].shape == (1, 2048, 2, 3)
        assert dilated(pixels)[0].shape == (1, 2048, 4, 6)
    for name, parameter in plain.state_dict().items():
        assert parameter.shape == dilated.state_dict()[name].shape


def test_reference_points_beyond_the_bound_equal_transformers(tiny):
    """The authors clamp the inverse sigmoid at 1e-5, which matters for a reference point at the edge."""
    reference = copy.deepcopy(tiny.transformers)
    model = ConditionalDETR.from_pretrained(tiny.folder)
    with torch.no_grad():
        reference.model.decoder.ref_point_head.layers[1].bias.copy_(torch.tensor([20.0, -20.0]))
        model.decoder.reference_point.layers[1].bias.copy_(torch.tensor([20.0, -20.0]))
    assert model.decoder.points(model.object_queries.weight)[0][:, 0].max() == 1
    pixels, padding = two_images()
    expected = transformers_output(reference, pixels, padding)
    assert distance(output_of(model, pixels, padding), expected)[1] < 1e-6


def test_output_shapes_match_the_docstring(model):
    pixels, padding = two_images()
    features, cells = model.backbone(pixels, padding)
    memory, positions = model.encode(features, cells)
    f, s = model.decode(memory, positions, cells)
    B, N, D, L, C = 2, 11, 32, 3, 7
    h, w = 10, 14
    assert features.shape == (B, 256, h, w)
    assert cells.shape == (B, h, w)
    assert cells.dtype == torch.bool
    assert memory.shape == positions.shape == (B, h * w, D)
    assert f.shape == (L, B, N, D)
    assert s.shape == (B, N, 2)
    output = model(pixels, padding)
    assert output._fields == ("logits", "boxes")
    assert output.logits.shape == (L, B, N, C)
    assert output.boxes.shape == (L, B, N, 4)
    torch.testing.assert_close(output.logits, model.class_head(f), rtol=0, atol=0)


def test_values_of_padded_pixels_do_not_change_the_output(model):
    pixels, padding = two_images()
    noisy = torch.where(padding[:, None], torch.tensor(float("nan")), pixels)
    a, b = output_of(model, pixels, padding), output_of(model, noisy, padding)
    assert distance(a, b) == (0, 0)


def test_padding_of_no_pixel_equals_no_padding(model):
    pixels, padding = two_images()
    a, b = output_of(model, pixels), output_of(model, pixels, torch.zeros_like(padding))
    assert max(distance(a, b)) < 5e-6


def test_forward_is_the_same_in_train_and_eval_mode(tmp_path):
    transformers_model(**TINY, dropout=0.0).save_pretrained(tmp_path)
    model = ConditionalDETR.from_pretrained(tmp_path)
    pixels, padding = two_images()
    expected = output_of(model, pixels, padding)
    assert distance(output_of(model.train(), pixels, padding), expected) == (0, 0)


def test_dropout_acts_only_in_training(model):
    pixels, _ = two_images()
    torch.manual_seed(0)
    evaluated, again = output_of(model, pixels), output_of(model, pixels)
    trained = output_of(model.train(), pixels)
    model.eval()
    assert distance(evaluated, again) == (0, 0)
    assert distance(evaluated, trained)[0] > 0.01


def test_sine_encoding_of_one_point_by_hand():
    """D = 8: y first, two frequencies 1 and 1/100, sine then cosine."""
    encoded = sine_of_points(torch.tensor([[0.25, 0.5]]), 8)[0].double()
    x, y = 0.25 * 2 * torch.pi, 0.5 * 2 * torch.pi
    angles = [y, y, y / 100, y / 100, x, x, x / 100, x / 100]
    expected = [
        f(torch.tensor(a, dtype=torch.float64)) for a, f in zip(angles, [torch.sin, torch.cos] * 4, strict=True)
    ]
    torch.testing.assert_close(encoded, torch.stack(expected), rtol=0, atol=1e-6)


def test_sine_encoding_of_a_map_ends_at_the_last_visible_cell():
    padding = torch.zeros(1, 3, 5, dtype=torch.bool)
    padding[..., 4] = True
    encoded = sine_of_map(padding, 8)[0].unflatten(0, (3, 5))
    cell = encoded[1, 2]  # second of three rows, third of four visible columns
    expected = sine_of_points(torch.tensor([3 / 4, 2 / 3]), 8)
    torch.testing.assert_close(cell, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_attention_maps_equal_those_of_the_forward(tiny, first):
    """The combined map against the weights that transformers' eager attention reports."""
    layer = 0 if first else 2
    reference = copy.deepcopy(tiny.transformers)
    reference.set_attn_implementation("eager")
    pixels, padding = two_images()
    with torch.no_grad():
        outputs = reference.model(pixels, pixel_mask=(~padding).long(), output_attentions=True)
        maps = ConditionalDETR.from_pretrained(tiny.folder).attention_maps(pixels, padding, layers=(layer,))
    expected = outputs.cross_attentions[layer]
    assert maps.combined.shape == (2, 4, 11, 10, 14)
    torch.testing.assert_close(maps.combined.flatten(3), expected, rtol=0, atol=1e-6)


def test_product_of_attention_maps_is_the_combined_one(model):
    """exp(a + b) = exp(a) exp(b): the combined map is the normalised product of its parts."""
    pixels, padding = two_images()
    with torch.no_grad():
        maps = model.attention_maps(pixels, padding)
        both = model.attention_maps(pixels, padding, layers=(0, -1))
    product = maps.content * maps.spatial
    torch.testing.assert_close(product / product.sum((-2, -1), keepdim=True), maps.combined, rtol=0, atol=1e-5)
    for part in maps:
        torch.testing.assert_close(part.sum((-2, -1)), torch.ones(2, 4, 11), rtol=0, atol=1e-5)
        assert (part[1, ..., 8:, :] == 0).all(), "padded cells must have no weight"
    torch.testing.assert_close(both.spatial.unflatten(1, (2, -1))[:, 1], maps.spatial, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [(), (3,), (-4,)])
def test_attention_maps_of_a_layer_that_does_not_exist(model, layers):
    with pytest.raises(ValueError, match=r"layers: expected one or more of -3\.\.2, got"):
        model.attention_maps(torch.randn(1, 3, 32, 32), layers=layers)


def test_every_trainable_parameter_gets_a_gradient(tiny):
    model = ConditionalDETR.from_pretrained(tiny.folder)  # in eval mode, without dropout
    output = model(*two_images())
    (output.logits.square().sum() + output.boxes.square().sum()).backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, p in trainable.items() if p.grad.abs().max() > 1e-5}
    assert moved == {name for name in trainable if not IDLE.search(name)}


def test_gradients_against_finite_differences(tiny):
    """The whole network in float64, one direction in parameter space."""
    model = ConditionalDETR.from_pretrained(tiny.folder).double()
    pixels, padding = two_images(64, 96)
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in parameters]

    def loss():
        output = model(pixels.double(), padding)
        return output.logits.sin().sum() + output.boxes.square().sum()

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    values = []
    for step in (1e-7, -2e-7):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
            values.append(loss().item())
    assert (values[0] - values[1]) / 2e-7 == pytest.approx(slope, rel=1e-5)


def test_stem_first_stage_and_batch_norm_are_frozen():
    """Of ResNet-50's 53 convolutions the stem and the ten of the first stage are frozen, as in the authors' code."""
    backbone = ConditionalDETR(Config(encoder_layers=0, decoder_layers=1)).backbone
    trains = {name: p.requires_grad for name, p in backbone.named_parameters()}
    frozen = {name for name, requires in trains.items() if not requires}
    assert len(trains) == 53, "BatchNorm must hold buffers, not parameters"
    assert len(frozen) == 11
    assert {name.split(".")[1] for name in frozen} == {"conv1", "layer1"}
    before = {name: b.clone() for name, b in backbone.named_buffers()}
    backbone.train()(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(before[name], b) for name, b in backbone.named_buffers())


@pytest.mark.parametrize(
    ("name", "stage", "channels", "stride", "frozen"),
    [
        ("resnet18", 2, 128, 8, {"conv1", "layer1"}),
        ("resnet18", 1, 64, 4, {"conv1", "layer1"}),
        ("convnext_atto", 3, 320, 32, {"stem_0", "stem_1", "stages_0"}),
        ("efficientnet_b0", 3, 112, 16, {"conv_stem", "blocks.0", "blocks.1"}),
        ("regnety_002", 3, 152, 16, {"stem", "s1"}),
        ("mobilenetv3_small_100", 4, 576, 32, {"conv_stem", "blocks.0"}),
    ],
)
def test_any_convolutional_backbone_at_any_stage(name, stage, channels, stride, frozen):
    config = Config(num_classes=2, num_queries=4, width=16, heads=2, encoder_layers=1, decoder_layers=1)
    config = Config(**{**config.__dict__, "backbone": name, "backbone_stage": stage})
    model = ConditionalDETR(config).eval()
    assert (model.backbone.channels, model.backbone.stride) == (channels, stride)
    stopped = {n.removeprefix("body.") for n, p in model.backbone.named_parameters() if not p.requires_grad}
    assert {".".join(n.split(".")[: 2 if n.startswith("blocks") else 1]) for n in stopped} == frozen
    assert output_of(model, torch.randn(1, 3, 96, 70)).boxes.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backbone": "resnet5O"},
            r"backbone: expected the name of a timm model.*got 'resnet5O'; did you mean resnet",
        ),
        ({"backbone": "swin_tiny_patch4_window7_224", "backbone_stage": 3}, "which has a fixed input size"),
        ({"backbone": "mambaout_femto", "backbone_stage": 3}, "channels-last"),
        ({"backbone_stage": 5}, "timm cannot build stage 5 of 'resnet50'"),
        ({"backbone": "resnet18", "backbone_stage": 1, "dilation": True}, "resnet18"),
        (
            {"backbone": "hrnet_w18", "backbone_stage": 3},
            "expected a backbone whose stem and first stage can",
        ),
    ],
)
def test_unsupported_backbones(options, message):
    with pytest.raises(ValueError, match=message):
        ConditionalDETR(Config(**options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ({"num_classes": 3.0}, TypeError, "num_classes: expected int, got 3.0"),
        ({"num_queries": True}, TypeError, "num_queries: expected int, got True"),
        ({"encoder_layers": -1}, ValueError, "encoder_layers: expected at least 0, got -1"),
        ({"decoder_layers": 0}, ValueError, "decoder_layers: expected at least 1, got 0"),
        ({"width": 250}, ValueError, r"width: expected a multiple of 4 and of heads \(8\), got 250"),
        ({"heads": 7}, ValueError, r"width: expected a multiple of 4 and of heads \(7\), got 256"),
        ({"dropout": 1.0}, ValueError, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"backbone": None}, TypeError, "backbone: expected str, got None"),
        ({"dilation": 1}, TypeError, "dilation: expected bool, got 1"),
        ({"depth": 6}, TypeError, "depth"),
    ],
)
def test_invalid_config(options, error, message):
    with pytest.raises(error, match=message):
        Config(**options)


@pytest.mark.parametrize(
    ("pixels", "padding", "error", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, TypeError, "got torch.uint8; use Detector for images"),
        ("street.jpg", None, TypeError, "pixels: expected a normalised floating point tensor .*, got str"),
        (torch.zeros(3, 8, 8), None, ValueError, r"pixels: expected \(B, 3, H, W\).*got \(3, 8, 8\)"),
        (torch.zeros(1, 8, 8, 3), None, ValueError, r"got \(1, 8, 8, 3\)"),
        (torch.zeros(0, 3, 8, 8), None, ValueError, r"got \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8), TypeError, "padding: expected a bool tensor .* pass mask == 0"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(8, 8, dtype=torch.bool), ValueError, r"padding: expected \(1, 8, 8\)"),
    ],
)
def test_invalid_input(model, pixels, padding, error, message):
    with pytest.raises(error, match=message):
        model(pixels, padding)


def test_a_new_model_scores_the_prior_probability():
    torch.manual_seed(0)
    model = ConditionalDETR(Config(num_classes=3)).eval()
    torch.testing.assert_close(model.class_head.bias.data, torch.full((3,), -4.59512), rtol=0, atol=1e-5)
    boxes = output_of(model, torch.randn(1, 3, 64, 64)).boxes
    torch.testing.assert_close(boxes[..., 2:], torch.full_like(boxes[..., 2:], 0.5))
    encoder, decoder = model.encoder.layers[0].self_attention, model.decoder.layers[0].self_attention
    for weight, bound in [(encoder.query.weight, (6 / 1024) ** 0.5), (decoder.value.weight, (6 / 512) ** 0.5)]:
        assert bound * 0.999 < weight.abs().max() <= bound, "Xavier's bound for (3D, D) and for (D, D)"
    assert not encoder.output.bias.any()
    assert not decoder.output.bias.any()


def test_parameters_and_flops_of_the_papers_table():
    """The table has 44 M parameters and 90 G; these are multiply-adds, and a mean over COCO's image sizes.

    Counted on the meta device: on a CPU some versions of torch's counter miss its fused attention.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with MetaInit():
        model = ConditionalDETR(Config()).eval()
    assert sum(p.numel() for p in model.parameters()) == 43_418_401
    with FlopCounterMode(display=False) as counter:
        output_of(model, torch.zeros(1, 3, 800, 1333, device="meta"))
    multiply_adds = counter.get_total_flops() / 2 / 1e9
    assert multiply_adds == pytest.approx(105.96, abs=0.01)


def test_copy_pickle_state_dict_and_dtype(tiny, model, tmp_path):
    pixels, padding = two_images()
    expected = output_of(model, pixels, padding)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    fresh = ConditionalDETR(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    for twin in [*twins, fresh]:
        assert distance(output_of(twin, pixels, padding), expected) == (0, 0)
        assert twin.config == model.config
    assert twins[0].metadata == model.metadata
    half = output_of(copy.deepcopy(model).to(torch.bfloat16), pixels.bfloat16(), padding)
    assert half.boxes.dtype == torch.float32, "boxes are computed in float32"
    assert distance(half, expected)[1] < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(output_of(model, pixels, padding), expected)[1] < 0.05


def test_parts_can_be_replaced_and_frozen(model):
    model = copy.deepcopy(model)
    model.class_head = torch.nn.Linear(32, 2)
    model.encoder.requires_grad_(False)
    output = model(*two_images())
    assert output.logits.shape == (3, 2, 11, 2)
    output.logits.sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert model.class_head.weight.grad.any()


def test_exported_equals_eager(model):
    """For any number of images of any size."""
    pixels, padding = two_images()
    batch, any_size = torch.export.Dim("batch", min=1, max=8), torch.export.Dim.AUTO
    program = torch.export.export(
        model,
        (pixels, padding),
        dynamic_shapes=({0: batch, 2: any_size, 3: any_size}, {0: batch, 1: any_size, 2: any_size}),
        strict=False,
    )
    for height, width, images in ((128, 160, 2), (90, 131, 1), (96, 128, 3)):
        pixels, padding = (torch.cat([x, x])[:images] for x in two_images(height, width))
        exported = program.module()(pixels, padding)
        assert max(distance(exported, output_of(model, pixels, padding))) < 5e-6


def test_compiled_equals_eager(model):
    pixels, padding = two_images()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    for pad in (padding, None):
        assert max(distance(output_of(compiled, pixels, pad), output_of(model, pixels, pad))) < 5e-6
