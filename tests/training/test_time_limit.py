"""Runs that end by the clock: one of the test's own, which steps and evaluations advance, or the real one."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from conditional_detr.training import TrainConfig, run, train
from conditional_detr.training.optimizer import rate_factor
from conditional_detr.training.steps import Stepper
from conditional_detr.training.time_limit import Clock
from helpers import training_runs
from helpers.training_runs import Rectangles, small_model, steps_of

QUIET = {"progress": False}
LIMIT = 6.0
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
    """A step of 4 images takes 3 s, so 20 images, shared by two, take 7.5 s, the report 16 s, curves 2 s.

    The first step does not count. Of 125.5 s, 100 are left for steps.
    """
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(125.5, 20, processes=2)
    clock.add_step(4, 60.0)
    assert clock.closing == 2.0
    clock.add_step(4, 3.0)
    assert clock.closing == pytest.approx(25.5)
    now[0] = 25.0
    assert (clock.part, clock.evaluates) == (pytest.approx(0.25), True)
    now[0] = 99.0
    assert (clock.part, clock.evaluates) == (1.0, False)  # less than half a step is left
    clock.add_closing(23.5)
    now[0] = 50.0
    assert clock.part == 0.5
    assert Clock(4, 0).closing == 1.0  # of a short limit, a quarter is for the curves
    assert Clock(0, 20).part == 0.0


def test_rates_with_a_limit_by_hand():
    """The warm-up of 100 steps ends after a tenth of the limit: at a twentieth, half of the rate."""
    config = replace(TIMED, epochs=7, warmup=100, time_limit=60, schedule="constant")
    assert rate_factor(config, 0, 0.05 * 7) == pytest.approx(0.5)
    assert rate_factor(config, 79, 0.05 * 7) == pytest.approx(0.8)
    assert rate_factor(config, 3, 0.2 * 7) == 1.0


# ---- the real clock


def test_two_processes_stop_at_the_same_step_within_the_limit(tmp_path):
    """By a real clock, on any machine: the last checkpoint may be late by half the limit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [training_runs.__file__, "timed", str(tmp_path), str(LIMIT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "1"}
    subprocess.run(command, check=True, capture_output=True, env={**environment, "OMP_NUM_THREADS": "1"})
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["steps"] == second["steps"] >= 2
    assert first["weights"] == second["weights"]
    steps = steps_of(tmp_path)
    assert [entry["step"] for entry in steps] == list(range(1, first["steps"] + 1))
    assert steps[-1]["lr"] < 0.2 * max(entry["lr"] for entry in steps)
    assert "AP" in first["history"][-1]
    took = (tmp_path / "last" / "training_state.pt").stat().st_mtime - first["began"]
    assert 0.25 * LIMIT < took < 1.5 * LIMIT
