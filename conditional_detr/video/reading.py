"""Read the frames of video files, cameras, network streams and folders of images."""

import re
import sys
import warnings
from collections.abc import Generator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import numpy as np

from conditional_detr.inference.images import open_image, to_pil
from conditional_detr.inference.listing import list_images
from conditional_detr.system.paths import expand_home
from conditional_detr.video.frames import Frame, Selection, exact
from conditional_detr.video.timing import StageTimes

VideoSource: TypeAlias = str | Path | int
"""A video file, a folder of images, a URL, or a camera: its number or its device such as ``/dev/video0``."""

FOLDER_RATE = Fraction(30)
"""Frames per second of a folder of images, which have no times."""

_TIMEOUT = 10.0  # seconds without data after which a network stream has ended
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LIVE = ("rtsp", "rtmp", "udp")
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}  # FFmpeg's input and device names


class Video:
    """An open video; use it as a context manager, or call :meth:`close` in the end.

    Args:
        source: the video.

    Attributes:
        name: the source for messages and results, without the password of a URL.
        path: path of a video file; None for other sources.
        is_live: whether frames that are not read in time are lost: a camera or an RTSP, RTMP or UDP stream.
        time_base: unit of the frames' times in seconds.
        rate: frames per second as the video states it, which need not hold for every frame.
        frame_count: number of frames as the video states it; None if it does not.

    Raises:
        ImportError: PyAV is not installed.
        OSError: the source does not exist or cannot be opened.
        ValueError: a file that is no video, or a folder without images.
    """

    def __init__(self, source: VideoSource) -> None:
        self._folder: list[str] | None = None
        self._container: Any = None
        text = re.sub(r"^file:(//(?=/))?", "", str(source))
        is_file = text != str(source)
        if not text:
            raise ValueError("source: expected a video, got an empty name")
        self.name = re.sub(r"(?<=://)[^/?#]*@", "", text)
        is_url = not is_file and _URL.match(text) is not None
        camera = text.startswith("/dev/video") or (text.isdigit() and not Path(text).exists())
        self.is_live = (camera and not is_file) or (is_url and self._scheme(text) in _LIVE)
        self.path = None if is_url or self.is_live else expand_home(text)
        self.frame_count: int | None
        if self.path is not None and self.path.is_dir():
            listed = list_images([str(self.path)], output=self.path).images
            self._folder, self.path = sorted((entry.image for entry in listed), key=_natural_order), None
            self.rate, self.time_base, self.frame_count = FOLDER_RATE, 1 / FOLDER_RATE, len(listed)
            return
        if self.path is not None and not self.path.is_file():
            raise FileNotFoundError(f"{self.name}: no such file")
        address = text if self.path is None else file_address(self.path)
        self._container = self._open(camera_input(text) if self.is_live and not is_url else (None, address))
        if not self._container.streams.video:
            self._container.close()
            raise ValueError(f"{self.name}: expected a video, got a file that has none or is cut off")
        self._stream = self._container.streams.video[0]
        if not self.is_live:
            self._stream.thread_type = "AUTO"  # threads that each decode a frame would delay a live source
        self.rate = self._stream.average_rate or self._stream.guessed_rate or FOLDER_RATE
        self.time_base = self._stream.time_base
        self.frame_count = self._stream.frames or None

    def _scheme(self, text: str) -> str:
        try:
            return urlsplit(text).scheme
        except ValueError as error:
            raise ValueError(f"{self.name}: expected a URL: {error}") from error

    def _open(self, target: tuple[str | None, str]) -> Any:
        av = import_av()
        format, file = target
        try:
            return av.open(file, format=format, timeout=_TIMEOUT if self.path is None else None)
        except av.error.InvalidDataError as error:
            raise ValueError(f"{self.name}: expected a video, got a file that is damaged or no video") from error
        except (av.FFmpegError, OSError) as error:
            raise OSError(f"{self.name}: the video cannot be opened: {_reason(error)}") from error

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file or connection."""
        if self._container is not None:
            self._container.close()

    def frames(self, selection: Selection, times: StageTimes) -> Generator[Frame, None, None]:
        """Yield the selected frames; call it once.

        Frames that cannot be decoded are reported by warnings.

        Args:
            selection: which frames.
            times: takes the time of decoding each frame.

        Raises:
            OSError: a stream that ends before its first frame, or an image of a folder that cannot be read.
            ValueError: a damaged image of a folder, or a video without a single frame.
        """
        decoded = self._images(times) if self._folder is not None else self._decode(times)
        last_slot = index = -1
        start, end = exact(selection.start), None if selection.end is None else exact(selection.end)
        with closing(decoded):
            for index, (pts, time_base, frame) in enumerate(decoded):
                seconds = pts * time_base
                if end is not None and seconds >= end:
                    return
                if index % selection.every or seconds < start:
                    continue
                if selection.fps is not None:
                    slot = int(seconds * exact(selection.fps))
                    if slot == last_slot:
                        continue
                    last_slot = slot
                with times.measure("decode", also_last=True):
                    image = frame if isinstance(frame, np.ndarray) else _to_rgb(frame)
                yield Frame(index, pts, time_base, image)
        if index < 0:
            raise ValueError(f"{self.name}: expected a video, got one without a frame that can be decoded")

    def _images(self, times: StageTimes) -> Generator[tuple[int, Fraction, Any], None, None]:
        """Yield pts, time base and RGB values of the images of a folder."""
        for index, image in enumerate(self._folder or ()):
            with times.measure("decode"):
                values = np.asarray(to_pil(open_image(image, image)))
            yield index, 1 / FOLDER_RATE, values

    def _decode(self, times: StageTimes) -> Generator[tuple[int, Fraction, Any], None, None]:
        """Yield pts, time base and the decoded frame, each with a later pts than the one before."""
        av = import_av()
        time_base = self._stream.time_base
        step = max(int(1 / (self.rate * time_base)), 1)
        index, last, packets_read, problem = 0, -step, 0, ""
        packets = self._container.demux(self._stream)
        while not problem:
            try:
                packet = next(packets)
            except StopIteration:
                if packets_read < (stated := self._stated_packets()):
                    self._warn(index - 1, f"the file states {stated} frames, and has {packets_read}")
                if self.is_live:
                    self._warn(index - 1, "the stream has ended")
                return
            except (av.FFmpegError, OSError) as error:
                problem = f"reading stopped: {_reason(error)}"
                packet = av.Packet()  # an empty one gives the frames that wait in the decoder, as at the end of a file
                packet.stream = self._stream
            if not packets_read and packet.size and not packet.is_keyframe and not self.is_live:
                self._warn(-1, "no key frame at the beginning; frames until the first one are missing or damaged")
            packets_read += bool(packet.size)
            try:
                with times.measure("decode"):
                    frames = packet.decode()
            except av.FFmpegError as error:
                self._warn(index - 1, f"a part cannot be decoded: {error.strerror or error}")
                continue
            for frame in frames:
                if frame.is_corrupt:
                    self._warn(index, "the frame is damaged")
                pts = frame.pts
                if pts is None or (index and pts <= last):
                    if pts is not None:
                        self._warn(index, f"its time is not after the one before; {last + step} is used")
                    pts = last + step
                yield pts, time_base, frame
                index, last = index + 1, pts
        if not index:
            raise OSError(f"{self.name}: before the first frame: {problem}")
        self._warn(index - 1, problem)

    def _stated_packets(self) -> int:
        """Return how many packets an MP4 states, without those that its edit list leaves out; 0 of another file.

        Matroska and MPEG-TS state no number, and AVI one of units of time.
        """
        if "mp4" not in self._container.format.name:
            return 0
        return min(self._stream.frames, len(self._stream.index_entries))

    def _warn(self, index: int, problem: str) -> None:
        place = f"frame {index}" if index >= 0 else "before the first frame"
        warnings.warn(f"{self.name}: {place}: {problem}", stacklevel=3)


def camera_input(text: str) -> tuple[str, str]:
    """Return FFmpeg's input format and device of a camera, given as a number or a device.

    Raises:
        ValueError: this system's cameras are not supported.
    """
    if sys.platform not in _CAMERAS:
        raise ValueError(f"camera {text}: expected Linux or macOS, got {sys.platform}; pass a file or a URL")
    format, device = _CAMERAS[sys.platform]
    return format, device.format(text) if text.isdigit() else text


def file_address(path: Path) -> str:
    """Return a path as FFmpeg opens it, which takes what stands before a colon for a protocol."""
    return f"file:{path}"


def import_av() -> Any:
    """Import PyAV; raise ImportError that names the extra if it is missing."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need av, which is not installed: pip install 'conditional-detr[video]'") from error
    return av


def _reason(error: Any) -> str:
    """Return what FFmpeg says, but for a time-out, of which it says that the caller wanted to stop."""
    return (
        f"no data for {_TIMEOUT:g} s"
        if isinstance(error, import_av().error.ExitError)
        else str(error.strerror or error)
    )


def _natural_order(path: str) -> list[tuple[int, str]]:
    """Return a key by which frame2 comes before frame10."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"([0-9]+)", path)]


def _to_rgb(frame: Any) -> np.ndarray:
    """Return a decoded frame as RGB (H, W, 3), upright: PyAV states the rotation and leaves it to the caller."""
    image: np.ndarray = frame.to_ndarray(format="rgb24", dst_color_range="JPEG")
    turns = round(frame.rotation / 90) % 4  # counterclockwise, as numpy's
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image
