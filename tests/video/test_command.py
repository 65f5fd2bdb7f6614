"""``conditional-detr video``: the annotated film, the lines, resuming, and files that are broken."""

import json
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from conditional_detr.cli import app
from conditional_detr.video.engines import available_engines
from conditional_detr.video.writing import VideoWriter
from helpers.films import audio_of, draw_frame, images_of, lines_of, times_of, write_film


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_times_and_audio_are_those_of_the_input(run, tmp_path, suffix, encoder):
    """Times exactly; audio packets to the byte, without the headers that only MPEG-TS has."""
    film = write_film(tmp_path / f"film{suffix}", 20, variable=True)
    result = run(film, "--encoder", encoder)
    assert result.exit_code == 0, result.output
    written = tmp_path / "out" / "annotated.mp4"
    assert times_of(written) == times_of(film)
    headers = 7 if suffix == ".ts" else 0
    assert [data for _, data in audio_of(written)] == [data[headers:] for _, data in audio_of(film)]
    times = [[float(at) for at, _ in audio_of(path)] for path in (written, film)]
    assert times[0] == pytest.approx(times[1], abs=1e-4)
    assert [line["frame"] for line in lines_of(tmp_path / "out")] == list(range(20))
    assert [line["time"] for line in lines_of(tmp_path / "out")] == [float(at) for at in times_of(film)]


def test_the_annotated_film_shows_the_drawn_detections_upright(run, tmp_path, weights):
    from conditional_detr import Detector

    film = write_film(tmp_path / "film.mp4", 4, rotation=90)
    assert run(film).exit_code == 0
    detector = Detector.from_pretrained(weights, device="cpu")
    for image, written in zip(images_of(film), images_of(tmp_path / "out" / "annotated.mp4"), strict=True):
        upright = np.ascontiguousarray(np.rot90(image))
        drawn = np.asarray(detector(upright, threshold=0, top_k=2).draw())
        assert written.shape == upright.shape
        assert np.abs(written.astype(int) - drawn).mean() < 6 < np.abs(written.astype(int) - image.mean()).mean()
        assert np.abs((written.astype(int) - drawn).mean((0, 1))).max() < 2  # no shift of colours


def test_thresholds_of_classes(weights, tmp_path, detector):
    """Those of a file are those of the detector, and of an option none besides."""
    film = write_film(tmp_path / "film.mp4", 1)
    shown = detector(images_of(film)[0], threshold=0, top_k=300)
    of_one = {**dict.fromkeys("abcdefg", 1.0), shown.names[0]: 0.0}
    (tmp_path / "t.json").write_text(json.dumps(of_one))
    arguments = ["video", str(film), "--weights", str(weights), "--device", "cpu", "--output", str(tmp_path / "out")]
    arguments += ["--no-video", "--thresholds", str(tmp_path / "t.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (line,) = lines_of(tmp_path / "out")
    assert len(line["detections"]) == min(shown.names.count(shown.names[0]), 100)
    assert {one["name"] for one in line["detections"]} == {shown.names[0]}
    assert line["settings"]["threshold"] == of_one
    refused = CliRunner().invoke(app, [*arguments, "--overwrite", "--threshold", "0.5"])
    assert refused.exit_code == 2
    assert "expected --threshold or --thresholds, got both" in refused.stderr


def test_odd_sizes(run, tmp_path):
    """Padded by a pixel, since H.264 has whole pairs of pixels; boxes stay."""
    film = write_film(tmp_path / "film.mkv", 3, codec="ffv1", pixels="bgr0", size=(97, 131))
    result = run(film)
    assert result.exit_code == 0, result.output
    first = images_of(tmp_path / "out" / "annotated.mp4")[0]
    assert first.shape == (98, 132, 3)
    assert lines_of(tmp_path / "out")[0]["size"] == {"height": 97, "width": 131}


def test_audio_that_mp4_cannot_store_is_left_out_with_a_warning(run, tmp_path):
    film = write_film(tmp_path / "film.mkv", 5, audio="pcm_u8")
    result = run(film)
    assert result.exit_code == 0, result.output
    assert "film.mkv: MP4 cannot store audio of pcm_u8; it is left out" in result.stderr
    written = tmp_path / "out" / "annotated.mp4"
    with av.open(str(written)) as opened:
        assert not opened.streams.audio
    assert times_of(written) == times_of(film)


def test_part_of_a_film_begins_at_zero(run, tmp_path):
    """The film that is written; its lines have the times of the input."""
    film = write_film(tmp_path / "film.mp4", 20)
    assert run(film, "--start", "0.2", "--end", "0.4").exit_code == 0
    assert [line["frame"] for line in lines_of(tmp_path / "out")] == [6, 7, 8, 9, 10, 11]
    written = tmp_path / "out" / "annotated.mp4"
    assert times_of(written) == [Fraction(index, 30) for index in range(6)]
    inside = [data for at, data in audio_of(film) if 0.2 <= at < 0.4]
    assert [data for _, data in audio_of(written)] == inside != []


def test_no_video_and_selected_frames(run, tmp_path):
    film = write_film(tmp_path / "film.mp4", 10)
    result = run(film, "--no-video", "--every", "3", "--profile")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["detections.jsonl"]
    assert [line["frame"] for line in lines_of(tmp_path / "out")] == [0, 3, 6, 9]
    assert "4 frames, 8 objects" in result.stdout
    for stage in ("decode", "preprocess", "model", "post-process"):
        assert stage in result.stdout
    assert "encode" not in result.stdout


def test_size_of_the_model(run, tmp_path, monkeypatch):
    from conditional_detr import ConditionalDETR

    shapes = []
    forward = ConditionalDETR.forward
    command = sys.modules["conditional_detr.cli.video"]
    monkeypatch.setattr(command, "_by_engine", lambda detector, *_: detector)
    monkeypatch.setattr(
        ConditionalDETR,
        "forward",
        lambda self, pixels, *a: shapes.append(pixels.shape[2:]) or forward(self, pixels, *a),
    )
    film = write_film(tmp_path / "film.mp4", 2)
    assert run(film, "--no-video", "--size", "48").exit_code == 0
    assert set(shapes) == {(48, 64)}


def test_engines_report_what_torch_reports(run, tmp_path, monkeypatch):
    """And auto prints the time of each; two of them, since exports take long."""
    monkeypatch.setattr("conditional_detr.video.engines.available_engines", lambda _: ["torch", "openvino"])
    film = write_film(tmp_path / "film.mp4", 2)
    expected = None
    for engine in ("torch", "onnx", "auto"):
        result = run(film, "--no-video", "--engine", engine, output=tmp_path / engine)
        assert result.exit_code == 0, result.output
        found = [one for line in lines_of(tmp_path / engine) for one in line["detections"]]
        boxes, scores, names = ([one[key] for one in found] for key in ("box", "score", "name"))
        expected = expected or (boxes, scores, names)
        assert len(names) == 4
        assert names == expected[2]
        assert np.array(boxes) == pytest.approx(np.array(expected[0]), abs=0.05)
        assert scores == pytest.approx(expected[1], abs=1e-4)
    line = next(line for line in result.stderr.splitlines() if line.startswith("engine: "))
    assert {part.split()[0] for part in line.removeprefix("engine: ").split(", ")} == {"openvino", "torch"}
    assert all(re.fullmatch(r"[a-z]+ [0-9]+ ms", part) for part in line.removeprefix("engine: ").split(", "))


def test_engines_are_those_whose_packages_are_installed(detector, monkeypatch):
    assert available_engines(detector) == ["torch", "openvino", "onnx"]
    monkeypatch.setattr(
        "conditional_detr.video.engines.find_spec", lambda name: None if name == "onnxscript" else name
    )
    assert available_engines(detector) == ["torch", "openvino"]


def start(film, weights, output, *options):
    """Run the command in a process of its own, until it has written some lines."""
    command = [
        sys.executable,
        "-m",
        "conditional_detr",
        "video",
        str(film),
        "--weights",
        str(weights),
        "--device",
        "cpu",
    ]
    command += ["--threshold", "0", "--top-k", "2", "--output", str(output), "--batch-size", "1", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = output / "detections.jsonl"
    deadline = time.monotonic() + 120
    while not lines.exists() or lines.read_bytes().count(b"\n") < 10:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_killed_and_resumed(run, tmp_path, weights):
    """As one run: each frame once in lines and film, with the same detections and tracks."""
    film = write_film(tmp_path / "film.mp4", 400, size=(64, 96))
    options = ["--track", "--batch-size", "1"]
    process = start(film, weights, tmp_path / "out", *options)
    process.kill()
    process.wait()
    process.stderr.close()
    path = tmp_path / "out" / "detections.jsonl"
    before = path.read_bytes()
    complete = before[: before.rindex(b"\n") + 1]
    assert 10 <= complete.count(b"\n") < 400
    path.write_bytes(complete + b'{"video": "cut')
    refused = run(film, *options)
    assert refused.exit_code == 2
    assert "already exists; --resume goes on with it" in refused.stderr
    resumed = run(film, *options, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert path.read_bytes().startswith(complete)
    assert [line["frame"] for line in lines_of(tmp_path / "out")] == list(range(400))
    assert times_of(tmp_path / "out" / "annotated.mp4") == times_of(film)
    assert run(film, *options, output=tmp_path / "whole").exit_code == 0
    whole = lines_of(tmp_path / "whole")
    assert [line["detections"] for line in lines_of(tmp_path / "out")] == [line["detections"] for line in whole]
    other = run(film, *options, "--resume", "--top-k", "1")
    assert other.exit_code != 0
    assert "expected the lines of this video and these settings, got settings" in other.stderr
    assert len(lines_of(tmp_path / "out")) == 400


def test_ctrl_c_leaves_complete_files(tmp_path, weights):
    film = write_film(tmp_path / "film.mp4", 400, size=(64, 96))
    process = start(film, weights, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130, messages
    assert "--resume continues" in messages
    frames = [line["frame"] for line in lines_of(tmp_path / "out")]
    assert 10 <= len(frames) < 400
    assert frames == list(range(len(frames)))
    written = tmp_path / "out" / "annotated.mp4"
    assert times_of(written) == times_of(film)[: len(frames)]
    assert_audio_ends_with_the_frames(written, film)


def assert_audio_ends_with_the_frames(written, film):
    """The packets of the film that begin until the last frame that was written."""
    end = times_of(written)[-1]
    heard = [data for at, data in audio_of(film) if at <= end]
    assert [data for _, data in audio_of(written)] == heard
    assert 0 < len(heard) < len(audio_of(film))


def test_a_run_that_an_error_stops_ends_with_its_last_frame(run, tmp_path, monkeypatch):
    """Its audio, too; resumed, the film is that of one run."""
    film, written = write_film(tmp_path / "film.mp4", 60, size=(64, 96)), tmp_path / "out" / "annotated.mp4"
    plain = VideoWriter.write

    def write(self, frame, image):
        if frame.index == 20:
            raise OSError("the disk is full")
        plain(self, frame, image)

    with monkeypatch.context() as patched:
        patched.setattr(VideoWriter, "write", write)
        result = run(film)
    assert result.exit_code == 1
    assert "error: the disk is full" in result.stderr
    assert times_of(written) == times_of(film)[:20]
    assert_audio_ends_with_the_frames(written, film)
    assert run(film, "--resume").exit_code == 0
    assert times_of(written) == times_of(film)
    assert [data for _, data in audio_of(written)] == [data for _, data in audio_of(film)]


@pytest.mark.parametrize("left", ["half", "empty", "none"])
def test_a_film_that_is_cut_off_is_written_again_when_all_lines_are_there(run, tmp_path, left):
    """As of a process that was killed after its last line."""
    film, out = write_film(tmp_path / "film.mp4", 30, size=(64, 96)), tmp_path / "out"
    assert run(film).exit_code == 0
    written, lines = out / "annotated.mp4", (out / "detections.jsonl").read_bytes()
    whole = written.read_bytes()
    if left == "none":
        written.unlink()
    else:
        written.write_bytes(whole[: len(whole) // 2] if left == "half" else b"")
    assert run(film, "--resume").exit_code == 0
    assert written.read_bytes() == whole
    assert (out / "detections.jsonl").read_bytes() == lines


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".ts", ".mp4", ".mov"])
def test_a_whole_film_gives_no_warning(run, tmp_path, suffix):
    """AVI states its length in units of time, not in frames."""
    film = write_film(tmp_path / f"film{suffix}", 20, audio=None, b_frames=0)
    result = run(film, "--no-video")
    assert (result.exit_code, len(lines_of(tmp_path / "out"))) == (0, 20)
    assert f"film{suffix}: " not in result.stderr


@pytest.mark.parametrize("place", ["{}", "file:{}", "file://{}"])
@pytest.mark.parametrize("name", ["12:30.mp4", "rtsp:film.mp4", "film 1%20.mp4"])
def test_names_of_files_are_no_protocols(run, tmp_path, monkeypatch, name, place):
    """Of the input and of the folder for results; with its audio."""
    monkeypatch.chdir(tmp_path)
    film = write_film(tmp_path / "film.mp4", 3).rename(tmp_path / name)
    source = place.format(film if "//" in place else name)
    result = run(source, output=Path("run-18:52"))
    assert result.exit_code == 0, result.output
    assert times_of(tmp_path / "run-18:52" / "annotated.mp4") == times_of(film)
    assert len(audio_of(tmp_path / "run-18:52" / "annotated.mp4")) == len(audio_of(film)) > 0


def test_the_home_folder(run, tmp_path, monkeypatch):
    """Of the user; that of a user who does not exist is a file that does not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    film = write_film(tmp_path / "film.mp4", 3)
    assert run("~/film.mp4").exit_code == 0
    assert len(audio_of(tmp_path / "out" / "annotated.mp4")) == len(audio_of(film))
    result = run("~nosuchuser/film.mp4", "--overwrite")
    assert result.exit_code == 2
    assert "~nosuchuser/film.mp4: no such file" in result.stderr


def broken(folder: Path, kind: str) -> Path:
    film = folder / "film.mp4"
    if kind == "no index":  # of a camera whose battery was taken out
        write_film(film, 20)
        film.write_bytes(film.read_bytes()[:-2000])
    elif kind == "truncated":
        write_film(film, 60, options={"movflags": "faststart"})
        film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    elif kind == "no frames":
        write_film(folder / "part.mp4", 20, options={"movflags": "faststart"})
        content = (folder / "part.mp4").read_bytes()
        film.write_bytes(content[: content.index(b"mdat") + 4])
    elif kind == "no key frame":
        film = write_film(folder / "film.ts", 30, b_frames=0, gop=10, audio=None)
        with av.open(str(film)) as opened:
            position = [packet.pos for packet in opened.demux(video=0) if packet.size][3]
        content = film.read_bytes()
        film.write_bytes(content[: 188 * 3] + content[position // 188 * 188 :])
    elif kind == "damaged":
        write_film(film, 60, b_frames=0, audio=None)
        content = bytearray(film.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 400] = bytes(400)
        film.write_bytes(content)
    elif kind == "text":
        film.write_text("not a film\n" * 100)
    elif kind == "empty":
        film.touch()
    elif kind == "audio":
        film = folder / "film.m4a"
        write_film(folder / "whole.mp4", 5)
        with av.open(str(folder / "whole.mp4")) as source, av.open(str(film), "w", format="mp4") as output:
            copy = output.add_stream_from_template(source.streams.audio[0])
            for packet in source.demux(audio=0):
                if packet.size:
                    packet.stream = copy
                    output.mux(packet)
    return film


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no index", "film.mp4: expected a video, got a file that has none or is cut off"),
        ("text", "film.mp4: expected a video, got a file that is damaged or no video"),
        ("empty", "film.mp4: expected a video, got a file that is damaged or no video"),
        ("no frames", "film.mp4: expected a video, got one without a frame that can be decoded"),
        ("audio", "film.m4a: expected a video, got a file that has none or is cut off"),
        ("missing", "film.mp4: no such file"),
    ],
)
def test_files_without_a_frame(run, tmp_path, kind, message):
    result = run(broken(tmp_path, kind))
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("kind", ["truncated", "no key frame", "damaged"])
def test_what_can_be_decoded_of_a_broken_file_is_kept(run, tmp_path, kind):
    """With a warning that names the frame."""
    film = broken(tmp_path, kind)
    result = run(film)
    assert result.exit_code == 0, result.output
    assert f"{film}: " in result.stderr
    assert "frame" in result.stderr.partition(f"{film}: ")[2]
    frames = [line["frame"] for line in lines_of(tmp_path / "out")]
    assert frames == list(range(len(frames)))
    assert len(frames) >= 15
    written = images_of(tmp_path / "out" / "annotated.mp4")
    assert len(written) == len(frames)
    if kind == "truncated":
        assert np.abs(written[5].astype(int) - draw_frame(5)).mean() < 30


@pytest.mark.parametrize("gop", [12, 60])
@pytest.mark.parametrize(("first", "count"), [(5, 35), (20, 20), (0, 10), (20, 10)])
def test_a_film_that_an_edit_list_trims_is_complete(run, tmp_path, gop, first, count):
    """As of a phone: the frames before and after are in the file, and no warning says that they are missing."""
    film = write_film(tmp_path / "film.mp4", 40, gop=gop, b_frames=0, audio=None)
    with av.open(str(film)) as opened:
        unit = opened.streams.video[0].time_base
    content = bytearray(film.read_bytes())
    place = content.index(b"elst") + 12
    assert struct.unpack(">Ii", content[place : place + 8])[1] == 0
    content[place : place + 8] = struct.pack(">Ii", count * 1000 // 30, int(Fraction(first, 30) / unit))
    film.write_bytes(content)
    result = run(film, "--no-video")
    assert result.exit_code == 0, result.output
    assert len(lines_of(tmp_path / "out")) == count
    assert "film.mp4: " not in result.stderr


def test_a_wrong_suffix_does_not_matter(run, tmp_path):
    film = write_film(tmp_path / "film.mkv", 5)
    assert run(shutil.move(film, tmp_path / "film.jpg")).exit_code == 0
    assert len(lines_of(tmp_path / "out")) == 5


def test_a_folder_whose_frames_change_their_size(run, tmp_path):
    """What was done is kept, and the error names the frame."""
    from PIL import Image

    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(5):
        Image.fromarray(draw_frame(index, (64, 96) if index < 3 else (64, 98))).save(folder / f"{index}.png")
    result = run(folder)
    assert result.exit_code == 1
    assert "frame 3: expected 96 x 64 pixels as before, got 98 x 64" in result.stderr
    assert "stopped after 3 frames; --resume continues" in result.stderr
    assert len(lines_of(tmp_path / "out")) == len(images_of(tmp_path / "out" / "annotated.mp4")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume", "--overwrite"], "expected --resume or --overwrite, got both"),
        (["--resume", "--live"], "expected --resume or --live, got both"),
        (["--mot"], "expected --track with them"),
        (["--track", "--line", "1,2,3"], "--line: expected 2 points as numbers x,y,x,y,..., got '1,2,3'"),
        (["--track", "--zone", "1,2,3,x"], "--zone: expected at least 3 points as numbers x,y,x,y,..., got '1,2,3,x'"),
        (["--track", "--line", "5,5,5,5"], "line: expected at least 2 different points, got 5,5, 5,5"),
        (["--track", "--zone", "0,0,0,0,0,0"], "zone: expected at least 3 different points, got 0,0, 0,0, 0,0"),
        (["--track", "--zone", "0,0,9,9,0,1e30"], "zone: expected points of at most 16384 pixels, got 1e+30"),
        (["--end", "inf"], "end: expected seconds after the start, 0.0, got inf"),
        *(
            (["--encoder", name], "encoder: expected a video encoder of the installed PyAV for MP4")
            for name in ("h265x", "aac", "gif", "prores_ks", "rawvideo")
        ),
        (["--fps", "0"], "fps: expected a number above 0"),
        (["--font", "missing.ttf"], "missing.ttf: expected a TrueType font file"),
    ],
)
def test_wrong_options(run, tmp_path, options, message):
    result = run(write_film(tmp_path / "film.mp4", 1), *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out" / "detections.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--show"], "window"),
        (["--start", "999"], "film.mp4: expected frames from 999 s on, got none"),
        (["--start", "0.201", "--end", "0.21"], "film.mp4: expected frames from 0.201 to 0.21 s, got none"),
        (["--engine", "auto", "--start", "999"], "film.mp4: expected frames from 999 s on, got none"),
    ],
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_run_without_a_frame_leaves_earlier_results_and_names_no_file(
    run, tmp_path, monkeypatch, options, message, existing
):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr("conditional_detr.video.engines.available_engines", lambda _: ["torch", "onnx"])
    monkeypatch.setattr("conditional_detr.video.engines.open_engine", lambda detector, *_: detector)
    film, out = write_film(tmp_path / "film.mp4", 10), tmp_path / "out"
    if existing:
        assert run(film, "--track", "--mot").exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()} if existing else {}
    result = run(film, "--track", "--mot", "--overwrite", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "annotated.mp4" not in result.output
    assert out.exists() == existing
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before


def damage(line, kind):
    """Return the text of a line that has one fault."""
    one = line["detections"][0]
    if kind in ("box", "score", "label", "name"):
        del one[kind]
    elif kind in ("size", "detections", "width"):
        del (line["size"] if kind == "width" else line)[kind]
    elif kind == "class":
        one["label"] = 99
    elif kind == "negative class":
        one["label"] = -1
    elif kind == "huge class":
        one["label"] = 10**30
    elif kind == "box of 3":
        one["box"] = [1, 2, 3]
    elif kind == "boxes of 2":
        line["detections"] = [{**one, "box": [1, 2]}, {**one, "box": [3, 4]}]
    elif kind == "size as a list":
        line["size"] = [1, 2]
    elif kind == "other size":
        line["size"]["width"] += 1
    elif kind == "number":
        line["detections"] = 5
    elif kind == "not finite":
        one["box"][0] = float("nan")
    elif kind == "huge":
        one["score"] = 10**400
    return {"list": "[1, 2]", "text": "not JSON", "bytes": "\udcff"}.get(kind) or json.dumps(line)


@pytest.mark.parametrize(
    "kind",
    [
        *("box", "score", "label", "name", "size", "detections", "width", "class", "negative class", "huge class"),
        *("box of 3", "boxes of 2", "size as a list", "other size", "number", "not finite", "huge"),
        *("list", "text", "bytes"),
    ],
)
def test_a_damaged_line_is_named(run, tmp_path, kind):
    film = write_film(tmp_path / "film.mp4", 3, size=(64, 96))
    assert run(film, "--no-video").exit_code == 0
    path = tmp_path / "out" / "detections.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = damage(json.loads(lines[1]), kind)
    path.write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")
    result = run(film, "--no-video", "--resume")
    assert result.exit_code == 1
    assert "detections.jsonl, line 2: expected the detections of a frame, got a damaged line" in result.stderr


def test_a_line_without_tracks_is_named(run, tmp_path):
    film = write_film(tmp_path / "film.mp4", 3, size=(64, 96))
    assert run(film, "--no-video", "--track").exit_code == 0
    path = tmp_path / "out" / "detections.jsonl"
    path.write_text(path.read_text().replace(', "track": null', "", 1))
    result = run(film, "--no-video", "--resume", "--track", "--mot")
    assert result.exit_code == 2
    assert "detections.jsonl, line 1: expected the detections of a frame" in result.stderr


def test_a_window_needs_a_screen(run, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    result = run(write_film(tmp_path / "film.mp4", 1), "--show")
    assert result.exit_code == 2
    assert "expected a screen for a window" in result.stderr or "a window needs tkinter" in result.stderr


@pytest.mark.parametrize("place", ["{}", "file:{}", "file://{}", "async:file:{}", "cache:file://{}"])
def test_the_input_is_never_written(run, tmp_path, place):
    """Whatever FFmpeg would open it by."""
    (tmp_path / "out").mkdir()
    film = write_film(tmp_path / "out" / "annotated.mp4", 3)
    before = film.read_bytes()
    for option in ("--overwrite", "--resume"):
        result = run(place.format(film), option)
        assert result.exit_code == 2
        assert "annotated.mp4" in result.stderr
    assert film.read_bytes() == before
    assert list((tmp_path / "out").iterdir()) == [film]


@pytest.mark.parametrize("package", ["av", "trackers"])
def test_missing_packages_name_the_extra(run, tmp_path, monkeypatch, package):
    film = write_film(tmp_path / "film.mp4", 1)
    monkeypatch.setitem(sys.modules, package, None)
    result = run(film, "--track")
    assert result.exit_code == 2
    assert f"needs {package}" in result.stderr or f"need {package}" in result.stderr
    assert "pip install 'conditional-detr[video]'" in result.stderr
