"""Frames, times, rotation and detections of ``detect_video``, against the drawn film and PyAV's own decoding."""

import itertools
import re
import socket
import struct
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from conditional_detr.inference.images import open_image
from conditional_detr.video import detect_video
from conditional_detr.video.detection import _forward_ends
from conditional_detr.video.frames import Selection
from conditional_detr.video.live import NewestItem
from conditional_detr.video.reading import Video, camera_input
from conditional_detr.video.timing import StageTimes
from helpers.films import TIME_BASE, draw_frame, images_of, pts_of, write_film

OPTIONS = {"threshold": 0.0, "top_k": 5}
KINDS = {
    "mp4": {},
    "no B-frames": {"b_frames": 0},
    "variable": {"variable": True},
    "mkv": {"suffix": ".mkv"},
    "mpeg-ts": {"suffix": ".ts"},
    "mpeg4": {"codec": "mpeg4"},
    "10 bit": {"codec": "libx265", "pixels": "yuv420p10le"},
}


def film_of(folder, *, suffix=".mp4", **options):
    return write_film(folder / f"film{suffix}", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_once_with_its_time_and_the_detectors_detections(tmp_path, detector, kind):
    film = film_of(tmp_path, **KINDS[kind])
    found = list(detect_video(film, detector, **OPTIONS))
    decoded = images_of(film)
    assert len(found) == len(decoded) == 20
    assert [frame.index for frame, _ in found] == list(range(20))
    unit = 1e-3 if kind == "mkv" else 1e-5  # Matroska stores milliseconds
    times = [float(pts * TIME_BASE) for pts in pts_of(20, variable=kind == "variable")]
    first = found[0].frame.time  # MPEG-TS begins later
    assert [frame.time - first for frame, _ in found] == pytest.approx(times, abs=unit)
    for (frame, detections), image, index in zip(found, decoded, range(20), strict=True):
        assert np.abs(frame.image.astype(int) - draw_frame(index)).mean() < 4
        assert np.abs(frame.image.astype(int) - image).max() <= 1
        expected = detector([frame.image], **OPTIONS)[0]
        assert detections.names == expected.names
        assert detections.boxes.numpy() == pytest.approx(expected.boxes.numpy(), abs=1e-3)
        assert detections.scores.numpy() == pytest.approx(expected.scores.numpy(), abs=1e-5)


def test_detections_are_equal_to_the_bit_frame_by_frame(tmp_path, detector):
    film = write_film(tmp_path / "film.mp4", 8)
    for frame, detections in detect_video(film, detector, batch_size=1, **OPTIONS):
        expected = detector(frame.image, **OPTIONS)
        assert detections.to_dict() == expected.to_dict()
        assert np.array_equal(np.asarray(detections.draw(frame.image)), np.asarray(expected.draw()))


def matrix_of(film) -> list[int]:
    """Return a b c d of the first track's display matrix, from the bytes of the file: x' = ax + cy, y' = bx + dy."""
    content = film.read_bytes()
    numbers = struct.unpack(">9i", content[content.index(b"tkhd") + 44 :][:36])
    return [number // 65536 for number in (numbers[0], numbers[1], numbers[3], numbers[4])]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_frames_are_turned_as_the_file_says(tmp_path, detector, rotation):
    """The matrix in the file moves the film's top left corner to where its white square must then be."""
    film = write_film(tmp_path / "film.mp4", 2, rotation=rotation)
    a, b, c, d = matrix_of(film)
    assert (a, b, c, d) != (1, 0, 0, 1)
    frame, detections = next(iter(detect_video(film, detector)))
    height, width = frame.image.shape[:2]
    assert (height, width) == ((256, 192) if rotation in (90, 270) else (192, 256)) == detections.size
    x, y = (width - 6 if a + c < 0 else 6), (height - 6 if b + d < 0 else 6)
    corners = {(x, y): frame.image[y, x].min() for x in (6, width - 6) for y in (6, height - 6)}
    assert max(corners, key=corners.__getitem__) == (x, y)
    assert corners[x, y] > 230
    assert sorted(corners.values())[-2] < 130


def indices(film, detector, **options):
    return [frame.index for frame, _ in detect_video(film, detector, **options)]


def test_selected_frames(tmp_path, detector):
    film = write_film(tmp_path / "film.mp4", 20, b_frames=0)
    assert indices(film, detector, every=7) == [0, 7, 14]
    assert indices(film, detector, fps=10) == [0, 3, 6, 9, 12, 15, 18]
    assert indices(film, detector, fps=1000) == list(range(20))
    assert indices(film, detector, start=0.2, end=0.3) == [6, 7, 8]
    assert indices(film, detector, start=9) == []
    with Video(film) as video:
        counts = [Selection(), Selection(7), Selection(1, 10), Selection(1, None, 0.2, 0.3)]
        assert [selection.count(video.frame_count, video.rate) for selection in counts] == [20, 3, 7, 3]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("every", 0), ("every", 1.5), ("every", "2"), ("fps", 0), ("fps", float("nan")), ("start", -1)),
        *(("start", float("inf")), ("end", 0), ("end", float("inf")), ("batch_size", 0), ("top_k", 0)),
    ],
)
def test_options_out_of_range(tmp_path, detector, option, value):
    """At once, and not when the first frame is asked for."""
    film = write_film(tmp_path / "film.mp4", 1)
    with pytest.raises(ValueError, match=f"{option}: expected"):
        detect_video(film, detector, **{option: value})


@pytest.mark.parametrize(
    ("option", "value"), [("fps", "10"), ("fps", True), ("start", "1"), ("start", None), ("end", "2"), ("end", [1])]
)
def test_options_that_are_no_numbers(tmp_path, detector, option, value):
    film = write_film(tmp_path / "film.mp4", 1)
    with pytest.raises(TypeError, match=rf"{option}: expected a number, got {re.escape(repr(value))}"):
        detect_video(film, detector, **{option: value})


def test_a_model_is_no_detector(tmp_path, detector):
    with pytest.raises(TypeError, match="detector: expected a Detector, got ConditionalDETR"):
        detect_video(write_film(tmp_path / "film.mp4", 1), detector.model)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "source: expected a video, got an empty name"),
        ("http://[bad", r"http://\[bad: expected a URL: Invalid IPv6 URL"),
        ("rtsp://me:secret@[bad", r"rtsp://\[bad: expected a URL: Invalid IPv6 URL"),
    ],
)
def test_sources_that_name_nothing(detector, source, message):
    with pytest.raises(ValueError, match=message):
        detect_video(source, detector)


@pytest.mark.parametrize("login", ["me:secret@", "me:p@secret@", "@secret@", "secret:@@"])
def test_names_have_no_password(login):
    """That of an error, here of a port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(OSError, match=rf"^rtsp://127.0.0.1:{port}/a@b\?c=d@e: the video cannot be opened: "):
        Video(f"rtsp://{login}127.0.0.1:{port}/a@b?c=d@e")


def test_folder_of_frames(tmp_path, detector):
    """In the order of their numbers, at 30 frames per second."""
    for index in range(12):
        Image.fromarray(draw_frame(index)).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = list(detect_video(tmp_path, detector))
    assert [frame.time for frame, _ in found] == pytest.approx([index / 30 for index in range(12)])
    assert all(np.array_equal(frame.image, draw_frame(index)) for index, (frame, _) in enumerate(found))


def test_stopping_early_ends_all_threads(tmp_path, detector):
    film = write_film(tmp_path / "film.mp4", 40)
    before = threading.active_count()
    for options in ({}, {"live": True}):
        frames = detect_video(film, detector, **options)
        next(frames)
        assert threading.active_count() > before
        frames.close()
        assert threading.active_count() == before


def test_memory_stays(tmp_path, detector, monkeypatch):
    """Over thousands of frames; each of them decoded would be 37 MB."""
    film = write_film(tmp_path / "film.mp4", 2000, audio=None, size=(64, 96), gop=250)
    found = detector(draw_frame(0, (64, 96)))
    monkeypatch.setattr(detector, "run_batch", lambda group, *_: [found] * len(group))
    frames = detect_video(film, detector)
    process = psutil.Process()
    list(itertools.islice(frames, 500))
    begin = process.memory_info().rss
    assert len([frame.index for frame, _ in frames if frame.index % 100 == 0]) == 15
    assert process.memory_info().rss - begin < 10e6


def test_an_error_of_the_model_comes_after_the_frames_before_it(tmp_path, detector, monkeypatch):
    film = write_film(tmp_path / "film.mp4", 10)
    run, calls = detector.run_batch, itertools.count()

    def run_batch(*arguments):
        if next(calls) == 4:
            raise RuntimeError("out of memory")
        return run(*arguments)

    monkeypatch.setattr(detector, "run_batch", run_batch)
    seen = []
    frames = detect_video(film, detector, batch_size=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        seen.extend(frame.index for frame, _ in frames)
    assert seen == [0, 1, 2, 3]


def test_a_slow_consumer_of_a_live_source_gets_the_newest_frame():
    """Every item is either yielded or counted as dropped, and the last one is yielded."""
    taken, going = threading.Event(), threading.Event()

    def source():
        for number in range(10):
            if number == 7:
                going.set()
                assert taken.wait(10)
            yield number

    newest = NewestItem()
    items = newest.read(source())
    first = next(items)
    assert going.wait(10)
    assert first == 6 or next(items) == 6
    taken.set()
    rest = list(items)
    assert rest[-1] == 9
    assert newest.dropped + len(rest) + (1 if first == 6 else 2) == 10


def test_live_plays_a_file_at_its_speed_and_drops_what_the_model_misses(tmp_path, detector, monkeypatch):
    """The model takes 0.2 s and the film 2 s: about ten frames, and never one that has waited for long."""
    film = write_film(tmp_path / "film.mp4", 60)
    run = detector.run_batch

    def run_batch(*arguments):
        time.sleep(0.2)
        return run(*arguments)

    monkeypatch.setattr(detector, "run_batch", run_batch)
    begin, ages = None, []
    for frame, _ in detect_video(film, detector, live=True):
        begin = begin or time.monotonic() - frame.time
        ages.append(time.monotonic() - begin - frame.time)
    assert 3 <= len(ages) <= 14
    assert frame.index == 59
    assert max(ages) < 2  # on a busy machine; queued frames would be 10 s old


def test_cameras_by_number_and_device(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    assert camera_input("0") == ("v4l2", "/dev/video0")
    assert camera_input("/dev/video2") == ("v4l2", "/dev/video2")
    monkeypatch.setattr("sys.platform", "darwin")
    assert camera_input("1") == ("avfoundation", "1")
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(ValueError, match="camera 0: expected Linux or macOS, got win32"):
        camera_input("0")


def test_a_stream_over_http(tmp_path, detector):
    """From a server of Python's own; the name has no password."""
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    write_film(tmp_path / "film.mkv", 10)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://user:secret@127.0.0.1:{server.server_port}/"
        assert indices(f"{address}film.mkv", detector) == list(range(10))
        with Video(f"{address}film.mkv") as video:
            assert video.name == f"http://127.0.0.1:{server.server_port}/film.mkv"
        with pytest.raises(OSError, match=r"missing.mkv: the video cannot be opened: .*404"):
            detect_video(f"{address}missing.mkv", detector)
    finally:
        server.shutdown()
        server.server_close()


def test_times_of_stages_are_measured(tmp_path, detector):
    film = write_film(tmp_path / "film.mp4", 6)
    times = StageTimes()
    with Video(film) as video:
        assert len(list(video.frames(Selection(), times))) == 6
    times.add("model", 0.010)
    times.add("model", 0.030)
    found = times.percentiles(50, 99)
    assert list(found) == ["decode", "model"]
    assert found["model"] == pytest.approx((20.0, 29.8))
    assert 0 < found["decode"][0] < 1000


def test_decoding_a_folder_is_measured_per_image(tmp_path, monkeypatch):
    """Each of them takes 20 ms more here, and no entry has the time of several."""
    for index in range(8):
        Image.fromarray(draw_frame(index, (64, 96))).save(tmp_path / f"{index}.png")

    def slow(*arguments):
        time.sleep(0.02)
        return open_image(*arguments)

    monkeypatch.setattr("conditional_detr.video.reading.open_image", slow)
    times = StageTimes()
    with Video(tmp_path) as video:
        assert len(list(video.frames(Selection(), times))) == 8
    least, middle = times.percentiles(0, 50)["decode"]
    assert 20 <= least <= middle < 160


def test_the_time_of_a_model_ends_with_its_kernels(monkeypatch):
    """On CUDA a call returns before: the wait for them, 50 ms here, belongs to the model."""

    class Model(torch.nn.Module):
        device = torch.device("cuda", 0)

        def forward(self, pixels):
            return pixels

    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (time.sleep(0.05), waited.append(device)))
    model = Model()
    with _forward_ends(model) as ends:
        begin = time.perf_counter()
        model(torch.zeros(1))
    assert waited == [model.device]
    assert ends[0] - begin >= 0.05
