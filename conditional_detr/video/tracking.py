"""Follow objects over frames by ByteTrack, and count them at lines and in zones."""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from conditional_detr.inference.detections import Detections
from conditional_detr.inference.drawing import class_colour, draw_boxes, load_font

Line: TypeAlias = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels."""
Zone: TypeAlias = Sequence[tuple[float, float]]
"""Corners x, y of a polygon in pixels."""

_TRAIL = 30  # positions that are drawn of each track
_KEPT_SECONDS = 1.0  # that a track is continued after it was last detected
_FIRST_SCORE = 0.5  # a track begins with at least this score, if the threshold is lower
_FURTHEST = 16_384  # pixels of a point from the top left corner; counting in a zone needs memory for its pixels
_MARK = (255, 220, 0)  # colour of lines and zones


class Crossings(NamedTuple):
    """Tracks that have crossed a line so far.

    Attributes:
        left: from its right to its left, as seen from its first to its second point with y downwards.
        right: from its left to its right.
    """

    left: int
    right: int


class Tracked(NamedTuple):
    """Tracks on a frame.

    Attributes:
        ids: the track of each detection; None before a track is confirmed by a second frame.
        trails: the latest centres of each detection's track in pixels, the newest last.
        lines: crossings of each line so far.
        zones: number of detections that are now in each zone, by their centres.
    """

    ids: list[int | None]
    trails: list[list[tuple[float, float]]]
    lines: list[Crossings]
    zones: list[int]


class Tracker:
    """Give the detections of consecutive frames track ids.

    Args:
        rate: frames per second, at which the motion of tracks is estimated.
        lines: lines at which crossings are counted.
        zones: polygons in which detections are counted.

    Raises:
        ImportError: the packages of the extra "video" are not installed.
        ValueError: a point that lies too far away, or too few different ones.
    """

    def __init__(self, rate: float, *, lines: Sequence[Line] = (), zones: Sequence[Zone] = ()) -> None:
        try:
            import supervision
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise ImportError(
                f"tracking needs {error.name}, which is not installed: pip install 'conditional-detr[video]'"
            ) from error
        for x0, y0, x1, y1 in lines:
            _check_points("line", [(x0, y0), (x1, y1)], 2)
        corners = [np.array(zone, dtype=np.float64).reshape(-1, 2) for zone in zones]
        for zone in corners:
            _check_points("zone", zone.round().tolist(), 3)
            if zone.max(axis=0).min() < 0:
                raise ValueError(f"zone: expected one that reaches into the image, got {zone.tolist()}")
        self._lines, self._zones = lines, zones
        centre = [supervision.Position.CENTER]
        self._line_counters = [
            supervision.LineZone(supervision.Point(x0, y0), supervision.Point(x1, y1), triggering_anchors=centre)
            for x0, y0, x1, y1 in lines
        ]
        self._zone_counters = [
            supervision.PolygonZone(zone.round().astype(np.int64), triggering_anchors=centre) for zone in corners
        ]
        self._tracker = ByteTrackTracker(
            lost_track_buffer=round(30 * _KEPT_SECONDS),  # in frames of 1/30 s
            frame_rate=rate,
            track_activation_threshold=_FIRST_SCORE,
            high_conf_det_threshold=_FIRST_SCORE,
        )
        self._trails: dict[int, deque[tuple[float, float]]] = {}
        self._seen: dict[int, float] = {}  # time

    def update(self, detections: Detections, time: float) -> Tracked:
        """Return the tracks on the next frame.

        Args:
            detections: the detections on the frame.
            time: its time in seconds, later than that of the frame before.
        """
        given: Any = detections.to_supervision()
        given.data["row"] = np.arange(len(detections))
        tracked = self._tracker.update(given, timestamp=time)
        ids: list[int | None] = [None] * len(detections)
        if len(tracked):
            for row, track in zip(tracked.data["row"].tolist(), tracked.tracker_id.tolist(), strict=True):
                ids[row] = track if track >= 0 else None
        given.tracker_id = np.array([-1 if track is None else track for track in ids], dtype=int)
        for counter in self._line_counters:
            counter.trigger(given)
        for zone in self._zone_counters:
            zone.trigger(given)
        trails = self._follow(ids, detections, time)
        lines = [Crossings(counter.in_count, counter.out_count) for counter in self._line_counters]
        return Tracked(ids, trails, lines, [int(zone.current_count) for zone in self._zone_counters])

    def _follow(self, ids: list[int | None], detections: Detections, time: float) -> list[list[tuple[float, float]]]:
        """Add the centres to the trails, forget tracks that have ended, and return the trail of each detection."""
        for track, (x0, y0, x1, y1) in zip(ids, detections.boxes.tolist(), strict=True):
            if track is not None:
                self._trails.setdefault(track, deque(maxlen=_TRAIL)).append(((x0 + x1) / 2, (y0 + y1) / 2))
                self._seen[track] = time
        for track in [track for track, seen in self._seen.items() if time - seen > _KEPT_SECONDS]:
            del self._trails[track], self._seen[track]
        return [[] if track is None else list(self._trails[track]) for track in ids]

    def draw(self, image: Image.Image, detections: Detections, tracked: Tracked, *, font: Any = None) -> Image.Image:
        """Return an image with trails, lines, zones and their counts, and boxes with class names and track ids."""
        drawn = image.copy()
        canvas = ImageDraw.Draw(drawn)
        width = max(round((image.width * image.height) ** 0.5 / 300), 1)
        for label, trail in zip(detections.labels.tolist(), tracked.trails, strict=True):
            if len(trail) > 1:
                canvas.line(trail, class_colour(label), width)
        text = load_font(font)(max(round((image.width * image.height) ** 0.5 / 40), 11))
        for (x0, y0, x1, y1), count in zip(self._lines, tracked.lines, strict=True):
            canvas.line((x0, y0, x1, y1), _MARK, width)
            canvas.text((x0, y0), f"{count.left} / {count.right}", _MARK, text, stroke_width=1, stroke_fill="black")
        for zone, inside in zip(self._zones, tracked.zones, strict=True):
            canvas.polygon([(x, y) for x, y in zone], outline=_MARK, width=width)
            canvas.text(zone[0], str(inside), _MARK, text, stroke_width=1, stroke_fill="black")
        names = [
            name if track is None else f"{name} #{track}"
            for name, track in zip(detections.names, tracked.ids, strict=True)
        ]
        boxes, labels = detections.boxes.tolist(), detections.labels.tolist()
        return draw_boxes(drawn, boxes, labels, names, detections.scores.tolist(), font=font)


def _check_points(name: str, points: Sequence[Sequence[float]], least: int) -> None:
    """Raise ValueError unless the points are on an image and enough of them differ."""
    far = [number for point in points for number in point if not abs(number) <= _FURTHEST]
    if far:
        raise ValueError(f"{name}: expected points of at most {_FURTHEST} pixels, got {far[0]:g}")
    if len({tuple(point) for point in points}) < least:
        got = ", ".join(f"{x:g},{y:g}" for x, y in points)
        raise ValueError(f"{name}: expected at least {least} different points, got {got}")
