"""The time limit of a run: which part of it is used, so that the schedule ends with it."""

import time

from conditional_detr.training.first_epoch import IMAGES

_CURVES = 2.0  # seconds, of the plot after the last checkpoint; most of it is the import of matplotlib


class Clock:
    """Seconds of a run, over all processes that resumed it, and the part of its limit that is used.

    The last evaluation, checkpoint and curves have to end within the limit, so steps end earlier, by what the longest
    epoch's end took; before the first one, evaluating an image is taken to cost as much as training on one, and an
    image of the report after the first epoch, which is run forward only, a third of it.

    Args:
        limit: seconds; 0: no limit.
        val_images: number of images of the validation data.
        processes: number of processes that share them.

    Attributes:
        before: seconds of earlier processes of this run.
    """

    def __init__(self, limit: float, val_images: int, processes: int = 1) -> None:
        self.limit, self.before = limit, 0.0
        self._closing_images = val_images / processes + IMAGES / 3
        self._began = time.monotonic()
        self._steps, self._images, self._stepping = -1, 0, 0.0
        self._closing: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return self.before + time.monotonic() - self._began

    def add_step(self, images: int, seconds: float) -> None:
        """Record the number of images and the duration of a step, without the wait for its images.

        The first step does not count: it initialises the device, too, and may take as long as many others.
        """
        self._steps += 1
        if self._steps:
            self._images, self._stepping = self._images + images, self._stepping + seconds

    def add_closing(self, seconds: float) -> None:
        """Record the duration of an epoch's end with an evaluation."""
        self._closing = max(self._closing or 0.0, seconds)

    @property
    def part(self) -> float:
        """The part, in [0, 1], of the time for steps that is used when the next step begins; 1: none fits any more."""
        if not self.limit:
            return 0.0
        available = self.limit - self.closing
        if available <= 0 or self.seconds + self._stepping / max(self._steps, 1) / 2 >= available:
            return 1.0
        return self.seconds / available

    @property
    def closing(self) -> float:
        """Expected seconds of the last evaluation, the last checkpoint and the curves."""
        curves = min(_CURVES, self.limit / 4)
        if self._closing is not None:
            return self._closing + curves
        return self._closing_images * self._stepping / max(self._images, 1) + curves

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation now leaves enough time for the last one."""
        return not self.limit or self.seconds + 2 * self.closing < self.limit
