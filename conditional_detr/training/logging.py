"""Logs of a training run: progress bar and lines on stderr, a JSON Lines file, TensorBoard, curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from conditional_detr.checkpoints.model_card import CURVES
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.console import PlainConsole
from conditional_detr.system.progress import progress_bar
from conditional_detr.training.curves import plot_curves, read_log
from conditional_detr.training.trackers import Trackers

LOG = "log.jsonl"


class RunLogger:
    """Context manager that logs every step and epoch.

    ``log.jsonl`` has a line a step, with step, epoch, loss, class, l1, giou, norm and lr, and a line an epoch, with
    its evaluation; ``tensorboard`` has the same numbers. ``curves.png`` is plotted on exit, also after Ctrl-C.

    Args:
        folder: the folder of the run.
        step: number of completed steps; log entries of later steps, which a killed process left, are removed.
        epoch: number of completed epochs.
        total: number of steps of the whole run; None: unknown.
        trackers: get the same numbers while they run.
        shown: whether to write to stderr; the bar is shown on a terminal only.
    """

    def __init__(
        self, folder: Path, *, step: int, epoch: int, total: int | None, trackers: Trackers, shown: bool
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self._trackers = folder, trackers
        folder.mkdir(parents=True, exist_ok=True)
        _truncate(folder / LOG, step, epoch)
        self._log = (folder / LOG).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        self._console = PlainConsole(stderr=True, soft_wrap=True, highlight=False, quiet=not shown)
        self._bar = progress_bar(self._console, shown=shown)
        self._task = self._bar.add_task("training", total=total, completed=step)

    def __enter__(self) -> "RunLogger":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._log.close()
        self._board.close()
        if kind is None or issubclass(kind, KeyboardInterrupt):
            plot_curves(self.folder / LOG, self.folder / CURVES)

    def log_step(self, entry: Mapping[str, Any]) -> None:
        """Log a step and update the progress bar."""
        self._write(entry, "train")
        losses = "  ".join(f"{name} {entry[name]:.3f}" for name in ("loss", "class", "l1", "giou"))
        self._bar.update(self._task, completed=entry["step"], description=f"epoch {entry['epoch'] + 1}  {losses}")

    def log_epoch(self, entry: Mapping[str, Any], *, epochs: int | None, best: float | None) -> None:
        """Log an epoch and print a summary line."""
        self._write(entry, "val")
        of = "" if epochs is None else f"/{epochs}"
        ap = f"  AP {entry['AP']:.3f}  AP50 {entry['AP50']:.3f}  best {best:.3f}" if "AP" in entry else ""
        loss = f"  val loss {entry['val_loss']:.3f}" if "val_loss" in entry else ""
        self.report(
            f"epoch {entry['epoch'] + 1}{of}  step {entry['step']}  mean loss {entry['mean_loss']:.3f}{loss}{ap}"
            f"  {entry['seconds']:.0f} s, {entry['waited']:.0f} s of it waiting for images"
        )

    def log_images(self, images: Sequence[Image.Image], step: int) -> None:
        """Show images in TensorBoard, as val/images/0 and so on."""
        for i, image in enumerate(images):
            self._board.add_image(f"val/images/{i}", np.asarray(image), step, dataformats="HWC")

    def report(self, text: str) -> None:
        """Print text above the progress bar."""
        for line in text.splitlines():
            self._console.print(line)

    def _write(self, entry: Mapping[str, Any], kind: str) -> None:
        """Append an entry to the log, to TensorBoard and to the trackers."""
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()
        for name, value in entry.items():
            if isinstance(value, Mapping):
                for part, of_part in value.items():
                    self._board.add_scalar(f"{kind}/{name}/{part}", of_part, entry["step"])
            elif name not in ("step", "epoch"):
                self._board.add_scalar(f"{kind}/{name}", value, entry["step"])
        self._trackers.log(entry, kind)


def _truncate(log: Path, step: int, epoch: int) -> None:
    """Remove the log entries that are later than a checkpoint."""
    if not log.exists():
        return
    kept = [entry for entry in read_log(log) if entry["step"] <= step and ("loss" in entry or entry["epoch"] < epoch)]
    text = "".join(json.dumps(entry) + "\n" for entry in kept)
    write_atomically({log: lambda path: path.write_text(text, encoding="utf-8")})
