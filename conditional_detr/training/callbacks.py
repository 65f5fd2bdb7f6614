"""Hooks of a training run: what a caller adds to its steps, evaluations and epochs."""

import io
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.training.loader import SampleDataset

_RESERVED = ("loss", "seconds", "waited", "images_per_second_loaded")  # which the log has, or tells its steps by


class Callback:
    """Hooks of a training run, called in the first process only. A subclass overrides those that it needs.

    A hook must not change random numbers or the model: with or without callbacks, a run computes the same numbers.
    """

    def begin(self, model: DetectionTransformer, settings: Mapping[str, Any], folder: Path) -> None:
        """Begin a run, or continue one after :meth:`load_state_dict`.

        Args:
            model: the model that is trained.
            settings: all that decides the numbers of the run, by name, such as those of TrainConfig.
            folder: the folder of the run.
        """

    def step(self, entry: Mapping[str, Any]) -> None:
        """Take the numbers of a step: step, epoch, loss, class, l1, giou, norm and lr, as in ``log.jsonl``."""

    def metrics(self, model: DetectionTransformer, data: SampleDataset) -> Mapping[str, float]:
        """Return numbers of an evaluation besides AP, which the log, the curves' data and the history then have.

        Args:
            model: the model to evaluate, in any mode: the moving average if there is one.
            data: the validation data.
        """
        return {}

    def epoch(self, model: DetectionTransformer, entry: Mapping[str, Any]) -> None:
        """Take the numbers of an epoch, with its evaluation, if there was one.

        Args:
            model: the model as evaluated.
            entry: epoch, step, mean_loss, seconds, and of an evaluation AP and the other metrics.
        """

    def end(self) -> None:
        """End a run, also after an error or Ctrl-C."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors, numbers, strings, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`state_dict`."""


class Callbacks:
    """Call several callbacks, in their order.

    Args:
        callbacks: the callbacks; of another process than the first, none.

    Raises:
        TypeError: one is no Callback.
    """

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        if isinstance(callbacks, Callback):
            raise TypeError("callbacks: expected a sequence of Callbacks, got one; pass [callback]")
        callbacks = tuple(callbacks)
        for i, callback in enumerate(callbacks):
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks[{i}]: expected a Callback, got {type(callback).__name__}")
        self._callbacks = callbacks

    @property
    def names(self) -> list[str]:
        """The names of the classes."""
        return [type(callback).__name__ for callback in self._callbacks]

    @contextmanager
    def running(self, model: DetectionTransformer, settings: Mapping[str, Any], folder: Path) -> Iterator[None]:
        """Begin, and end those that have begun, also after an error."""
        with ExitStack() as stack:
            for callback in self._callbacks:
                callback.begin(model, settings, folder)
                stack.callback(callback.end)
            self.state_dict()  # what it refuses is better known now than at the first checkpoint
            yield

    def step(self, entry: Mapping[str, Any]) -> None:
        """Call ``step``."""
        for callback in self._callbacks:
            callback.step(entry)

    def metrics(
        self, model: DetectionTransformer, data: SampleDataset, measured: Mapping[str, Any]
    ) -> dict[str, float]:
        """Return the numbers of all ``metrics``.

        Raises:
            TypeError: they are no dict of names and numbers.
            ValueError: a name that the log has already.
        """
        found: dict[str, float] = {}
        for callback in self._callbacks:
            what, given = f"{type(callback).__name__}.metrics", callback.metrics(model, data)
            if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
                raise TypeError(f"{what}: expected a dict of names and numbers, got {given!r}")
            for name, value in given.items():
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise TypeError(f"{what}: expected a number for {name!r}, got {value!r}")
                if name in found or name in measured or name in _RESERVED:
                    raise ValueError(f"{what}: expected names that are not in use, got {name!r}")
                found[name] = float(value)
        return found

    def epoch(self, model: DetectionTransformer, entry: Mapping[str, Any]) -> None:
        """Call ``epoch``."""
        for callback in self._callbacks:
            callback.epoch(model, entry)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each.

        Raises:
            TypeError: one that could not be read again.
        """
        states = [callback.state_dict() for callback in self._callbacks]
        for name, state in zip(self.names, states, strict=True):
            file = io.BytesIO()
            try:
                torch.save(state, file)
                file.seek(0)
                torch.load(file, weights_only=True)
            except (pickle.PickleError, AttributeError, TypeError) as error:
                raise TypeError(
                    f"{name}.state_dict: expected tensors, numbers, strings, lists and dicts of them, got {state!r}"
                ) from error
        return states

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore the state of each."""
        for callback, state in zip(self._callbacks, states, strict=True):
            callback.load_state_dict(state)
