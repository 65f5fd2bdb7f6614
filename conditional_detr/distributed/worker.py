"""The actor that runs the model of a bulk detection."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from conditional_detr.distributed.results import write_results
from conditional_detr.distributed.units import Source, Unit, read_unit
from conditional_detr.inference.batches import DEFAULT_BATCH_SIZE, WORKERS, run_batches
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.pipeline import map_in_threads
from conditional_detr.inference.preparation import PreparedImage
from conditional_detr.system.storage import is_remote, read


@dataclass(frozen=True)
class Job:
    """What actors do.

    Attributes:
        folder: folder of results.
        load: returns the detector on a device, "cpu" or "cuda".
        device: the device.
        settings: what the detector's settings must be.
        options: threshold, top_k, classes.
        batch_size: as in a call of the detector.
        threads: of an actor on the CPU.
    """

    folder: str
    load: Callable[[str], Detector]
    device: str
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    batch_size: int | None
    threads: int


class Worker:
    """An actor: loads the model once, and detects on units of images.

    Errors of the model itself, such as those of a device, are raised; the driver then replaces the actor.

    Args:
        job: what to do.
    """

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(min(job.threads, os.cpu_count() or 1))
        self.job = job
        self.detector = job.load(job.device)
        self.postprocessing = self.detector.postprocessing(**job.options)

    def ready(self) -> None:
        """Return once the model is loaded.

        Raises:
            ValueError: it has other weights or settings on this machine than those of the job.
        """
        found, expected = self.detector.settings(self.postprocessing), self.job.settings
        if found != expected:  # here: Ray takes any error of a constructor for the death of the actor
            raise ValueError(f"expected the same weights on all machines, of settings {expected}, got {found}")

    def run(self, unit: Unit) -> dict[str, Any]:
        """Detect on a unit, write its results, and return their counts."""
        keys: list[str] = []

        def sources() -> Iterable[Source]:
            for source in read_unit(unit):
                keys.append(source.key)
                yield source

        outcomes = self.detect(sources())
        return write_results(self.job.folder, unit, keys, outcomes)

    def detect(self, sources: Iterable[Source]) -> list[Detections | Exception]:
        """Detect on images, read and resized in threads ahead of the model; bad ones give a ValueError each."""
        depth = (self.job.batch_size or DEFAULT_BATCH_SIZE) + WORKERS
        prepared = map_in_threads(self._prepare, sources, workers=WORKERS, depth=depth)
        with closing(prepared):
            options = {"batch_size": self.job.batch_size}
            outcomes = [*run_batches(self.detector.model, prepared, self.postprocessing, **options)]
        # of a type that any process can unpickle
        return [ValueError(str(found) or repr(found)) if isinstance(found, Exception) else found for found in outcomes]

    def _prepare(self, source: Source) -> PreparedImage | Exception:
        """Read and resize an image; any error is of this image only, whatever its library raises."""
        if isinstance(source.image, Exception):
            return source.image
        image: str | bytes | None = source.image
        try:
            if image is None:
                image = read(source.key) if is_remote(source.key) else source.key
            return self.detector.prepare(image, source.key, keep=False)
        except OSError as error:
            return error
        except Exception as error:
            return ValueError(f"{source.key}: {error!r}")
