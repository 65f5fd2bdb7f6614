"""The optimised copy equals the plain model in every dtype, at all sizes, padded or not."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from conditional_detr import ConditionalDETR, Config, Detector, export, optimize, quantize
from conditional_detr.deploy import layers
from conditional_detr.deploy.backbone import FastBackbone
from conditional_detr.deploy.kernels import Computation, FusedConv, MapMemory
from conditional_detr.deploy.summary import summarise
from helpers.models import differences, pixels_of, two_images

# tolerance of logits and boxes; half precision has 8 or 11 bits
BOUNDS = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.1, 0.02), torch.float16: (0.02, 0.003)}
OTHERS = ["mobilenetv3_small_100", "regnetx_002", "convnext_atto", "efficientnet_b0", "gcresnext26ts"]
SIZES = [(1, 64, 96), (2, 97, 131), (3, 160, 64)]


@pytest.fixture(scope="module")
def plain(tiny):
    return ConditionalDETR.from_pretrained(tiny.folder)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_equals_the_plain_model(plain, dtype):
    """The weights make queries and positions differ; see the mutation tests."""
    fast = optimize(plain, dtype=dtype)
    logits, boxes = BOUNDS[dtype]
    for size in SIZES:
        found = differences(fast, plain, pixels_of(*size))
        assert found[0] < logits
        assert found[1] < boxes
    found = differences(fast, plain, *two_images(96, 128))
    assert found[0] < logits
    assert found[1] < boxes


@pytest.mark.parametrize("checkpoint", ["r50", "dc5"])
def test_the_published_architecture(checkpoint, request):
    plain = ConditionalDETR.from_pretrained(request.getfixturevalue(checkpoint).folder)
    logits, boxes = differences(optimize(plain), plain, *two_images(96, 128))
    assert logits < 1e-4
    assert boxes < 1e-5


def test_half_precision_gives_the_same_boxes_of_trained_weights(shapes_image):
    plain = Detector.from_pretrained("shapes")
    expected = plain(shapes_image, threshold=0.6)
    assert len(expected) > 4
    for dtype in (torch.bfloat16, torch.float16):
        found = Detector(optimize(plain.model, dtype=dtype))(shapes_image, threshold=0.5)
        for box, score, name in expected:
            same = found.filter(classes=[name])
            distances = (same.boxes - torch.tensor(box)).abs().amax(dim=1)
            assert distances.min() < 2  # pixels
            assert same.scores[distances.argmin()] == pytest.approx(score, abs=0.05)


@pytest.fixture(scope="module")
def shapes_image():
    from conditional_detr.data.synthetic import draw_image, image_index

    return draw_image(0, image_index("demo", 6))[0]


def test_an_empty_padding_mask_is_dropped(plain):
    fast = optimize(plain)
    pixels = pixels_of(2, 64, 96)
    nothing = torch.zeros(2, 64, 96, dtype=torch.bool)
    assert torch.equal(fast(pixels, nothing).logits, fast(pixels).logits)


def test_compiled_does_not_compile_again_for_other_sizes(least):
    """Other sizes of one image or of batches reuse the two graphs; padding would add a graph."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    plain = ConditionalDETR.from_pretrained(least)
    fast = optimize(plain, compile=True)
    assert max(differences(fast, plain, pixels_of(1, 160, 224))) < 1e-4
    assert max(differences(fast, plain, pixels_of(2, 160, 224))) < 1e-4
    before = counters["stats"]["unique_graphs"]
    for size in [(1, 224, 160), (1, 197, 231), (1, 260, 260), (3, 256, 130)]:
        assert max(differences(fast, plain, pixels_of(*size))) < 1e-4
    assert counters["stats"]["unique_graphs"] == before


def test_the_model_is_not_changed_and_its_mode_does_not_matter(plain):
    model = copy.deepcopy(plain).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = optimize(model)
    assert model.training
    assert not fast.training
    assert max(differences(fast, plain, pixels_of(1, 64, 96))) < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert fast(pixels_of(1, 64, 96)).logits.requires_grad is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_in_other_precisions(plain, dtype):
    fast = optimize(copy.deepcopy(plain).to(dtype))
    logits, boxes = differences(fast, plain, pixels_of(1, 64, 96))
    assert logits < (0.1 if dtype == torch.bfloat16 else 1e-4)
    assert boxes < (0.02 if dtype == torch.bfloat16 else 1e-5)


def test_a_limited_number_of_positions_is_cached_by_size(plain, monkeypatch):
    from conditional_detr.deploy import optimize as module

    monkeypatch.setattr(module, "_CACHED_SIZES", 2)
    fast = optimize(plain)
    for width in (64, 96, 128, 64):
        assert max(differences(fast, plain, pixels_of(1, 64, width))) < 1e-4
    assert list(fast._positions) == [(4, 8), (4, 4)]


def test_a_resnet_consists_of_fused_convolutions(plain):
    fast = FastBackbone(plain.backbone.body, Computation(torch.float32, kernels=True))
    kinds = {type(module).__name__ for module in fast.modules()}
    assert kinds == {"FastBackbone", "GraphModule", "FusedConv", "MaxPool2d"} | ({"Module"} & kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_in_kept_memory_are_the_same(plain, dtype, monkeypatch):
    """As for large images: every map of the backbone is in memory that is used again."""
    pixels = [pixels_of(*size) for size in [*SIZES, (1, 131, 97), (2, 97, 131)]]
    computation = Computation(dtype, kernels=True)
    expected = [FastBackbone(plain.backbone.body, computation)(x)[0] for x in pixels]
    monkeypatch.setattr(MapMemory, "MIN_BYTES", 1)
    fast = FastBackbone(plain.backbone.body, computation)
    one_by_one = [fast(x)[0] for x in pixels]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda x: fast(x)[0], pixels * 4))
    for i, found in enumerate([*one_by_one, *together]):
        torch.testing.assert_close(found, expected[i % len(pixels)], rtol=1e-5, atol=1e-5)


def test_kept_memory_is_used_again_when_its_tensors_are_deleted():
    memory = MapMemory()
    first = memory.zeros((1, 256, 160, 160), torch.float32)
    assert first.is_contiguous(memory_format=torch.channels_last)
    address, part = first.data_ptr(), first[:, :3]
    del first
    other = memory.zeros((1, 256, 160, 160), torch.float32)
    assert other.data_ptr() != address  # a view still uses it
    assert address % 64 == 0
    part.fill_(1)
    del part
    again = memory.zeros((2, 128, 128, 160), torch.float32)  # smaller
    assert again.data_ptr() == address
    assert not again.any()
    del again, other
    larger = memory.zeros((1, 256, 200, 200), torch.float32)
    assert len(memory._unused) == 1  # it replaces a block
    assert larger.shape == (1, 256, 200, 200)


@pytest.mark.parametrize("shape", [(1, 64, 100, 100), (8, 256, 200, 200)])
def test_small_and_huge_maps_are_left_to_the_c_library(shape):
    assert MapMemory().zeros(shape, torch.float32) is None


class Residuals(nn.Module):
    """Additions of maps that are read afterwards, by a convolution and through a view."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        y = self.second(x) + x  # x is read again
        z = self.third(y) + y  # by the convolution itself, whose input y is
        view = z.flatten(2)
        w = self.fourth(x) + z  # z is read again, through its view
        return [w, view]


def test_an_addition_does_not_overwrite_a_map_that_is_read_afterwards():
    torch.manual_seed(0)
    plain = Residuals()
    pixels = pixels_of(2, 33, 47)
    with torch.no_grad():
        found = FastBackbone(plain, Computation(torch.float32, kernels=True))(pixels)
        for one, expected in zip(found, plain(pixels), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_every_block_of_a_resnet_adds_in_place(plain):
    graph = FastBackbone(plain.backbone.body, Computation(torch.float32, kernels=True)).graph
    additions = [node for node in graph.graph.nodes if node.op == "call_module" and len(node.args) > 1]
    assert additions
    assert all(
        isinstance(graph.get_submodule(node.target), FusedConv) and node.args[2:] == (True,) for node in additions
    )


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("kernels", [False, True])
def test_other_backbones(name, kernels):
    torch.manual_seed(0)
    sizes = {"num_classes": 2, "width": 16, "heads": 2, "encoder_layers": 0, "decoder_layers": 1}
    backbone = ConditionalDETR(Config(backbone=name, backbone_stage=3, **sizes)).eval().backbone.body
    for module in backbone.modules():
        if hasattr(module, "running_var"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and not module.weight.any():  # timm initialises some branches to zero
            nn.init.normal_(module.weight, std=0.1)
    pixels = pixels_of(2, 64, 96)
    with torch.no_grad():
        (expected,) = backbone(pixels)
        (found,) = FastBackbone(backbone, Computation(torch.float32, kernels=kernels))(pixels)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_summary_equals_that_of_the_plain_model(plain):
    """The copy has fewer, joined and constant parameters; a replaced head and frozen parts are counted as they are."""
    model = copy.deepcopy(plain)
    model.class_head = nn.Linear(32, 3)
    model.encoder.requires_grad_(False)
    expected = summarise(model, (64, 96))
    assert expected.parameters != summarise(plain, (64, 96)).parameters
    assert expected.trainable < expected.total - expected.parameters["encoder"]
    for options in ({}, {"dtype": torch.bfloat16}):
        summary = summarise(optimize(model, **options), (64, 96))
        assert summary == expected
        assert summary.to_dict() == expected.to_dict()


class Mine(ConditionalDETR):
    """A subclass may change anything."""


def test_errors_of_the_optimised_copy(plain, tmp_path):
    fast = optimize(plain)
    memory, positions = torch.zeros(1, 4, 32), torch.zeros(1, 4, 32)
    refusals = [
        (lambda: fast.train(), ValueError, "cannot be trained"),
        (lambda: fast.save_pretrained(tmp_path), ValueError, "cannot be saved"),
        (lambda: fast.state_dict(), ValueError, "cannot be saved or copied"),
        (lambda: copy.deepcopy(fast), ValueError, "cannot be saved or copied"),
        (lambda: pickle.dumps(fast), ValueError, "cannot be saved or copied"),
        (lambda: fast.load_state_dict({}), ValueError, "cannot load weights"),
        (lambda: optimize(Mine(plain.config)), TypeError, "expected a ConditionalDETR or DETR, got Mine"),
        (lambda: optimize(plain, dtype="bfloat16"), TypeError, "expected a torch.dtype, got 'bfloat16'"),
        (lambda: fast.half(), ValueError, "cannot change its device or dtype"),
        (lambda: fast.to("cpu"), ValueError, "cannot change its device or dtype"),
        (lambda: fast.attention_maps(memory), ValueError, "use the plain model"),
        (lambda: fast.decode(memory, positions, object_queries=memory), ValueError, "object_queries: expected None"),
        (lambda: optimize(fast), ValueError, "got an optimised copy"),
        (lambda: optimize(nn.Linear(2, 2)), TypeError, "expected a ConditionalDETR or DETR, got Linear"),
        (lambda: optimize(plain, dtype=torch.float64), ValueError, "dtype: expected one of torch.float32"),
        (lambda: fast(pixels_of(1, 64, 64)[0]), ValueError, "pixels: expected"),
    ]
    for do, error, message in refusals:
        with pytest.raises(error, match=message):
            do()
    fast.eval()


FAST_LAYERS = ["FastTokenAttention", "FastQueryAttention", "FastConditionalCrossAttention", "FastCrossAttention"]


@pytest.mark.parametrize("name", [*FAST_LAYERS, "FastFeedForward"])
def test_methods_of_fast_layers_replace_those_of_the_plain_ones(name):
    """A method under another name would never be called, and nobody would notice but by the time it takes."""
    fast = getattr(layers, name)
    (plain,) = fast.__bases__
    own = {attribute for attribute, value in vars(fast).items() if callable(value) and not attribute.startswith("__")}
    assert own
    assert own <= set(vars(plain))


def test_own_modules_are_refused(plain, tmp_path):
    """Only their weights would be used; a body of the backbone is traced, whatever it consists of."""

    class OwnLinear(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = copy.deepcopy(plain)
    attention = model.decoder.layers[0].cross_attention
    value = attention.value
    attention.value = OwnLinear(value.in_features, value.out_features)
    message = r"outside backbone\.body, got 1: decoder\.layers\.0\.cross_attention\.value is a OwnLinear"
    for convert in (optimize, lambda m: export(m, tmp_path / "x.onnx"), lambda m: quantize(m, tmp_path / "x.xml", [])):
        with pytest.raises(TypeError, match=message):
            convert(model)
    assert list(tmp_path.iterdir()) == []
    attention.value = value
    optimize(model)


def test_digests_of_optimised_copies_differ_as_the_models_do(plain):
    """Also where only packed weights of the backbone differ, which the state dict does not hold."""
    other = copy.deepcopy(plain)
    with torch.no_grad():
        next(other.backbone.parameters()).add_(1e-3)
    copies = [optimize(plain), optimize(plain), optimize(other), optimize(plain, dtype=torch.bfloat16)]
    digests = [one.weights_digest() for one in copies]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
