"""Films over HTTP, RTSP, UDP and TCP from servers of this computer: whole, stopped in the middle, and silent."""

import contextlib
import io
import re
import socket
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest

from conditional_detr.video import detect_video
from conditional_detr.video.frames import Selection
from conditional_detr.video.reading import Video
from conditional_detr.video.timing import StageTimes
from helpers.films import images_of, lines_of, times_of, write_film
from helpers.rtsp import Camera

DATAGRAM = 7 * 188  # bytes: whole packets of MPEG-TS


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch):
    monkeypatch.setattr("conditional_detr.video.reading._TIMEOUT", 2.0)


@pytest.fixture(params=["film.ts", "film.mp4"])
def film(request, tmp_path):
    """A film that can be read from its beginning on, without seeking."""
    return write_film(tmp_path / request.param, 60, audio=None, options={"movflags": "faststart"})


class Server(ThreadingHTTPServer):
    """Serve bytes; after ``sent`` of them it closes the connection, or is silent until it ends."""

    daemon_threads = True

    def __init__(self, content: bytes, *, sent=None, silent=False, ranges=False, status=200):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.sent, self.ranges, self.status = content, sent, ranges, status
        self.ended = threading.Event()
        if not silent:
            self.ended.set()
        self.url = f"http://127.0.0.1:{self.server_port}/film"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self):
        self.ended.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        content, asked = self.server.content, re.fullmatch(r"bytes=([0-9]+)-", self.headers.get("Range", ""))
        begin = int(asked[1]) if asked and self.server.ranges else 0
        self.send_response(206 if asked and self.server.ranges else self.server.status)
        if asked and self.server.ranges:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        try:
            self.wfile.write(content[begin : self.server.sent])
            self.wfile.flush()
        except OSError:  # the reader has gone
            return
        self.server.ended.wait(30)


@pytest.fixture
def serve():
    servers = []

    def serve(content, **options):
        servers.append(Server(content, **options))
        return servers[-1].url

    yield serve
    for server in servers:
        server.close()


def read(source):
    """Return the frames and the warnings."""
    with warnings.catch_warnings(record=True) as caught, Video(source) as video:
        warnings.simplefilter("always")
        frames = list(video.frames(Selection(), StageTimes()))
    return frames, [str(one.message) for one in caught]


def half_of(film):
    """Return the bytes of the first 30 packets of a film, and the times of the frames that PyAV decodes of them."""
    with av.open(str(film)) as opened:
        end = [packet.pos for packet in opened.demux(video=0)][30]
    half = film.read_bytes()[:end]
    with av.open(io.BytesIO(half)) as opened:
        times = [frame.pts * frame.time_base for frame in opened.decode(video=0)]
    assert len(times) == 30
    return half, times


def test_a_film_over_http_is_that_of_the_file(film, serve):
    frames, messages = read(serve(film.read_bytes()))
    assert messages == []
    assert [frame.index for frame in frames] == list(range(60))
    assert [frame.pts * frame.time_base for frame in frames] == times_of(film)
    for frame, image in zip(frames, images_of(film), strict=True):
        assert np.abs(frame.image.astype(int) - image).mean() < 2


def test_an_mp4_with_its_index_at_the_end_needs_ranges(tmp_path, serve):
    film = write_film(tmp_path / "film.mp4", 90)  # too long to be held in memory
    frames, messages = read(serve(film.read_bytes(), ranges=True))
    assert ([frame.pts * frame.time_base for frame in frames], messages) == (times_of(film), [])
    with pytest.raises(OSError, match=r"film: before the first frame: reading stopped: "):
        read(serve(film.read_bytes()))


@pytest.mark.parametrize("silent", [False, True])
def test_what_came_of_a_stream_that_stops_is_kept(film, serve, silent):
    """As much as can be decoded, which includes what waits in the decoder."""
    half, expected = half_of(film)
    begin = time.monotonic()
    frames, messages = read(url := serve(film.read_bytes(), sent=len(half), silent=silent))
    assert time.monotonic() - begin < 9
    assert [frame.pts * frame.time_base for frame in frames] == expected
    reason = "no data for 2 s" if silent else "Input/output error"
    assert messages[-1] == f"{url}: frame {len(expected) - 1}: reading stopped: {reason}"


@pytest.mark.parametrize("silent", [False, True])
def test_the_results_of_a_stream_that_stops_are_complete(run, tmp_path, serve, silent):
    film = write_film(tmp_path / "film.ts", 60, audio=None)
    half, times = half_of(film)
    result = run(serve(film.read_bytes(), sent=len(half), silent=silent))
    assert result.exit_code == 0, result.output
    assert f"frame {len(times) - 1}: reading stopped: " in result.stderr
    assert [line["time"] for line in lines_of(tmp_path / "out")] == [float(at) for at in times]
    assert times_of(tmp_path / "out" / "annotated.mp4") == times


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"status": 404}, "the video cannot be opened: Server returned 404 Not Found"),
        ({"sent": 0, "silent": True}, "the video cannot be opened: no data for 2 s"),
        ({"sent": 0}, "the video cannot be opened: "),
    ],
)
def test_servers_without_a_film(serve, options, message):
    url = serve(bytes(1000), **options).replace("//", "//me:secret@")
    with pytest.raises((OSError, ValueError), match=message) as error:
        read(url)
    assert "127.0.0.1" in str(error.value)
    assert "secret" not in str(error.value)


def test_no_server():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(OSError, match=rf"http://127.0.0.1:{port}: the video cannot be opened: Connection refused"):
        read(f"http://127.0.0.1:{port}")


def send_datagrams(content: bytes, port: int, seconds: float) -> None:
    """Send MPEG-TS evenly over so many seconds, from when the receiver listens on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", port))
        parts = [content[begin : begin + DATAGRAM] for begin in range(0, len(content), DATAGRAM)]
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                for _ in range(2):  # the first one's refusal is told by the second
                    sender.send(parts[0])
                    time.sleep(0.05)
                break
            except ConnectionRefusedError:
                continue
        for part in parts[1:]:
            sender.send(part)
            time.sleep(seconds / len(parts))


@pytest.mark.parametrize("live", [False, True])
def test_frames_of_udp(tmp_path, detector, live):
    """Until nothing comes any more: UDP has no end."""
    film = write_film(tmp_path / "film.ts", 60, audio=None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    sender = threading.Thread(target=send_datagrams, args=(film.read_bytes(), port, 2.0), daemon=True)
    sender.start()
    source = f"udp://127.0.0.1:{port}"
    with pytest.warns(UserWarning, match=rf"{source}: frame [0-9]+: reading stopped: no data for 2 s"):
        found = [frame for frame, _ in detect_video(source, detector, live=live)]
    sender.join()
    times = times_of(film)
    assert (1 if live else 50) < len(found) <= 60
    for frame in found:
        assert frame.pts * frame.time_base in times
    assert [frame.index for frame in found] == sorted({frame.index for frame in found})


def test_frames_of_tcp(tmp_path):
    film = write_film(tmp_path / "film.ts", 30, audio=None)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:

        def send():
            connection, _ = server.accept()
            with connection:
                connection.sendall(film.read_bytes())

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        frames, messages = read(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        sender.join()
    assert ([frame.pts * frame.time_base for frame in frames], messages) == (times_of(film), [])


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_frames_of_rtsp(tmp_path, transport, silent):
    """All but what FFmpeg needs the next frame for; the end of a camera is reported, too."""
    film = write_film(tmp_path / "film.ts", 60, audio=None, b_frames=0)
    with contextlib.closing(Camera(film.read_bytes(), seconds=1.5, transport=transport, silent=silent)) as camera:
        frames, messages = read(camera.url)
    assert len(frames) >= 58
    assert [frame.pts * frame.time_base for frame in frames] == times_of(film)[: len(frames)]
    reason = "reading stopped: no data for 2 s" if silent else "the stream has ended"
    assert messages == [f"{camera.url}: frame {len(frames) - 1}: {reason}"]
