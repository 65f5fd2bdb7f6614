"""Every part removed from the network or exchanged in it makes the parity test fail.

transformers' output is computed once; every mutant of the network must differ from it by more than the parity tests
allow.
"""

import itertools

import pytest
import torch
from torch import nn

from conditional_detr import from_pretrained
from conditional_detr.modeling import decoder, detection_transformer, detr_decoder, encoder
from conditional_detr.modeling import positions as positions_module
from helpers.models import two_images
from helpers.reference import IDLE, distance, transformers_output

VISIBLE = 1e-4  # logits; the parity tests allow 3e-5 at most


@pytest.fixture(scope="module")
def images():
    return two_images(96, 128)


@pytest.fixture(scope="module", params=["tiny", "tiny_detr"])
def published(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def expected(published, images):
    return transformers_output(published.transformers, *images)


@pytest.fixture(scope="module")
def ours(published):
    return from_pretrained(published.folder)


@pytest.fixture
def behind_the_backbone(ours, images, monkeypatch):
    """The network, whose backbone repeats its output for the images: for mutations of what comes after it."""
    with torch.no_grad():
        output = ours.backbone(*images)
    monkeypatch.setattr(ours.backbone, "forward", lambda *_: output)
    return ours


def projections(network) -> dict[str, nn.Module]:
    """Return every layer with a matrix after the backbone, and the learned queries."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    return {n: m for n, m in network.named_modules() if isinstance(m, kinds) and not n.startswith("backbone")}


@torch.no_grad()
def visible(network, images, expected) -> bool:
    logits, boxes = distance(network(*images), expected)
    return max(logits, boxes) > VISIBLE


def test_the_unchanged_network_passes(ours, images, expected):
    assert max(distance(ours(*images), expected)) < 3e-5


def test_zeroing_any_parameter_is_visible(behind_the_backbone, images, expected):
    ours, unseen = behind_the_backbone, []
    for name, parameter in ours.named_parameters():
        if name.startswith("backbone"):
            continue
        kept = parameter.data
        parameter.data = torch.zeros_like(kept)
        if not visible(ours, images, expected):
            unseen.append(name)
        parameter.data = kept
    assert {name for name in unseen if not IDLE.search(name)} == set()
    assert {name for name in dict(ours.named_parameters()) if IDLE.search(name)} == set(unseen)


def test_swapping_any_two_projections_is_visible(behind_the_backbone, images, expected):
    ours, unseen = behind_the_backbone, []
    pairs = [
        (a, b)
        for a, b in itertools.combinations(projections(ours).items(), 2)
        if a[1].weight.shape == b[1].weight.shape
        and not (IDLE.search(f"{a[0]}.weight") and IDLE.search(f"{b[0]}.weight"))
    ]
    for (name, one), (other_name, other) in pairs:
        one.weight.data, other.weight.data = other.weight.data, one.weight.data
        if not visible(ours, images, expected):
            unseen.append((name, other_name))
        one.weight.data, other.weight.data = other.weight.data, one.weight.data
    assert len(pairs) > 400
    assert unseen == []


def without_transformation(self, layer, f, p_s):
    return p_s


def transformation_in_every_layer(self, layer, f, p_s):
    return self.transformation(f) * p_s


def transformation_only(self, layer, f, p_s):
    return p_s if layer == 0 else self.transformation(f)


def transformation_of_normalised_state(self, layer, f, p_s):
    return p_s if layer == 0 else self.transformation(self.norm(f)) * p_s


def states_normalised_between_layers(self, o_q, p_s, memory, p_k, padding, *_):
    states = [torch.zeros_like(o_q)]
    for i, layer in enumerate(self.layers):
        states.append(self.norm(layer(states[-1], o_q, self.spatial_query(i, states[-1], p_s), memory, p_k, padding)))
    return states


def content_only(self, f, o_q, p_q):
    c_q, p_q = project_queries(self, f, o_q, p_q)
    return c_q, p_q * 0


def spatial_only(self, f, o_q, p_q):
    c_q, p_q = project_queries(self, f, o_q, p_q)
    return c_q * 0, p_q


def first_layer_without_object_queries(self, f, o_q, p_q):
    return project_queries(self, f, o_q * 0, p_q)


def first_layer_content_keys_without_positions(self, memory, p_k):
    c_k, p_k = project_keys(self, memory, p_k)
    return c_k if self.object_query is None else c_k - p_k, p_k


def side_by_side_instead_of_per_head(self, content, spatial):
    return torch.cat((content, spatial), dim=-1)


def self_attention_without_positions(self, c, o_q):
    return decoder_attention(self, c, o_q * 0)


def encoder_without_positions(self, x, positions, padding=None):
    return encoder_attention(self, x, positions * 0, padding)


def encoder_with_positions_on_values(self, x, positions, padding=None):
    return encoder_attention(self, x + positions, positions * 0, padding)


def encoder_sees_padding(self, x, positions, padding):
    return encoder_layer(self, x, positions, None)


def without_object_queries(self, f, o_q, memory, p_k, padding):
    return detr_attention(self, f, o_q * 0, memory, p_k, padding)


def keys_without_positions(self, f, o_q, memory, p_k, padding):
    return detr_attention(self, f, o_q, memory, p_k * 0, padding)


def values_with_positions(self, f, o_q, memory, p_k, padding):
    return detr_attention(self, f, o_q, memory + p_k, p_k * 0, padding)


def detr_decoder_sees_padding(self, f, o_q, memory, p_k, padding):
    return detr_attention(self, f, o_q, memory, p_k, None)


def detr_states_normalised_between_layers(self, o_q, memory, p_k, padding):
    states = [torch.zeros_like(o_q)]
    for layer in self.layers:
        states.append(self.norm(layer(states[-1], o_q, memory, p_k, padding)))
    return states


def decoder_sees_padding(self, f, o_q, p_q, memory, p_k, padding):
    return cross_attention(self, f, o_q, p_q, memory, p_k, None)


def sigmoid_removed(self, o_q, _=None):
    points = self.reference_point(o_q)
    return points.sigmoid(), positions_module.sine_of_points(points, o_q.shape[-1])


def x_before_y(points, width):
    return sine_of_points(points.flip(-1), width)


def map_without_padding(padding, width, dtype=torch.float32):
    return sine_of_map(torch.zeros_like(padding), width, dtype)


def cosine_before_sine(angle, features):
    return sine(angle, features).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


project_queries = decoder.ConditionalCrossAttention.project_queries
project_keys = decoder.ConditionalCrossAttention.project_keys
cross_attention = decoder.ConditionalCrossAttention.forward
decoder_attention = decoder.SelfAttention.forward
detr_attention = detr_decoder.CrossAttention.forward
encoder_attention = encoder.SelfAttention.forward
encoder_layer = encoder.EncoderLayer.forward
sine, sine_of_points, sine_of_map = (
    positions_module.sine,
    positions_module.sine_of_points,
    positions_module.sine_of_map,
)

CONDITIONAL_DETR = [
    (decoder.Decoder, "spatial_query", without_transformation),
    (decoder.Decoder, "spatial_query", transformation_in_every_layer),
    (decoder.Decoder, "spatial_query", transformation_only),
    (decoder.Decoder, "spatial_query", transformation_of_normalised_state),
    (decoder.Decoder, "run", states_normalised_between_layers),
    (decoder.Decoder, "points", sigmoid_removed),
    (decoder.ConditionalCrossAttention, "project_queries", content_only),
    (decoder.ConditionalCrossAttention, "project_queries", spatial_only),
    (decoder.ConditionalCrossAttention, "project_queries", first_layer_without_object_queries),
    (decoder.ConditionalCrossAttention, "project_keys", first_layer_content_keys_without_positions),
    (decoder.ConditionalCrossAttention, "concatenate", side_by_side_instead_of_per_head),
    (decoder.ConditionalCrossAttention, "forward", decoder_sees_padding),
    (decoder.SelfAttention, "forward", self_attention_without_positions),
    (decoder, "sine_of_points", x_before_y),
    (decoder, "inverse_sigmoid", torch.zeros_like),
]
DETR = [
    (detr_decoder.DETRDecoder, "run", detr_states_normalised_between_layers),
    (detr_decoder.CrossAttention, "forward", without_object_queries),
    (detr_decoder.CrossAttention, "forward", keys_without_positions),
    (detr_decoder.CrossAttention, "forward", values_with_positions),
    (detr_decoder.CrossAttention, "forward", detr_decoder_sees_padding),
]
BOTH = [
    (encoder.SelfAttention, "forward", encoder_without_positions),
    (encoder.SelfAttention, "forward", encoder_with_positions_on_values),
    (encoder.EncoderLayer, "forward", encoder_sees_padding),
    (detection_transformer, "sine_of_map", map_without_padding),
    (positions_module, "sine", cosine_before_sine),
]
OF_ARCHITECTURE = {"conditional_detr": CONDITIONAL_DETR + BOTH, "detr": DETR + BOTH}


def test_dropping_any_term_of_the_paper_is_visible(ours, images, expected, monkeypatch):
    unseen = []
    for owner, name, mutant in OF_ARCHITECTURE[ours.architecture]:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, mutant)
            if not visible(ours, images, expected):
                unseen.append(mutant.__name__)
    assert unseen == []
