"""Compare how fast networks converge: the same data, order, augmentation and schedule, several seeds.

The paper's question on one's own data: AP against epochs, and the epochs that each candidate needs to reach the final
AP of another.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from conditional_detr.deploy.summary import summarise
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.training.checkpoints import read_training_state
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loader import SampleDataset
from conditional_detr.training.loop import train

_SHARED = (
    *("epochs", "time_limit", "batch_size", "accumulation", "balanced"),
    *("schedule", "drop_at", "evaluate_every", "patience"),
)


class Candidate(NamedTuple):
    """A network and its training.

    Attributes:
        create: returns the initial network for a seed and the training data.
        config: its training; the seed is replaced.
    """

    create: Callable[[int, SampleDataset], DetectionTransformer]
    config: TrainConfig


class Point(NamedTuple):
    """An evaluation: number of epochs trained, AP, and AP50."""

    epochs: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class Trained:
    """What a candidate came to, for each seed.

    Attributes:
        curves: the evaluations of each seed, in order.
        seconds: median time of an epoch, with its evaluation.
        parameters: number of parameters.
        flops: operations per image at the largest size of the preprocessing.
    """

    curves: tuple[tuple[Point, ...], ...]
    seconds: float
    parameters: int
    flops: int

    @property
    def final(self) -> list[float]:
        """Return the AP after the last epoch, for each seed."""
        return [curve[-1].ap for curve in self.curves]


class Speedup(NamedTuple):
    """How much sooner one candidate reaches the final AP of another.

    Attributes:
        fast: name of the candidate that reaches it.
        slow: name of the candidate whose final AP is reached.
        epochs: epochs that the first needs, for each seed; None: it never reaches it.
        ratios: epochs of the second by those of the first, for each seed; None: it never reaches it.
    """

    fast: str
    slow: str
    epochs: tuple[int | None, ...]
    ratios: tuple[float | None, ...]


def compare(
    candidates: Mapping[str, Candidate],
    open_data: Callable[[int], tuple[SampleDataset, SampleDataset]],
    *,
    folder: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Trained]:
    """Train each candidate with each seed, or continue where an earlier call ended.

    Args:
        candidates: two or more, by name. Epochs, batch size and schedule must be equal; what else is equal is up to
            the caller, who may give each its own learning rate.
        open_data: returns the data for training and validation, for a seed.
        folder: receives a folder per candidate and seed, each as of
            :func:`~conditional_detr.training.loop.train`.
        seeds: seeds of initial weights, order and augmentation. All candidates are trained with one seed before the
            next one, so that an interrupted comparison compares the same seeds.
        progress: called with the name and seed of each run before it begins.

    Returns:
        The results by name.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the next call continues.
        OSError, RuntimeError, TypeError, ValueError: as ``train``; or fewer than two candidates, no seed, or
            candidates whose epochs, batch size or schedule differ.
    """
    _check(candidates, seeds)
    histories: dict[str, list[Sequence[Mapping[str, Any]]]] = {name: [] for name in candidates}
    sizes: dict[str, tuple[int, int]] = {}
    first_data, _ = open_data(seeds[0])
    for name, candidate in candidates.items():  # also to find what is wrong with a later one before the first trains
        summary = summarise(candidate.create(seeds[0], first_data))
        sizes[name] = summary.total, summary.flops
    for seed in seeds:
        for name, candidate in candidates.items():
            progress(f"{name}, seed {seed}")
            train_data, val_data = open_data(seed)
            model = candidate.create(seed, train_data)
            config, run = replace(candidate.config, seed=seed), Path(folder) / name / f"seed-{seed}"
            before = read_training_state(run, mmap=True)
            if before is not None and before.get("initial_weights") != model.weights_digest():
                raise ValueError(
                    f"{run}: expected no run, or one of this network with these initial weights, got another"
                )
            result = train(model, train_data, val_data, config, folder=run, resume=True)
            histories[name].append(result.history)
    return {name: _trained(found, *sizes[name]) for name, found in histories.items()}


def speedups(trained: Mapping[str, Trained]) -> list[Speedup]:
    """Return the speed-up of each candidate over each other one."""
    return [
        Speedup(fast, slow, *_times(trained[fast].curves, trained[slow].curves))
        for fast in trained
        for slow in trained
        if fast != slow
    ]


def epochs_to_reach(curve: Sequence[Point], ap: float) -> int | None:
    """Return the epochs after which a curve first has an AP; None if it never does."""
    return next((point.epochs for point in curve if point.ap >= ap), None)


def _times(
    fast: Sequence[Sequence[Point]], slow: Sequence[Sequence[Point]]
) -> tuple[tuple[int | None, ...], tuple[float | None, ...]]:
    """Return the epochs that the first needs to reach the final AP of the second, and the ratio, for each seed."""
    epochs = [epochs_to_reach(one, other[-1].ap) for one, other in zip(fast, slow, strict=True)]
    ratios = [
        None if reached is None else other[-1].epochs / reached for reached, other in zip(epochs, slow, strict=True)
    ]
    return tuple(epochs), tuple(ratios)


def _trained(histories: Sequence[Sequence[Mapping[str, Any]]], parameters: int, flops: int) -> Trained:
    """Return the results of the histories of all seeds."""
    curves = tuple(
        tuple(Point(entry["epoch"] + 1, entry["AP"], entry["AP50"]) for entry in history if "AP" in entry)
        for history in histories
    )
    seconds = statistics.median(entry["seconds"] for history in histories for entry in history)
    return Trained(curves, seconds, parameters, flops)


def _check(candidates: Mapping[str, Candidate], seeds: Sequence[int]) -> None:
    """Raise ValueError unless the candidates can be compared."""
    if len(candidates) < 2:
        raise ValueError(f"candidates: expected at least two, got {len(candidates)}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds: expected different ones, got {list(seeds)}")
    (first, reference), *others = candidates.items()
    for name, candidate in others:
        for setting in _SHARED:
            expected, got = (getattr(each.config, setting) for each in (reference, candidate))
            if got != expected:
                raise ValueError(f"{name}: expected {setting}={expected}, as {first} has, got {got}")
