"""Experiment trackers, such as Weights & Biases, MLflow and Comet, which receive the numbers of ``log.jsonl``."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conditional_detr.training.surroundings import check_packages

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "conditional-detr"
_PLACES = {"wandb": "WANDB_PROJECT", "comet_ml": "COMET_PROJECT_NAME"}
"""Variables that name the project; accelerate itself reads MLflow's."""
_CONTINUED = {"wandb": ("id", "id"), "mlflow": ("info.run_id", "run_id"), "comet_ml": ("id", "experiment_key")}
"""Of trackers that continue a run: the attribute of their run that has its id, and the argument that takes it."""
_FORBIDDEN = re.compile(r"^\.|[^\w .-]")  # in a part of a metric's name: MLflow refuses the metric


class Trackers:
    """Trackers of a training run, of accelerate's classes.

    Args:
        trackers: names of trackers that accelerate has, and objects of subclasses of its GeneralTracker.

    Attributes:
        ids: the id of the run in each tracker that can continue one, by the tracker's name.

    Raises:
        ModuleNotFoundError: a tracker's package is not installed.
        TypeError: neither a name nor a tracker, or one that is in no list.
        ValueError: no tracker has this name, or a name is there twice.
    """

    def __init__(self, trackers: "Sequence[str | GeneralTracker]") -> None:
        if isinstance(trackers, str) or not isinstance(trackers, Iterable):
            raise TypeError(f"trackers: expected a list of names and trackers, got {trackers!r}")
        self._trackers = tuple(trackers)
        for i, tracker in enumerate(self._trackers):
            _check(f"trackers[{i}]", tracker)
        names = [tracker for tracker in self._trackers if isinstance(tracker, str)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"trackers: expected each name once, got {', '.join(sorted(twice))} again")
        self.ids: dict[str, str] = {}
        self._active: dict[str, GeneralTracker] = {}
        self._failed: dict[str, str] = {}

    @contextmanager
    def running(self, settings: Mapping[str, Any], folder: Path) -> Iterator[None]:
        """Start all trackers, and finish them, also after an error.

        A tracker that has an id in ``ids`` continues that run, or begins a new one with a warning if it cannot; all
        whose run is new get the settings. At the end, a warning
        repeats which trackers miss numbers.

        Args:
            settings: all that decides the numbers of the run, by name.
            folder: the folder of the run, whose name the new run of a tracker gets.

        Raises:
            OSError: a tracker cannot start.
        """
        with ExitStack() as stack:
            stack.callback(self._report_failed)
            for i, tracker in enumerate(self._trackers):
                key = tracker if isinstance(tracker, str) else f"{tracker.name} {i}"
                try:
                    with _same_environment():
                        self._active[key] = self._start(key, tracker, settings, folder, stack)
                except Exception as error:  # of any service
                    raise OSError(f"tracker {key}: expected it to start, got {_text(error)}") from error
            yield

    def log(self, entry: Mapping[str, Any], kind: str) -> None:
        """Send the numbers of a step or an epoch, as "kind/name", with the epoch.

        A tracker that fails is left out from then on, with a warning: its service must not end a training.

        Args:
            entry: an entry of ``log.jsonl``.
            kind: "train" or "val".
        """
        if not self._active:
            return
        values = {"epoch": entry["epoch"]} | {f"{kind}/{name}": value for name, value in _numbers(entry)}
        for key, tracker in list(self._active.items()):
            try:
                tracker.log(values, step=entry["step"])
            except Exception as error:  # noqa: PERF203  # each on its own
                del self._active[key]
                self._failed[key] = f"it failed at step {entry['step']} ({_text(error)}) and has no numbers since"
                warnings.warn(f"tracker {key}: {self._failed[key]}; the training goes on", stacklevel=2)

    def _start(
        self,
        key: str,
        tracker: "str | GeneralTracker",
        settings: Mapping[str, Any],
        folder: Path,
        stack: ExitStack,
    ) -> "GeneralTracker":
        """Start a tracker; the stack finishes it."""
        try:
            started = _begin(tracker, folder, self.ids.get(key))
        except Exception as error:  # its run may have been deleted
            if key not in self.ids:
                raise
            why = f"run {self.ids.pop(key)} cannot be continued ({_text(error)}), a new one begins"
            warnings.warn(f"tracker {key}: {why}", stacklevel=2)
            started = _begin(tracker, folder, None)
        continued = key in self.ids
        stack.callback(self._finish, key, started)
        if key in _CONTINUED:
            self.ids[key] = attrgetter(_CONTINUED[key][0])(started.tracker)
        if not continued:
            started.store_init_configuration({"folder": folder.absolute().name, **_flat(settings)})
        return started

    def _finish(self, key: str, tracker: "GeneralTracker") -> None:
        """Finish a tracker; its failure is a warning, so that the error of the training stays."""
        try:
            tracker.finish()
        except Exception as error:
            warnings.warn(f"tracker {key}: expected it to finish, got {_text(error)}", stacklevel=2)

    def _report_failed(self) -> None:
        """Repeat, at the end of a run of hours, which trackers miss numbers."""
        for key, why in self._failed.items():
            warnings.warn(f"tracker {key}: {why}; log.jsonl has all numbers", stacklevel=2)


@contextmanager
def _same_environment() -> Iterator[None]:
    """Restore the environment variables afterwards: W&B leaves one that other programs would inherit."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _check(what: str, tracker: Any) -> None:
    """Raise what :class:`Trackers` raises for a tracker."""
    check_packages()
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    if isinstance(tracker, GeneralTracker):
        return
    if not isinstance(tracker, str):
        raise TypeError(f"{what}: expected a name or a tracker of accelerate, got {type(tracker).__name__}")
    names = sorted(set(LOGGER_TYPE_TO_CLASS) - {"tensorboard"})  # a run writes files for TensorBoard anyway
    if tracker not in names:
        raise ValueError(f"{what}: expected one of {', '.join(names)}, got {tracker!r}")
    if tracker not in {str(available) for available in get_available_trackers()}:
        package = tracker.replace("_", "-")
        raise ModuleNotFoundError(f"{what}: {tracker} needs {package}, which is not installed: pip install {package}")


def _begin(tracker: "str | GeneralTracker", folder: Path, run_id: str | None) -> "GeneralTracker":
    """Return a started tracker: that which is given, or one of a name for a new run or for that of an id."""
    started = _make(tracker, folder, run_id) if isinstance(tracker, str) else tracker
    start = getattr(started, "start", None)  # trackers of older versions of accelerate start when they are made
    if start is not None:
        start()
    return started


def _make(name: str, folder: Path, run_id: str | None) -> "GeneralTracker":
    """Return one of accelerate's trackers, for a new run or for that of an id."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    options = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
    if run_id is not None:
        options[_CONTINUED[name][1]] = run_id
    elif name in ("wandb", "mlflow"):
        options["name" if name == "wandb" else "run_name"] = folder.absolute().name
    if name == "wandb":
        options["resume"] = "allow"
    return kind(os.environ.get(_PLACES.get(name, ""), PROJECT), **options)


def _numbers(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an entry of the log, those of the classes as "per_class/name"."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            for part, of_part in value.items():
                yield f"{name}/{_allowed(part)}", of_part
        elif name not in ("step", "epoch"):
            yield "/".join(map(_allowed, name.split("/"))), value


def _allowed(part: str) -> str:
    """Return a part of a metric's name, with the codes of the characters that MLflow refuses."""
    return _FORBIDDEN.sub(lambda found: f"_{ord(found[0]):x}_", part) or "_"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings without nesting, lists as JSON: the types that all trackers take."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat


def _text(error: BaseException) -> str:
    """Return the class and the first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
