"""Write annotated videos: MP4 with the times of the input, and its audio as it is."""

import io
import warnings
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from conditional_detr.video.frames import Frame, exact
from conditional_detr.video.reading import Video, file_address, import_av

_OPTIONS = {"libx264": {"preset": "veryfast", "crf": "20"}}
_BITS_PER_PIXEL = 0.2  # for encoders without a quality setting of ours
_KEY_FRAME_SECONDS = 2  # also how much of the end is lost if the process is killed
# Fragments, so that the file can be played whenever the process ends; and a header that is written only after the
# first packets, since it then states where audio begins, instead of all times being moved
_MOVFLAGS = "frag_keyframe+delay_moov"
_BT709, _LIMITED_RANGE = 1, 1  # FFmpeg's numbers


class VideoWriter:
    """Write frames to an MP4 file; call :meth:`close` in the end.

    Frames of odd width or height are padded by a pixel, as H.264 stores halved colours.

    Args:
        path: the file; it is replaced.
        video: the input; the audio of a file is copied.
        start: seconds of the input at which the output begins.
        end: seconds of the input at which its audio ends; None: with the input.
        encoder: name of FFmpeg's encoder, checked by :func:`check_encoder`.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, video: Video, *, start: float, end: float | None, encoder: str) -> None:
        av = import_av()
        self._path, self._encoder, self._video, self._end = path, encoder, video, end
        self._start = exact(start)
        # in the unit of the input, the time of the first frame is not rounded
        options = {"movflags": _MOVFLAGS, "movie_timescale": str(video.time_base.denominator)}
        self._output = av.open(file_address(path), "w", format="mp4", options=options)
        self._stream: Any = None
        self._size = (0, 0)
        self._last = -1  # pts of the last frame in the encoder's unit
        self._written: deque[tuple[int, Fraction]] = deque()  # pts and time base of frames in the encoder
        self._input: Any = None
        self._audio: Iterator[Any] = iter(())
        self._next_audio: Any = None

    def write(self, frame: Frame, image: np.ndarray) -> None:
        """Encode an image at the time of its frame, and copy the audio before it.

        Raises:
            OSError: the file cannot be written, or the encoder fails.
            ValueError: the size differs from that of the first frame.
        """
        av = import_av()
        if self._stream is None:
            self._begin(frame, image.shape[:2])
        if image.shape[:2] != self._size:
            (height, width), (first_height, first_width) = image.shape[:2], self._size
            raise ValueError(
                f"{self._video.name}: frame {frame.index}: expected {first_width} x {first_height} pixels as before,"
                f" got {width} x {height}; --no-video detects without writing a video"
            )
        odd = [(0, side % 2) for side in image.shape[:2]]
        image = np.pad(image, [*odd, (0, 0)], mode="edge") if any(right for _, right in odd) else image
        encoded = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", src_color_range="JPEG", dst_color_range="MPEG"
        )
        pts = frame.pts - int(self._start / frame.time_base)
        encoded.time_base = self._stream.codec_context.time_base
        self._last = encoded.pts = max(int(pts * frame.time_base / encoded.time_base), self._last + 1)
        self._written.append((pts, frame.time_base))
        try:
            self._copy_audio(until=pts * frame.time_base)
            self._mux_video(encoded)
        except av.FFmpegError as error:
            raise OSError(f"{self._path}: cannot be written: {error.strerror or error}") from error

    def close(self, *, complete: bool = True) -> None:
        """Write what is left in the encoder, and the rest of the audio.

        Args:
            complete: whether all frames were written; otherwise the audio ends with the last one of them.

        Raises:
            OSError: the file cannot be written.
        """
        av = import_av()
        try:
            if self._stream is not None:
                self._mux_video(None)
                last = self._last * Fraction(self._stream.codec_context.time_base)
                self._copy_audio(until=None if complete else last)
            self._output.close()
        except av.FFmpegError as error:
            raise OSError(f"{self._path}: cannot be written: {error.strerror or error}") from error
        finally:
            if self._input is not None:
                self._input.close()

    def _begin(self, frame: Frame, size: tuple[int, ...]) -> None:
        """Add the streams."""
        self._size = (size[0], size[1])
        rate = Fraction(self._video.rate).limit_denominator(1001)
        stream = self._output.add_stream(self._encoder, rate=rate, options=_OPTIONS.get(self._encoder, {}))
        stream.height, stream.width = (side + side % 2 for side in self._size)
        stream.pix_fmt, stream.time_base = "yuv420p", frame.time_base
        context = stream.codec_context
        # packets get the exact times when they leave the encoder: MPEG-4 refuses units as small as those of MPEG-TS
        context.time_base = Fraction(1, 10_000)
        context.max_b_frames = 0  # packets then leave in the order of the frames
        context.gop_size = max(round(rate * _KEY_FRAME_SECONDS), 1)
        context.colorspace, context.color_range = _BT709, _LIMITED_RANGE
        if self._encoder not in _OPTIONS:
            context.bit_rate = int(stream.height * stream.width * rate * _BITS_PER_PIXEL)
        self._stream = stream
        if self._video.path is not None:
            self._input = import_av().open(file_address(self._video.path))
            self._audio = self._audio_packets()
            self._next_audio = next(self._audio, None)

    def _mux_video(self, frame: Any) -> None:
        """Encode a frame, or None for the end, and write the packets that this gives."""
        for packet in self._stream.encode(frame):
            pts, time_base = self._written.popleft()
            packet.time_base = time_base
            packet.pts = packet.dts = pts
            packet.duration = max(round(1 / (self._video.rate * time_base)), 1)
            self._output.mux(packet)

    def _copy_audio(self, *, until: Fraction | None) -> None:
        """Write the audio packets that begin before a time; None: all."""
        while (packet := self._next_audio) is not None:
            if until is not None and packet.pts * packet.time_base > until:
                return
            self._output.mux(packet)
            self._next_audio = next(self._audio, None)

    def _audio_packets(self) -> Iterator[Any]:
        """Yield the audio packets of the input between the start and the end, at their times in the output."""
        av = import_av()
        copies = {}
        for stream in self._input.streams.audio:
            name = stream.codec_context.name
            if name not in self._output.supported_codecs:
                warnings.warn(f"{self._video.name}: MP4 cannot store audio of {name}; it is left out", stacklevel=4)
                continue
            copy = self._output.add_stream_from_template(stream)
            # MPEG-TS repeats the settings of AAC in each packet, MP4 stores them once
            in_packets = name == "aac" and not stream.codec_context.extradata
            unpack = av.BitStreamFilterContext("aac_adtstoasc", stream) if in_packets else None
            copies[stream.index] = copy, unpack
        return self._packets(copies) if copies else iter(())

    def _packets(self, copies: dict[int, tuple[Any, Any]]) -> Iterator[Any]:
        av = import_av()
        last: dict[int, int] = {}
        try:
            for packet in self._input.demux(*(self._input.streams[index] for index in copies)):
                index = packet.stream.index
                if packet.dts is None or packet.pts is None or packet.dts <= last.get(index, packet.dts - 1):
                    continue  # the end, or a damaged file
                copy, unpack = copies[index]
                last[index] = packet.dts
                seconds = packet.pts * packet.time_base
                if self._start and seconds < self._start:
                    continue
                if self._end is not None and seconds >= self._end:
                    return
                for part in [packet] if unpack is None else unpack.filter(packet):
                    shift = int(self._start / part.time_base)
                    part.pts, part.dts, part.stream = part.pts - shift, part.dts - shift, copy
                    yield part
        except (av.FFmpegError, OSError) as error:
            warnings.warn(f"{self._video.name}: the audio cannot be read to its end: {error}", stacklevel=2)


def check_encoder(name: str) -> None:
    """Raise ValueError unless the installed PyAV has a video encoder of this name whose packets MP4 can store."""
    av = import_av()
    try:
        codec = av.Codec(name, "w")
        with av.open(io.BytesIO(), "w", format="mp4") as output:
            known = codec.type == "video" and codec.canonical_name in output.supported_codecs
    except (av.FFmpegError, ValueError):
        known = False
    if not known:
        expected = "a video encoder of the installed PyAV for MP4, such as libx264"
        raise ValueError(f"encoder: expected {expected}, got {name!r}")
