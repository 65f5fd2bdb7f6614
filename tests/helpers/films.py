"""Films of shapes that move over a textured background, with the box of each shape in each frame."""

import json
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image, ImageDraw

from conditional_detr.data.synthetic import CLASS_NAMES

SIZE = (192, 256)
TIME_BASE = Fraction(1, 600)
RATE = 44_100
SAMPLES = 1024  # of audio in a packet of AAC


class Shape(NamedTuple):
    name: str
    colour: tuple[int, int, int]
    radius: int
    y: int  # centre
    x: float  # centre in the first frame
    speed: float  # pixels per frame, to the right


SHAPES = (
    Shape("disc", (230, 60, 40), 22, 32, 30, 3.0),
    Shape("square", (60, 120, 240), 20, 96, 220, -2.5),
    Shape("ring", (240, 210, 60), 24, 160, 60, 1.5),
)


def box_of(shape: Shape, index: int) -> tuple[float, float, float, float]:
    x = shape.x + shape.speed * index
    return x - shape.radius, shape.y - shape.radius, x + shape.radius, shape.y + shape.radius


def draw_frame(index: int, size=SIZE, shapes=SHAPES) -> np.ndarray:
    """Return (H, W, 3) uint8, with a white square in the top left corner that shows how the frame is turned."""
    y, x = np.mgrid[: size[0], : size[1]]
    grey = 70 + 12 * np.sin(x / 17) + 12 * np.cos(y / 23)
    image = Image.fromarray(np.stack([grey, grey + 8, grey + 16], -1).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    for shape in shapes:
        box = box_of(shape, index)
        if shape.name == "disc":
            canvas.ellipse(box, fill=shape.colour)
        elif shape.name == "square":
            canvas.rectangle(box, fill=shape.colour)
        else:
            canvas.ellipse(box, outline=shape.colour, width=8)
    canvas.rectangle((0, 0, 11, 11), fill="white")
    return np.asarray(image)


def labels_of(shapes=SHAPES) -> list[int]:
    return [CLASS_NAMES.index(shape.name) for shape in shapes]


def pts_of(frames: int, *, variable: bool) -> list[int]:
    """Times in units of TIME_BASE: 30 frames per second, or gaps of 10, 20 and 40 units in turn."""
    gaps = [(10, 20, 40)[i % 3] if variable else 20 for i in range(frames)]
    return [sum(gaps[:i]) for i in range(frames)]


def write_film(
    path: Path,
    frames: int = 20,
    *,
    variable=False,
    rotation=0,
    audio="aac",
    codec="libx264",
    pixels="yuv420p",
    size=SIZE,
    b_frames=2,
    gop=12,
    time_base=TIME_BASE,
    first=0,
    options=None,
) -> Path:
    """Draw and encode a film; B-frames, so that its packets are not in the order of its frames."""
    with av.open(str(path), "w", options=options or {}) as output:
        stream = output.add_stream(codec, rate=30)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *size, pixels, gop
        stream.time_base = stream.codec_context.time_base = time_base
        if codec == "libx264":
            stream.codec_context.max_b_frames = b_frames
            stream.options = {"crf": "12", "preset": "ultrafast", "bf": str(b_frames), "colorspace": "bt709"}
            stream.codec_context.colorspace = stream.codec_context.color_range = 1
        else:
            stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        sound = output.add_stream(audio, rate=RATE, layout="mono") if audio else None
        for index, pts in enumerate(pts_of(frames, variable=variable)):
            frame = av.VideoFrame.from_ndarray(draw_frame(index, size), format="rgb24").reformat(
                format=pixels, dst_colorspace="ITU709", src_color_range="JPEG", dst_color_range="MPEG"
            )
            frame.pts, frame.time_base = int((first + pts) * TIME_BASE / time_base), time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        for start in range(0, round(RATE * frames / 30), SAMPLES) if sound else ():
            tone = np.sin(np.arange(start, start + SAMPLES) / 20 + start**0.5).astype(np.float32)[None] / 4
            values, kind = (tone, "fltp") if audio == "aac" else ((tone * 99 + 128).astype(np.uint8), "u8")
            heard = av.AudioFrame.from_ndarray(values, format=kind, layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = RATE, start, Fraction(1, RATE)
            output.mux(sound.encode(heard))
        if sound:
            output.mux(sound.encode(None))
    return path


def times_of(path: Path) -> list[Fraction]:
    """Return the time of each frame, as PyAV reads them."""
    with av.open(str(path)) as film:
        return [frame.pts * frame.time_base for frame in film.decode(video=0)]


def images_of(path: Path) -> list[np.ndarray]:
    """Return the frames as PyAV decodes them, not turned."""
    with av.open(str(path)) as film:
        return [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]


def audio_of(path: Path) -> list[tuple[Fraction, bytes]]:
    """Return time and bytes of the audio packets."""
    with av.open(str(path)) as film:
        return [(packet.pts * packet.time_base, bytes(packet)) for packet in film.demux(audio=0) if packet.size]


def lines_of(folder: Path) -> list[dict]:
    """Return the lines of a folder of results."""
    return [json.loads(line) for line in (folder / "detections.jsonl").read_text().splitlines()]
