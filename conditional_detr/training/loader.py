"""Data loading for the training loop: random numbers of a sample depend only on seed, epoch and index."""

import itertools
import math
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conditional_detr.data.dataset import Sample, collate
from conditional_detr.data.seeds import derive_seed
from conditional_detr.system.shutdown import SIGNALS
from conditional_detr.training.config import TrainConfig

_MUCH_WAITING = 0.1  # share of an epoch
_LONG_WAITING = 10.0  # seconds: starting the workers takes a part of it
_DEATH = 5.0  # seconds in which a dying process ends after its sockets are closed

Batch: TypeAlias = tuple[Tensor, Tensor | None, list[dict[str, Any]]]
"""Pixels (B, 3, H, W); padding (B, H, W) bool, True = padded, or None; targets."""

PlannedBatch: TypeAlias = tuple[int, list[int], Any]
"""The epoch, the dataset indices of a batch, and what the dataset has read ahead of it, if it does."""

LoadedBatch: TypeAlias = tuple[list[int], Batch]
"""The dataset indices of a batch's images, and the batch."""


class SampleDataset(Protocol):
    """A map-style dataset of training samples.

    A sample is an image's pixels (3, H, W), normalised, and its target {"labels", "boxes"}. If the dataset has a
    method ``set_epoch``, it is called before each epoch, in each process that loads images. If it has ``read_ahead``,
    this is called in the process that trains, with the batches of an epoch, and yields for each batch what the method
    ``put`` gets in the process that loads its images.
    """

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> Sample:
        """Return an image and its target."""


@dataclass
class InputTimes:
    """Times of loading the images of an epoch, to notice that the model waits for them.

    Attributes:
        images: number of loaded images.
        loading: seconds of loading them, summed over the processes that load.
        waiting: seconds in which the training loop waited for a batch.
    """

    images: int = 0
    loading: float = 0.0
    waiting: float = 0.0

    def record(self, images: int, seconds: float) -> None:
        """Add a batch."""
        self.images, self.loading = self.images + images, self.loading + seconds

    def rate(self, workers: int) -> float:
        """Return the images a second that a number of processes would load alone; 0 without images."""
        return self.images * max(workers, 1) / self.loading if self.loading else 0.0

    def explain(self, seconds: float, workers: int) -> str:
        """Return what to do if the model waited for much of an epoch's seconds; an empty string if it did not."""
        if self.waiting < max(_MUCH_WAITING * seconds, _LONG_WAITING):
            return ""
        return (
            f"the model waited for images for {self.waiting:.0f} of {seconds:.0f} s: {workers} workers load"
            f" {self.rate(workers):.1f} images a second; use more workers, fast preprocessing or smaller image files"
        )


class _SeededDataset(Dataset[Any]):
    """A dataset that seeds the global generators by seed, epoch and index before each sample.

    Workers live longer than an epoch, so it gets the epoch with the indices of each batch. An error is returned
    instead of raised, so that the traceback of a worker does not hide its message.
    """

    def __init__(self, data: SampleDataset, parts: Sequence[Any], config: TrainConfig) -> None:
        self.data = data
        self.parts = parts
        self.seed = config.seed
        self.epoch: int | None = None
        self.skips = config.max_bad_images > 0

    def set_epoch(self, epoch: int) -> None:
        """Call ``set_epoch`` of the datasets that have it, if this process has not done so for this epoch."""
        if epoch == self.epoch:
            return
        with _seeded_generators(derive_seed(self.seed, epoch, bits=63)):  # the same in all processes
            for part in self.parts:
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
        self.epoch = epoch

    def __getitem__(self, index: int) -> Sample | Exception:
        assert self.epoch is not None
        with _seeded_generators(derive_seed(self.seed, self.epoch, index, bits=63)):
            try:
                return self.data[index]
            except (OSError, TypeError, ValueError) as error:
                return error

    def __getitems__(self, batch: PlannedBatch) -> tuple[list[tuple[int, Sample | Exception]], float]:
        """Return the samples of a batch with their indices, and the time at which loading them began.

        If all are bad and are skipped, the next good one is loaded, too.

        Args:
            batch: the epoch, the indices, and what the dataset has read ahead of them.
        """
        began = time.perf_counter()
        epoch, indices, contents = batch
        self.set_epoch(epoch)
        if contents is not None:
            self.data.put(contents)  # type: ignore[attr-defined]  # what reads ahead takes it, too
        loaded = [(index, self[index]) for index in indices]
        if self.skips and all(isinstance(sample, OSError | ValueError) for _, sample in loaded):
            following = ((indices[-1] + i) % len(self.data) for i in range(1, len(self.data)))
            others = ((index, self[index]) for index in following)
            loaded += itertools.islice((pair for pair in others if not isinstance(pair[1], Exception)), 1)
        return loaded, began


class _Plan:
    """The batches of an epoch, which the loader takes a few ahead of the training, in this process.

    Args:
        read_ahead: the dataset's method that reads encoded images of batches; None: workers open the images.
    """

    def __init__(self, read_ahead: Callable[[Sequence[list[int]]], Iterator[Any]] | None) -> None:
        self._read_ahead = read_ahead
        self.epoch, self.batches = 0, list[list[int]]()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[PlannedBatch]:
        contents = itertools.repeat(None) if self._read_ahead is None else self._read_ahead(self.batches)
        for indices, content in zip(self.batches, contents, strict=False):
            yield self.epoch, indices, content


class BatchLoader:
    """Context manager that loads the batches of one epoch after the other.

    Its workers start with the first batch and live until the end of the context: with the start method "spawn", each
    imports torch anew, which takes seconds.

    Args:
        data: the dataset.
        config: the settings.
        parts: the datasets whose ``set_epoch`` is called, if they have it, in each process that loads.
        pin: copy batches to pinned memory, for asynchronous copies to a GPU.
        skip: called with the index and the error of an image that cannot be read and is left out of its batch; raises
            if there are too many of them. Without ``config.max_bad_images``, the first error is raised.
    """

    def __init__(
        self,
        data: SampleDataset,
        config: TrainConfig,
        *,
        parts: Sequence[Any],
        pin: bool,
        skip: Callable[[int, Exception], None],
    ) -> None:
        self._data = _SeededDataset(data, parts, config)
        self._skips, self._skip = config.max_bad_images > 0, skip
        self._plan = _Plan(getattr(data, "read_ahead", None))
        workers = min(config.workers, math.ceil(len(data) / config.batch_size))
        self._loader: DataLoader[Any] = DataLoader(
            self._data,
            batch_sampler=self._plan,  # type: ignore[arg-type]  # torch passes each of its items to __getitems__()
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin,
            persistent_workers=workers > 0,
            # the loader draws a base seed, which must not come from the global generator
            generator=torch.Generator(device="cpu"),
        )
        self._iterator: Any = None
        self._workers: list[BaseProcess] = []

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _end(self._iterator, self._workers)

    def load(
        self, batches: Sequence[list[int]], epoch: int, record: Callable[[int, float], None]
    ) -> Iterator[LoadedBatch]:
        """Yield the batches of an epoch with the dataset indices of their images, which the workers load ahead.

        Args:
            batches: the sample indices of each batch.
            epoch: index of the epoch.
            record: called with the number of images of a batch, and the seconds that loading it took in one process.

        Raises:
            OSError, TypeError, ValueError: as the dataset raises them.
            RuntimeError: a worker died.
        """
        self._data.set_epoch(epoch)
        self._plan.epoch, self._plan.batches = epoch, list(batches)
        self._begin()
        for indices, batch, errors, seconds in self._loaded():
            for index, error in errors:
                if not self._skips or isinstance(error, TypeError):
                    raise error
                self._skip(index, error)
            if batch is None:
                raise errors[0][1]
            record(len(indices), seconds)
            yield indices, batch

    def _loaded(self) -> Iterator[Any]:
        """Yield what the workers load; which error torch raises after one has died depends on when it died."""
        try:
            yield from self._iterator
        except (EOFError, OSError) as error:
            dead = self._wait_for_dead_workers()
            if not dead:
                raise
            raise RuntimeError(f"DataLoader worker (pid {', '.join(map(str, dead))}) exited unexpectedly") from error

    def _wait_for_dead_workers(self) -> list[int | None]:
        """Return the process numbers of the workers that have ended; if none has, wait shortly for the first."""
        ended = connection.wait([worker.sentinel for worker in self._workers], _DEATH)
        return [worker.pid for worker in self._workers if worker.sentinel in ended]

    def _begin(self) -> None:
        """Begin to load the plan; the first time, start the workers."""
        before = multiprocessing.active_children()
        with _blocked_signals():
            self._iterator = iter(self._loader)
        self._workers += [process for process in multiprocessing.active_children() if process not in before]


def _end(iterator: Any, workers: Sequence[BaseProcess]) -> None:
    """End the workers of a loader's iterator, if it has any.

    They block SIGTERM, with which multiprocessing ends its processes at exit, and would be waited for without end.
    """
    if workers:
        iterator._shutdown_workers()  # also by the iterator's __del__, but an error's traceback keeps the iterator
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _collate(items: Any) -> tuple[list[int], Batch | None, list[tuple[int, Exception]], float]:
    """Return the indices and the batch of the good samples, the errors of the others, and the seconds of all.

    Args:
        items: the result of ``_SeededDataset.__getitems__``.
    """
    loaded, began = items
    errors = [(index, sample) for index, sample in loaded if isinstance(sample, Exception)]
    good = [(index, sample) for index, sample in loaded if not isinstance(sample, Exception)]
    batch = collate([sample for _, sample in good]) if good else None
    return [index for index, _ in good], batch, errors, time.perf_counter() - began


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block the signals of a shutdown request in the processes that are started while the context is active.

    Ctrl-C and job schedulers signal all processes of a group. The main process handles these signals and still needs
    its workers, which end with it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
