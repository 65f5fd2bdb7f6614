"""The largest batch that fits, and advice before a run."""

from dataclasses import replace

import pytest
import torch

from conditional_detr import ConditionalDETR, Metadata
from conditional_detr.training import TrainConfig, batch_fitting, train
from conditional_detr.training.advice import usual_rate
from conditional_detr.training.batch_fitting import fit_batch_size
from helpers.training_runs import SMALL, Rectangles, small_model, steps_of

EIGHT = TrainConfig(epochs=1, batch_size=4, accumulation=2, workers=0, clip=0.1, schedule="constant")


class Limited(ConditionalDETR):
    """A network of a device with memory for three images."""

    sizes = ()

    def forward(self, pixels, padding=None):
        Limited.sizes += (tuple(pixels.shape),)
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(pixels, padding)


def limited():
    torch.manual_seed(0)
    Limited.sizes = ()
    return Limited(SMALL, Metadata(("red", "blue")))


@pytest.fixture
def gpu(monkeypatch):
    """The CPU as a device that signals when its memory is used up."""
    monkeypatch.setattr(batch_fitting, "_SIGNALLING", ("cpu",))


class Sizes(Rectangles):
    """Images of different sizes; the largest is 64 high, and another 80 wide."""

    def __getitem__(self, index):
        pixels, target = super().__getitem__(index)
        if index == 1:
            raise OSError("no file")
        return (torch.zeros(3, 40, 80) if index == 2 else pixels), target


def test_the_largest_divisor_whose_step_runs(gpu):
    """Of the eight images of a step: 8 and 4 run out of memory, 2 does not; three would, but do not divide eight."""
    model, state = limited(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = fit_batch_size(model, Sizes(5), EIGHT)
    assert (fitted.config.batch_size, fitted.config.accumulation) == (2, 4)
    assert fitted.config == replace(EIGHT, batch_size=2, accumulation=4)
    assert fitted.report == "batch size 2 x accumulation 4, for 64 x 80: fits, 4 does not"
    assert Limited.sizes == ((8, 3, 64, 80), (4, 3, 64, 80), (2, 3, 64, 80))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_fits(gpu, monkeypatch):
    monkeypatch.setattr(Limited, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(ValueError, match="batch_size: expected memory for a step of one image, got none left"):
        fit_batch_size(limited(), Rectangles(2), EIGHT)


@pytest.mark.parametrize(("images", "expected"), [(0.5, 1), (1.5, 1), (4.5, 4), (100, 8)])
def test_a_cpu_estimates_from_what_an_image_keeps(monkeypatch, images, expected):
    """Memory for gradients, moments and some images: the largest divisor of eight below that number."""
    model = small_model()
    with_one = fit_batch_size(model, Rectangles(4), EIGHT).report
    assert "an estimate, as a CPU gives no signal when memory is used up" in with_one
    kept = {}
    for size in (1, 2):
        with batch_fitting._saved_bytes() as saved:
            batch_fitting._train_once(
                model, EIGHT, batch_fitting.SetLoss(), batch_fitting.make_accelerator(), _batch(size)
            )
        kept[size] = sum(saved.values())
    image = 1.5 * (kept[2] - kept[1])
    fixed = 3 * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    monkeypatch.setattr(batch_fitting, "free_memory", lambda: (fixed + images * image) / 0.8)
    fitted = fit_batch_size(model, Rectangles(4), EIGHT)
    assert (fitted.config.batch_size, fitted.config.accumulation) == (expected, 8 // expected)


def _batch(size):
    pixels, target = max(Rectangles(4).samples, key=lambda sample: len(sample[1]["labels"]))
    return torch.zeros(size, *pixels.shape), None, [target] * size


def test_kept_bytes_of_a_product_by_hand():
    """x · w keeps both for backward: 12 and 12 floats; a view of x is no memory of its own."""
    x, w = torch.ones(12, requires_grad=True), torch.ones(12, requires_grad=True)
    with batch_fitting._saved_bytes() as saved:
        y = (x * w) + (x.view(3, 4) * 2.0).flatten()
    assert sum(saved.values()) == 2 * 12 * 4
    assert y.shape == (12,)


def test_accumulation_has_the_losses_and_gradients_of_the_large_batch(tmp_path):
    """After a step, too; AdamW's first steps themselves enlarge rounding of gradients near zero."""
    for size, accumulation in ((8, 1), (2, 4)):
        config = replace(EIGHT, batch_size=size, accumulation=accumulation, epochs=2, clip=0)
        train(small_model(dropout=0.0), Rectangles(8), None, config, folder=tmp_path / str(size), progress=False)
    large, small = steps_of(tmp_path / "8"), steps_of(tmp_path / "2")
    for name in ("loss", "class", "l1", "giou", "norm"):
        assert small[0][name] == pytest.approx(large[0][name], rel=1e-5), name
    assert small[1]["loss"] == pytest.approx(large[1]["loss"], rel=1e-4)


def test_advice_is_printed_once_before_the_first_step(tmp_path, capsys):
    """The paper's 1e-4 for 16 images is 5e-5 for 4, by the square root; 1e-3 is far from it."""
    assert usual_rate(4) == pytest.approx(5e-5)
    config = replace(EIGHT, batch_size=4, accumulation=1, lr=1e-3)
    train(small_model(), Rectangles(4), None, config, folder=tmp_path)
    text = capsys.readouterr().err
    advice = "learning rate: 0.001 for 4 images a step; the paper's 0.0001 for 16 images, scaled by the square root,"
    assert text.count(f"{advice} would be 5.0e-05") == 1
    assert text.count("memory: ") == 1
    assert text.index("memory: ") < text.index("epoch 1/1")
