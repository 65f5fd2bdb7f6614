"""The folder of a training run: what an earlier run left in it, and a lock against a second run at the same time."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conditional_detr.checkpoints.model_card import CURVES
from conditional_detr.checkpoints.saving import files_of
from conditional_detr.system.atomic_files import recover
from conditional_detr.training.checkpoints import BEST, LAST, STATE
from conditional_detr.training.logging import LOG

LOCK = ".conditional_detr.lock"
_PATIENCE = 10.0  # seconds: data workers of a killed process end, and release its lock, within half of it


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raise FileExistsError if a run in this folder would replace files of an earlier one, before touching any.

    Without ``resume``, these are checkpoints, a log with entries, and curves. With it, they are weights without the
    training state that a run resumes from.
    """
    for name in (LAST, BEST):
        recover(folder / name)
    if (folder / LAST / STATE).exists():
        if resume:
            return
        raise FileExistsError(
            f"{folder}: expected a folder without a checkpoint, got one with the checkpoint of a run; resume that"
            " run, or use another folder"
        )
    weights = [path for name in (BEST, LAST) for path in files_of(folder / name, "published")]
    found = [path for path in weights if path.exists()]
    if not resume:
        found += [path for path in (folder / LOG, folder / CURVES) if path.exists() and path.stat().st_size]
    if found:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise FileExistsError(
            f"{folder}: expected a folder without files of a run, got {names} without {LAST}/{STATE} to resume from;"
            " use another folder, or move these files"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder while the context is active.

    Raises:
        OSError: another process trains in it; the message has its id and host.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout as error:
        holder = path.read_text(encoding="utf-8") or "another process"
        raise OSError(f"{folder}: expected a folder that no run is using, got one that {holder} trains in") from error
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()
