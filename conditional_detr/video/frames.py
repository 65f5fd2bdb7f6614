"""Frames, and which frames of a video are used."""

from dataclasses import dataclass
from fractions import Fraction
from numbers import Real

import numpy as np

from conditional_detr.inference.postprocessing import check_count


@dataclass(frozen=True, eq=False, slots=True)
class Frame:
    """A frame of a video.

    Attributes:
        index: its position in the video, from 0, also when frames before it are left out.
        pts: its presentation time in units of ``time_base``.
        time_base: the unit in seconds.
        image: (H, W, 3) uint8 RGB, turned upright as the video asks for.
    """

    index: int
    pts: int
    time_base: Fraction
    image: np.ndarray

    @property
    def time(self) -> float:
        """Presentation time in seconds."""
        return float(self.pts * self.time_base)


@dataclass(frozen=True)
class Selection:
    """Which frames of a video are used.

    Attributes:
        every: each frame whose index is a multiple of this.
        fps: of these, at most so many per second: the first in each interval of 1 / fps seconds; None: all.
        start: from this time in seconds on.
        end: before this time in seconds; None: to the end.

    Raises:
        TypeError: a time or rate is no number.
        ValueError: a number is out of range.
    """

    every: int = 1
    fps: float | None = None
    start: float = 0.0
    end: float | None = None

    def __post_init__(self) -> None:
        check_count("every", self.every)
        for name, value in (("fps", self.fps), ("start", self.start), ("end", self.end)):
            optional = value is None and name != "start"
            if not optional and (isinstance(value, bool) or not isinstance(value, Real)):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps: expected a number above 0, got {self.fps}")
        if not 0 <= self.start < float("inf"):
            raise ValueError(f"start: expected at least 0 seconds, got {self.start}")
        if self.end is not None and not self.start < self.end < float("inf"):
            raise ValueError(f"end: expected seconds after the start, {self.start}, got {self.end}")

    def count(self, frame_count: int | None, video_rate: Fraction) -> int | None:
        """Return how many frames of a video are used, by the numbers that it states; None if it states none."""
        if not frame_count:
            return None
        seconds = float(frame_count / video_rate)
        used = max(min(seconds, seconds if self.end is None else self.end) - self.start, 0.0)
        rate = float(video_rate) / self.every
        return round(used * (rate if self.fps is None else min(self.fps, rate)))


def exact(number: float) -> Fraction:
    """Return the decimal fraction that is meant: 0.2 as a float is a bit more than frame 6 of 30 per second."""
    return Fraction(float(number)).limit_denominator(1_000_000)
