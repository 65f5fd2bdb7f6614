"""Runs that end by the clock: a clock of the test's own, which steps, evaluations and checkpoints advance."""

import time
from dataclasses import replace

import pytest

from conditional_detr.training import TrainConfig, run, train
from conditional_detr.training.optimizer import rate_factor
from conditional_detr.training.steps import Stepper
from conditional_detr.training.time_limit import Clock
from helpers.training_runs import Rectangles, small_model, steps_of

QUIET = {"progress": False}
TIMED = TrainConfig(epochs=1, batch_size=2, workers=0, schedule="cosine", warmup=3, save_every=1000)


class Time:
    """Seconds that pass only where the test says so."""

    def __init__(self, monkeypatch, *, step=1.0, evaluation=5.0, checkpoint=0.5):
        self.now = 1000.0
        plain = {"step": Stepper.train_step, "measure": run.measure, "save": run.save_checkpoint}

        def passing(name, seconds):
            def call(*arguments, **options):
                self.now += seconds
                return plain[name](*arguments, **options)

            return call

        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(Stepper, "train_step", passing("step", step))
        monkeypatch.setattr(run, "measure", passing("measure", evaluation))
        monkeypatch.setattr(run, "save_checkpoint", passing("save", checkpoint))


@pytest.mark.parametrize("images", [4, 200], ids=["many epochs", "less than one epoch"])
def test_a_run_ends_within_five_per_cent_with_the_end_of_its_schedule(tmp_path, monkeypatch, images):
    clock = Time(monkeypatch, step=0.5, evaluation=2.0, checkpoint=0.25)
    config = replace(TIMED, time_limit=60, evaluate_every=5)
    data, val = Rectangles(2, times=images // 2), Rectangles(2, seed=1)
    result = train(small_model(), data, val, config, folder=tmp_path, **QUIET)
    assert 0.95 * 60 <= clock.now - 1000 <= 1.05 * 60
    assert "AP" in result.history[-1]
    rates = [entry["lr"] for entry in steps_of(tmp_path)]
    assert max(rates) > 0.9 * config.lr
    assert rates[-1] < 0.01 * config.lr
    again = train(small_model(), data, val, config, folder=tmp_path, resume=True, **QUIET)
    assert (again.steps, again.history) == (result.steps, result.history)


def test_a_resumed_run_has_the_time_that_is_left(tmp_path, monkeypatch):
    clock = Time(monkeypatch, step=0.5, evaluation=0.0, checkpoint=0.0)
    config = replace(TIMED, time_limit=40, save_every=10)
    plain = Stepper.train_step

    def failing(self, *arguments, step, **options):
        if step == 30:
            raise OSError("no space left")
        return plain(self, *arguments, step=step, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "train_step", failing)
        with pytest.raises(OSError, match="no space left"):
            train(small_model(), Rectangles(4), None, config, folder=tmp_path, **QUIET)
    began = clock.now = clock.now + 5000  # of the pause
    result = train(small_model(), Rectangles(4), None, config, folder=tmp_path, resume=True, **QUIET)
    assert clock.now - began == pytest.approx(40 - 15, abs=2)
    assert result.steps == pytest.approx(80, abs=4)
    with pytest.raises(ValueError, match=r"got time_limit 60, not 40"):
        train(
            small_model(), Rectangles(4), None, replace(config, time_limit=60), folder=tmp_path, resume=True, **QUIET
        )


def test_the_used_part_by_hand(monkeypatch):
    """Steps of 4 images take 2 s, so 20 images of validation take 10 s: of 110 s, 100 are for steps."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(110, 20)
    clock.add_step(4, 2.0)
    now[0] = 25.0
    assert (clock.part, clock.evaluates) == (0.25, True)
    now[0] = 99.5
    assert (clock.part, clock.evaluates) == (1.0, False)  # half a step is left
    clock.add_closing(20.0)
    now[0] = 45.0
    assert clock.part == 0.5
    assert Clock(0, 20).part == 0.0


def test_rates_with_a_limit_by_hand():
    """The warm-up of 100 steps ends after a tenth of the limit: at a twentieth, half of the rate."""
    config = replace(TIMED, epochs=7, warmup=100, time_limit=60, schedule="constant")
    assert rate_factor(config, 0, 0.05 * 7) == pytest.approx(0.5)
    assert rate_factor(config, 79, 0.05 * 7) == pytest.approx(0.8)
    assert rate_factor(config, 3, 0.2 * 7) == 1.0
