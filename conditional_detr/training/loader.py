"""Data loading for the training loop: random numbers of a sample depend only on seed, epoch and index."""

import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conditional_detr.data.dataset import Sample, collate
from conditional_detr.data.seeds import derive_seed
from conditional_detr.training.config import TrainConfig

Batch: TypeAlias = tuple[Tensor, Tensor | None, list[dict[str, Any]]]
"""Pixels (B, 3, H, W); padding (B, H, W) bool, True = padded, or None; targets."""


class SampleDataset(Protocol):
    """A map-style dataset of training samples.

    A sample is an image's pixels (3, H, W), normalised, and its target {"labels", "boxes"}. If the dataset has a
    method ``set_epoch``, it is called before each epoch.
    """

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> Sample:
        """Return an image and its target."""


class _SeededDataset(Dataset[Any]):
    """A dataset that seeds the global generators by seed, epoch and index before each sample.

    An error is returned instead of raised, so that the traceback of a worker does not hide its message.
    """

    def __init__(self, data: SampleDataset, seed: int, epoch: int) -> None:
        self.data = data
        self.seed = seed
        self.epoch = epoch

    def __getitem__(self, index: int) -> Sample | Exception:
        with _seeded_generators(derive_seed(self.seed, self.epoch, index, bits=63)):
            try:
                return self.data[index]
            except (OSError, TypeError, ValueError) as error:
                return error


def load_batches(
    data: SampleDataset, batches: Sequence[list[int]], config: TrainConfig, epoch: int, *, pin: bool
) -> Iterator[Batch]:
    """Yield batches, which the workers load ahead.

    Args:
        data: the dataset.
        batches: the sample indices of each batch.
        config: the settings.
        epoch: index of the epoch.
        pin: copy batches to pinned memory, for asynchronous copies to a GPU.

    Raises:
        OSError, TypeError, ValueError: as the dataset raises them.
    """
    loader: DataLoader[Any] = DataLoader(
        _SeededDataset(data, config.seed, epoch),
        batch_sampler=batches,
        num_workers=min(config.workers, len(batches)),
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_init_worker,
        generator=torch.Generator(),  # the loader draws a base seed, which must not come from the global generator
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _collate(samples: list[Any]) -> Any:
    """Return a batch, or the first error among its samples."""
    errors = (sample for sample in samples if isinstance(sample, Exception))
    return next(errors, None) or collate(samples)


def _init_worker(number: int) -> None:
    """Ignore Ctrl-C, which reaches all processes of a terminal: the main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _seeded_generators(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of torch, numpy and Python, and restore their states at the end."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # datasets draw from the legacy generator
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
