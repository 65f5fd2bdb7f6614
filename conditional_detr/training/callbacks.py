"""Hooks of a training run: what a caller adds to its steps, evaluations and epochs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.training.loader import SampleDataset


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

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        for i, callback in enumerate(callbacks):
            if not isinstance(callback, Callback):
                raise TypeError(f"callbacks[{i}]: expected a Callback, got {type(callback).__name__}")
        self._callbacks = tuple(callbacks)

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
            TypeError: a value is no number.
            ValueError: a name that the entry has already.
        """
        found: dict[str, float] = {}
        for callback in self._callbacks:
            for name, value in callback.metrics(model, data).items():
                what = f"{type(callback).__name__}.metrics"
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise TypeError(f"{what}: expected a number for {name!r}, got {value!r}")
                if name in found or name in measured:
                    raise ValueError(f"{what}: expected names that are not in use, got {name!r}")
                found[name] = float(value)
        return found

    def epoch(self, model: DetectionTransformer, entry: Mapping[str, Any]) -> None:
        """Call ``epoch``."""
        for callback in self._callbacks:
            callback.epoch(model, entry)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each."""
        return [callback.state_dict() for callback in self._callbacks]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Restore the state of each."""
        for callback, state in zip(self._callbacks, states, strict=True):
            callback.load_state_dict(state)
