"""Inputs of the decoder besides the paper's: without them, nothing changes; with them, what is expected does."""

import pytest
import torch

from conditional_detr import Config
from conditional_detr.modeling.attention import attend
from conditional_detr.modeling.decoder import Decoder


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder(Config(decoder_layers=2, width=16, heads=2, feedforward=32, dropout=0.0))


def inputs(queries=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, count, 16, generator=generator) for count in (queries, 7, 7)]


def test_the_papers_own_values_change_no_bit(decoder):
    """Zero content, the points that are predicted, and a mask that hides nothing."""
    o_q, memory, p_k = inputs()
    f, s = decoder(o_q, memory, p_k)
    points, _ = decoder.points(o_q)
    for given in ({"content": torch.zeros_like(o_q)}, {"points": points}):
        same = decoder(o_q, memory, p_k, **given)
        assert torch.equal(same[0], f)
        assert torch.equal(same[1], s)
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    torch.testing.assert_close(decoder(o_q, memory, p_k, hidden=nothing)[0], f)


@pytest.mark.parametrize("of_each_image", [False, True])
def test_hidden_queries_do_not_matter(decoder, of_each_image):
    """The first three of five queries, which do not see the last two, are as without them; those are not."""
    o_q, memory, p_k = inputs()
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[:3, 3:] = True
    f, s = decoder(o_q, memory, p_k, hidden=hidden.expand(2, 5, 5) if of_each_image else hidden)
    alone, points = decoder(o_q[:, :3], memory, p_k)
    torch.testing.assert_close(f[:, :, :3], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(s[:, :3], points)
    assert not torch.allclose(f[:, :, 3:], decoder(o_q[:, 3:], memory, p_k)[0], atol=1e-3)


def test_given_points_are_the_reference_points(decoder):
    """s is the inverse sigmoid: log(p / (1 - p))."""
    o_q, memory, p_k = inputs()
    given = torch.tensor([0.25, 0.8]).expand(2, 5, 2)
    _, s = decoder(o_q, memory, p_k, points=given)
    torch.testing.assert_close(s, torch.tensor([-1.0986123, 1.3862944]).expand(2, 5, 2), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(decoder(o_q, memory, p_k)[0], decoder(o_q, memory, p_k, points=given)[0], atol=1e-3)


def test_content_reaches_the_first_layer(decoder):
    o_q, memory, p_k = inputs()
    content = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    decoder(o_q, memory, p_k, content=content)[0][0].square().sum().backward()
    assert (content.grad.abs().sum(-1) > 0).all()


def test_the_mask_by_hand():
    """One head of width 1: a query that sees only key 1 gets its value; one that sees both gets their mean."""
    q, k, v = torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), torch.tensor([[[2.0], [4.0]]])
    hidden = torch.tensor([[True, False], [False, False]])
    assert attend(q, k, v, 1, hidden=hidden).flatten().tolist() == [4.0, 3.0]
