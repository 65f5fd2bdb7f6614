"""Bulk detection on a Ray cluster: any number of images, on one machine or many, into Parquet files.

The images are split into *units*: 128 image files, the row group of a Parquet file, or a WebDataset shard. A unit has
one file of results, which is named by a digest of the names in the unit and appears complete::

    results/
      _manifest.json              settings, inputs, number of units; written when the plan is complete
      _plan.parquet               the units, as listed at the start of the job
      part=3f/3f91...c0.parquet   results of a unit, a row for each image

A unit is done when its file is there. So whatever is killed, a job that is resumed does the units of the plan that
have no file, and a unit that is done twice has the same file: each image has one row.

The *driver*, which calls :func:`detect_dataset`, lists the units, hands them to *actors* one by one, and counts what
they report. An actor loads the model once; it reads, detects and writes. A bad image is a row with its error. If an
actor dies, the driver starts another. A unit that has ended two actors is done image by image, and an image that ends
two more is a row with an error, too: one image that crashes a library or a device stops nothing. Many in a row end the
job, as there is something wrong with the machines.

Modules: ``storage`` opens files by path or URI; ``units`` lists and reads inputs; ``results`` has the folder;
``worker`` is the actor; ``pool`` is the driver's loop.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conditional_detr.distributed.pool import BulkResult, Pool
from conditional_detr.distributed.results import create
from conditional_detr.distributed.units import absolute_input, list_units
from conditional_detr.distributed.worker import Job
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.postprocessing import check_count
from conditional_detr.inference.result_writers import release
from conditional_detr.inference.results import lock_folder
from conditional_detr.system.atomic_files import remove_unfinished
from conditional_detr.system.storage import absolute, is_remote


def detect_dataset(
    dataset: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    load: Callable[[str], Detector],
    *,
    threshold: float | None = None,
    top_k: int = 100,
    classes: Sequence[str | int] | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    unit_size: int = 128,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> BulkResult:
    """Detect objects on any number of images on a Ray cluster, and write the detections as Parquet files.

    A job that is killed is repeated with ``resume``, and goes on. An image that cannot be read has a row with
    ``error``. Uses the cluster that this process is connected to, or that ``RAY_ADDRESS`` names; else it starts Ray
    on this machine.

    Args:
        dataset: image files, folders (with all folders below), globs, Parquet files with a column of images, and
            WebDataset shards, by paths that all machines have, or URIs such as ``s3://bucket/folder``. Results
            have absolute paths.
        output: folder of results, by path or URI.
        load: loads the detector on "cpu" or "cuda"; called here, on the CPU, and once in each actor. Ray sends it to
            other machines, so it is a function of a module, or a ``functools.partial`` of one.
        threshold: as in a call of the detector.
        top_k: as in a call of the detector.
        classes: as in a call of the detector.
        batch_size: as in a call of the detector.
        workers: number of actors, each with a copy of the model; more than GPUs share them. Default: one for each
            GPU of the cluster, or CPU core.
        device: "cpu" or "cuda". Default: "cuda" if the cluster has GPUs.
        unit_size: largest number of image files whose results are one file.
        resume: go on with the job in ``output``, if there is one.
        overwrite: replace the results in ``output``.
        on_progress: called with the number of finished units, and of all.

    Raises:
        ImportError: Ray or the package of a file system is not installed.
        OSError: a folder cannot be listed or written, another job on this machine writes to it, Ray cannot be started
            or connected to, the model cannot be loaded on it, or fails on many units and images in a row.
        ValueError: no image, other weights in an actor than here, an argument out of range, or results in ``output``
            that may not be replaced or are of another job.
    """
    ray = _import_ray()
    for name, number in (("workers", workers), ("unit_size", unit_size), ("batch_size", batch_size)):
        if number is not None:
            check_count(name, number)
    if resume and overwrite:
        raise ValueError("expected resume or overwrite, got both")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    given = [os.fspath(name) for name in ([dataset] if isinstance(dataset, str | os.PathLike) else dataset)]
    if not given or "" in given:
        raise ValueError(f"dataset: expected files, folders, shards or URIs, got {given}")
    inputs, output = [*map(absolute_input, given)], absolute(os.fspath(output))
    options: dict[str, Any] = {"threshold": threshold, "top_k": top_k, "classes": classes}
    detector = load("cpu")
    settings = detector.settings(detector.postprocessing(**options))
    del detector
    header = {"settings": settings, "inputs": inputs, "unit_size": unit_size}
    with _locked(output):
        units = list_units(inputs, output=output, size=unit_size)
        count = create(output, units, header, resume=resume, overwrite=overwrite)
        with _connected(ray):
            device, workers, resources = _share(ray.cluster_resources(), device, workers)
            threads = max(int(ray.cluster_resources().get("CPU", 1) / workers), 1)
            job = Job(output, load, device, settings, options, batch_size, threads)
            return Pool(job, count, workers, resources, on_progress).run()


def _import_ray() -> Any:
    try:
        import pyarrow  # noqa: F401
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"bulk detection needs {error.name}, which is not installed: pip install 'conditional-detr[ray]'"
        ) from error
    return ray


@contextmanager
def _locked(output: str) -> Iterator[None]:
    """Keep other jobs of this machine from a folder of results; do nothing for one in an object store."""
    if is_remote(output):
        yield
        return
    folder = Path(output)
    lock = lock_folder(folder)
    try:
        for part in (folder, *folder.glob("part=*")):
            remove_unfinished(part)  # of actors that were killed
        yield
    finally:
        release(lock)


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Connect to Ray, unless this process is connected."""
    if ray.is_initialized():
        yield
        return
    # not the address that Ray finds itself: a cluster whose processes were killed leaves its own behind
    address = os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except Exception as error:  # of any type; a start that takes too long is a plain Exception
        raise OSError(f"Ray: cannot be connected to or started: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _share(cluster: Mapping[str, float], device: str | None, workers: int | None) -> tuple[str, int, dict[str, Any]]:
    """Return the device of the actors, their number, and the options of each by Ray's names.

    Args:
        cluster: resources of the cluster by Ray's names.
        device: as asked for.
        workers: as asked for.
    """
    cpus, there = cluster.get("CPU", 1.0), cluster.get("GPU", 0.0)
    device = device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        raise ValueError("device: expected cpu on a cluster without GPUs, got cuda")
    workers = workers or max(int(there if device == "cuda" else cpus), 1)
    resources: dict[str, Any] = {
        "num_cpus": min(int(100 * cpus / workers) / 100, 1.0),
        "scheduling_strategy": "SPREAD",
    }
    if device == "cuda":
        resources["num_gpus"] = 1 / math.ceil(workers / there)
    return device, workers, resources
