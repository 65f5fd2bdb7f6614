"""Comparisons of networks: numbers worked by hand, and two tiny networks trained with the same seeds."""

import json
from dataclasses import replace

import pytest
import torch

from conditional_detr import DETR, Metadata, from_pretrained
from conditional_detr.training import comparison
from conditional_detr.training.comparison import Candidate, Point, Speedup, Trained, compare, epochs_to_reach, speedups
from conditional_detr.training.comparison_report import FILES, check_folder, to_dict, to_markdown, write
from conditional_detr.training.config import TrainConfig
from helpers.models import assert_same
from helpers.training_runs import SMALL, Rectangles, small_model

CONFIG = TrainConfig(epochs=2, batch_size=2, lr=1e-3, workers=0)
FAST = Trained(
    ((Point(10, 0.2, 0.4), Point(20, 0.5, 0.7)), (Point(10, 0.3, 0.5), Point(20, 0.2, 0.6))), 3.0, 1000, 2 * 10**9
)
SLOW = Trained(
    ((Point(10, 0.0, 0.1), Point(20, 0.2, 0.3)), (Point(10, 0.1, 0.2), Point(20, 0.4, 0.5))), 2.0, 900, 10**9
)


def test_speedups_by_hand():
    """The fast one reaches 0.2 after 10 of 20 epochs with the first seed, and never 0.4 with the second."""
    assert epochs_to_reach(FAST.curves[0], 0.2) == 10
    assert epochs_to_reach(FAST.curves[0], 0.21) == 20
    assert epochs_to_reach(FAST.curves[0], 0.51) is None
    assert speedups({"fast": FAST, "slow": SLOW}) == [
        Speedup("fast", "slow", (10, None), (2.0, None)),
        Speedup("slow", "fast", (None, 20), (None, 1.0)),
    ]


def test_tables_by_hand():
    lines = to_markdown({"fast": FAST, "slow": SLOW}).splitlines()
    assert lines[2] == "| fast | 0.350 (0.200 to 0.500) | 0.650 (0.600 to 0.700) | 1,000 | 2.0 | 3.0 |"
    assert lines[-2:] == [
        "| fast | slow | 10; never with 1 of 2 seeds | 2.0 |",
        "| slow | fast | 20; never with 1 of 2 seeds | 1.0 |",
    ]
    assert to_markdown({"fast": FAST, "never": replace(SLOW, curves=((Point(1, 0, 0),) * 1,) * 2)}).endswith(
        "| never | fast | never |  |\n"
    )


def detr(seed, _):
    torch.manual_seed(seed)
    return DETR(SMALL, Metadata(("red", "blue")))


@pytest.fixture
def candidates():
    return {
        "conditional": Candidate(lambda seed, _: small_model(seed), CONFIG),
        "detr": Candidate(detr, replace(CONFIG, lr=2e-3)),
    }


@pytest.mark.filterwarnings("default")
def test_a_comparison_is_reported_and_continued(candidates, tmp_path, monkeypatch):
    def open_data(seed):
        return Rectangles(4, seed=seed), Rectangles(2, seed=9)

    def stop(name):
        if name == "conditional, seed 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(candidates, open_data, folder=tmp_path, seeds=(0, 1), progress=stop)
    first = from_pretrained(tmp_path / "detr" / "seed-0" / "last")
    begun = []
    plain = comparison.train
    monkeypatch.setattr(
        comparison, "train", lambda *data, **rest: begun.append(rest["folder"]) or plain(*data, **rest)
    )
    trained = compare(candidates, open_data, folder=tmp_path, seeds=(0, 1))
    assert begun == [tmp_path / name / f"seed-{seed}" for seed in (0, 1) for name in candidates]
    assert_same(from_pretrained(tmp_path / "detr" / "seed-0" / "last"), first)
    assert [[point.epochs for point in curve] for curve in trained["detr"].curves] == [[1, 2], [1, 2]]
    for seed in (0, 1):  # the losses of the log are those of the same images in the same order
        logs = [
            [json.loads(line) for line in (tmp_path / name / f"seed-{seed}" / "log.jsonl").read_text().splitlines()]
            for name in candidates
        ]
        assert [len(log) for log in logs] == [6, 6]
    settings = {"lr": 1e-3}
    check_folder(tmp_path, settings)
    write(trained, (0, 1), tmp_path, settings)
    check_folder(tmp_path, settings)
    with pytest.raises(FileExistsError, match=r"comparison\.json: expected no file, or that of this comparison"):
        check_folder(tmp_path, {"lr": 2e-3})
    assert all((tmp_path / name).stat().st_size for name in FILES)
    assert json.loads((tmp_path / FILES[0]).read_text()) == json.loads(json.dumps(to_dict(trained, (0, 1), settings)))


@pytest.mark.filterwarnings("default")
def test_a_run_that_began_with_other_weights_is_not_continued(candidates, tmp_path):
    data = Rectangles(2), Rectangles(2)
    compare(candidates, lambda _: data, folder=tmp_path, seeds=(0,))
    other = {**candidates, "conditional": Candidate(lambda seed, _: small_model(seed + 1), CONFIG)}
    with pytest.raises(ValueError, match=r"conditional/seed-0: expected no run, or one of this network with these"):
        compare(other, lambda _: data, folder=tmp_path, seeds=(0, 1))


@pytest.mark.parametrize(
    ("change", "seeds", "message"),
    [
        ({"epochs": 3}, (0,), "detr: expected epochs=2, as conditional has, got 3"),
        ({"batch_size": 1}, (0,), "detr: expected batch_size=2"),
        ({"time_limit": 9.0}, (0,), "detr: expected time_limit=0.0, as conditional has, got 9.0"),
        ({}, (), "seeds: expected different ones"),
        ({}, (1, 1), "seeds: expected different ones"),
    ],
)
def test_what_cannot_be_compared(candidates, change, seeds, message, tmp_path):
    candidates["detr"] = candidates["detr"]._replace(config=replace(CONFIG, **change))
    with pytest.raises(ValueError, match=message):
        compare(candidates, lambda _: (Rectangles(4), Rectangles(2)), folder=tmp_path, seeds=seeds)


def test_one_candidate_is_no_comparison(candidates, tmp_path):
    del candidates["detr"]
    with pytest.raises(ValueError, match="candidates: expected at least two, got 1"):
        compare(candidates, lambda _: (Rectangles(4), Rectangles(2)), folder=tmp_path)
