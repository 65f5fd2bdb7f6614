"""Batches for the loop: what is drawn for an image depends on seed, epoch and image, and on nothing else."""

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
from conditional_detr.training.config import TrainConfig

Batch: TypeAlias = tuple[Tensor, Tensor | None, list[dict[str, Any]]]


class SampleDataset(Protocol):
    """A data set to train on: any map-style one.

    Its samples are an image's pixels (3, H, W), normalised, and its target {"labels", "boxes"}. If it has a method
    ``set_epoch``, that is called before each epoch.
    """

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> Sample:
        """Return an image and its target."""


class _SeededDataset(Dataset[Any]):
    """A data set whose draws follow from seed, epoch and index, also those from the global generators.

    What cannot be read comes back as its error, so that the message is not buried in that of a worker.
    """

    def __init__(self, data: SampleDataset, seed: int, epoch: int) -> None:
        self.data = data
        self.seed = seed
        self.epoch = epoch

    def __getitem__(self, index: int) -> Sample | Exception:
        with _global_generators(derive_seed(self.seed, self.epoch, index)):
            try:
                return self.data[index]
            except (OSError, TypeError, ValueError) as error:
                return error


def derive_seed(*numbers: int) -> int:
    """Return a seed for one of many things to draw, well mixed: neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def load_batches(
    data: SampleDataset, batches: Sequence[list[int]], config: TrainConfig, epoch: int, *, pin: bool
) -> Iterator[Batch]:
    """Give batches of images, prepared in the workers ahead of their turn.

    Args:
        data: the data set.
        batches: the images of each batch.
        config: the settings.
        epoch: which epoch this is.
        pin: put batches where a GPU copies from without waiting.

    Raises:
        OSError, TypeError, ValueError: what the data set raises.
    """
    loader: DataLoader[Any] = DataLoader(
        _SeededDataset(data, config.seed, epoch),
        batch_sampler=batches,
        num_workers=min(config.workers, len(batches)),
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # the loader draws one number: not from the global generator
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _collate(samples: list[Any]) -> Any:
    """Return a batch, or the first error among its samples."""
    errors = (sample for sample in samples if isinstance(sample, Exception))
    return next(errors, None) or collate(samples)


def _begin_worker(number: int) -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the one that saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU, numpy's and Python's, and leave them as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  # those are what data sets draw from
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
