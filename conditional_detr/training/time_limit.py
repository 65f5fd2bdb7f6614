"""The time limit of a run: which part of it is used, so that the schedule ends with it."""

import time


class Clock:
    """Seconds of a run, over all processes that resumed it, and the part of its limit that is used.

    The last evaluation and checkpoint have to end within the limit, so steps end earlier, by what the longest epoch's
    end took; before the first one, evaluating an image is taken to cost as much as training on one.

    Args:
        limit: seconds; 0: no limit.
        val_images: number of images of the validation data.

    Attributes:
        before: seconds of earlier processes of this run.
    """

    def __init__(self, limit: float, val_images: int) -> None:
        self.limit, self.before = limit, 0.0
        self._val_images = val_images
        self._began = time.monotonic()
        self._steps, self._images, self._stepping = 0, 0, 0.0
        self._closing: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return self.before + time.monotonic() - self._began

    def add_step(self, images: int, seconds: float) -> None:
        """Record the number of images and the duration of a step, without the wait for its images."""
        self._steps, self._images, self._stepping = self._steps + 1, self._images + images, self._stepping + seconds

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
        """Expected seconds of the last evaluation and checkpoint."""
        if self._closing is not None:
            return self._closing
        return self._val_images * self._stepping / max(self._images, 1)

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation now leaves enough time for the last one."""
        return not self.limit or self.seconds + 2 * self.closing < self.limit
