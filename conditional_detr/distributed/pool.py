"""Run the units of a bulk detection on a pool of Ray actors, and replace those that die."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from conditional_detr.distributed.results import finished, planned, write_results
from conditional_detr.distributed.units import Source, Unit, read_unit
from conditional_detr.distributed.worker import Job, Worker
from conditional_detr.inference.detections import Detections

TRIES = 2
"""How often a unit may end its actor before its images are done one by one, and an image before it is an error."""

_STARTS = 3  # actors in a row that end before they have loaded the model
_FAILURES = 10  # least number of units and images in a row, all tries of which failed, that are taken for no accident
_PATIENCE = 60.0  # seconds without any actor before that is warned of
_MOST_ERRORS = 20


@dataclass(frozen=True)
class BulkResult:
    """Result of a bulk detection. All but the number of units is of this run.

    Attributes:
        folder: the folder of results.
        units: number of units, each of which has a file of results.
        skipped: number of units that an earlier run has done.
        images: number of images, each of which has a row.
        objects: number of detections.
        failed: number of images that have an error instead of detections.
        errors: messages of the first failures.
    """

    folder: str
    units: int
    skipped: int = 0
    images: int = 0
    objects: int = 0
    failed: int = 0
    errors: tuple[str, ...] = ()

    def add(self, counts: Mapping[str, Any]) -> "BulkResult":
        """Return the result with the counts of a unit added, as ``results.write_results`` returns them."""
        return replace(
            self,
            images=self.images + counts["images"],
            objects=self.objects + counts["objects"],
            failed=self.failed + counts["failed"],
            errors=(*self.errors, *counts["errors"])[:_MOST_ERRORS],
        )


class Pool:
    """Actors that do the units of a job. Each has one unit at a time, so that a dead actor tells which one ended it.

    Args:
        job: what to do.
        count: number of units.
        size: number of actors.
        options: of the actors, for ``ray.remote``.
        on_progress: called with the number of finished units, and of all.
    """

    def __init__(
        self, job: Job, count: int, size: int, options: Mapping[str, Any], on_progress: Callable[[int, int], object]
    ) -> None:
        import ray

        self.job, self.size, self.on_progress = job, size, on_progress
        self.actor_type = ray.remote(**options)(Worker)
        self.busy: dict[Any, tuple[Any, Unit | None]] = {}  # by the call that Ray is asked to wait for
        self.idle: list[Any] = []
        files = finished(job.folder)
        self.waiting = (unit for unit in planned(job.folder) if unit.digest not in files)
        self.again: list[Unit] = []
        self.left: list[Unit] = []  # to do image by image
        self.failures: Counter[Unit] = Counter()
        self.failed_starts = 0
        self.failed_in_a_row = 0
        self.done = sum(unit.digest in files for unit in planned(job.folder)) if files else 0
        self.result = BulkResult(job.folder, count, skipped=self.done)

    def run(self) -> BulkResult:
        """Do all units that have no results, and return the result.

        Raises:
            OSError: actors do not start or do not load the model, all fail on images, an input cannot be read, or
                results cannot be written.
            ValueError: an actor has other weights than the job.
        """
        import ray

        self.on_progress(self.done, self.result.units)
        try:
            for _ in range(min(self.size, self.result.units - self.done)):
                self._start()
            # not until none is busy: Ray may never find a place for an actor
            while self.busy and self.done + len(self.left) < self.result.units:
                self._wait()
            for unit in self.left:
                self._run_one_by_one(unit)
        finally:
            for actor in (*self.idle, *(actor for actor, _ in self.busy.values())):
                ray.kill(actor)
        return self.result

    def _start(self) -> None:
        """Start an actor; it is given a unit when it is ready."""
        actor = self.actor_type.remote(self.job)
        self.busy[actor.ready.remote()] = (actor, None)

    def _wait(self) -> None:
        """Wait for an actor; count what it has done and give it the next unit, or replace it if it has failed."""
        import ray

        calls, _ = ray.wait([*self.busy], num_returns=1, timeout=_PATIENCE)
        if not calls:
            if not any(unit for _, unit in self.busy.values()):
                warnings.warn(
                    f"Ray: no actor has loaded the model after {_PATIENCE:g} s; does the cluster have free resources?",
                    stacklevel=2,
                )
            return
        (call,) = calls
        actor, unit = self.busy.pop(call)
        counts, failure = _outcome(call)
        if failure is not None:
            ray.kill(actor)
            self._note(unit, failure)
            self._start()
            if self.idle:  # the new actor may wait for a place
                self._give_unit(self.idle.pop())
            return
        self.failed_starts = 0
        if unit is not None:
            self.failed_in_a_row = 0
            self._count(counts)
        self._give_unit(actor)

    def _give_unit(self, actor: Any) -> None:
        """Give an actor the next unit; without one, it is idle."""
        following = self.again.pop() if self.again else next(self.waiting, None)
        if following is None:
            self.idle.append(actor)
        else:
            self.busy[actor.run.remote(following)] = (actor, following)

    def _note(self, unit: Unit | None, failure: str) -> None:
        """Note that an actor has failed, and what is to become of its unit."""
        if unit is None:
            self.failed_starts += 1
            if self.failed_starts == _STARTS:
                raise OSError(f"the cluster: expected actors to load the model, got {_STARTS} failures: {failure}")
            return
        self.failures[unit] += 1
        if self.failures[unit] < TRIES:
            self.again.append(unit)
            return
        self.left.append(unit)
        self._note_failed(failure)

    def _note_failed(self, failure: str) -> None:
        """Note that all tries of a unit or image have failed; raise OSError if those of many in a row have."""
        self.failed_in_a_row += 1
        if self.failed_in_a_row == max(_FAILURES, 2 * self.size):
            raise OSError(
                f"the cluster: expected actors to detect, got {self.failed_in_a_row} units and images in a row in each"
                f" of {TRIES} tries of which {failure}"
            )

    def _count(self, counts: Mapping[str, Any]) -> None:
        self.result = self.result.add(counts)
        self.done += 1
        self.on_progress(self.done, self.result.units)

    def _run_one_by_one(self, unit: Unit) -> None:
        keys, outcomes = [], []
        for source in read_unit(unit):
            keys.append(source.key)
            outcomes.append(self._detect_alone(source))
        self._count(write_results(self.job.folder, unit, keys, outcomes))

    def _detect_alone(self, source: Source) -> Detections | Exception:
        """Detect on an image in an actor that has no other; return an error if it fails in each try."""
        import ray

        failure: str | None = None
        for _ in range(TRIES):
            while not self.idle:
                self._wait()
            actor = self.idle.pop()
            outcomes, failure = _outcome(actor.detect.remote([source]))
            if failure is None:
                self.failed_in_a_row = 0
                self.idle.append(actor)
                return outcomes[0]
            ray.kill(actor)
            self._start()
        self._note_failed(str(failure))
        return ValueError(f"{source.key}: in each of {TRIES} tries {failure}")


def _outcome(call: Any) -> tuple[Any, str | None]:
    """Return what a call to an actor has returned, or why the actor is to be replaced; raise other errors.

    A device whose error is a RuntimeError may fail on.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(call), None
    except RayTaskError as error:
        if isinstance(error.cause, RuntimeError | MemoryError):
            return None, f"the model failed: {error.cause!r}"
        raise error.cause from None
    except RayError as error:
        last_line = str(error).strip().rpartition("\n")[2]
        return None, f"the process of the model ended: {type(error).__name__}: {last_line}"
