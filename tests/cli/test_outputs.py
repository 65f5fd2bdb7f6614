"""No command replaces a file that it did not write, and none writes over what it reads."""

import inspect
import os
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from conditional_detr.cli import app
from helpers import coco

# Every parameter that names something to write, by command, and the files that it writes.
WRITTEN = {
    ("detect", "output"): ["out/photo.json", "out/photo.png", "out/detections.jsonl", "out/detections.csv"],
    ("video", "output"): ["out/detections.jsonl", "out/annotated.mp4", "out/tracks.txt"],
    ("attention", "output"): ["out/photo-attention-1.png"],
    ("train", "output"): ["out/best/model.safetensors", "out/last/config.json", "out/log.jsonl", "out/curves.png"],
    ("evaluate", "json_file"): ["out/file.json"],
    ("analyse", "output"): ["out/report.html", "out/analysis.json", "out/thresholds.json", "out/confusion.png"],
    ("check-data", "json_file"): ["out/file.json"],
    ("check-data", "sheet"): ["out/sheet.jpg"],
    ("convert-data", "output"): ["out/instances_all.json"],
    ("check-data", "preview_augmentation"): ["out/preview.jpg"],
    ("convert", "target"): ["out/model.safetensors", "out/config.json", "out/preprocessor_config.json", "out.pth"],
    ("export", "target"): ["out/model.onnx", "out/model.xml", "out/model.bin", "out/model.pt2"],
    ("quantize", "target"): ["out/model.xml", "out/model.bin"],
    ("compare", "output"): ["out/comparison.json", "out/comparison.md", "out/comparison.png"],
    ("benchmark", "output"): ["out/benchmark.json", "out/benchmark.md", "out/benchmark.png"],
}
READ = {
    *("results", "metrics", "card", "data", "images", "val_data", "val_images", "font", "backbone_weights", "video"),
    *("api_key_file", "thresholds"),
}


def test_all_paths_are_known():
    """A new option that takes a path is one that is read, or is tested here."""
    found = {
        (name, parameter)
        for name, command in typer.main.get_command(app).commands.items()
        for parameter, annotation in get_type_hints(inspect.unwrap(command.callback)).items()
        if ("Path" in str(annotation) or parameter == "output") and parameter not in READ  # detect's may be a URI
    }
    assert found == WRITTEN.keys()


@pytest.fixture
def folder(tmp_path, photograph, monkeypatch):
    shutil.copy(photograph, tmp_path / "photo.png")
    coco.write(tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(command: str, parameter: str, file: str, weights: Path) -> list[str]:
    """A call that would write a file."""
    data = ["--data", "data.json", "--images", "images"]
    suffix = Path(file).suffix
    model = "out/model.xml" if suffix == ".bin" else file
    return {
        "detect": [
            *("photo.png", "--weights", str(weights), "--output", "out"),
            *(["--format", suffix[1:]] if suffix in (".jsonl", ".csv") else []),
        ],
        "video": ["images", "--weights", str(weights), "--output", "out", "--track", "--mot"],
        "attention": ["photo.png", "--weights", str(weights), "--output", "out"],
        "train": [*data, "--weights", str(weights), "--output", "out", "--epochs", "1"],
        "evaluate": [*data, "--weights", str(weights), "--json", file],
        "analyse": [*data, "--weights", str(weights), "--output", "out"],
        "check-data": [*data, "--json" if parameter == "json_file" else f"--{parameter.replace('_', '-')}", file],
        "convert-data": [*data, "--output", "out"],
        "convert": [str(weights), *(["out.pth", "--to", "original"] if file == "out.pth" else ["out"])],
        "export": [str(weights), model],
        "quantize": [str(weights), model, "--calibration", "photo.png"],
        "compare": [
            *(*data, "--val-data", "data.json", "--output", "out", "--seeds", "0"),
            *("--candidate", "a: width=16", "--candidate", "b: width=16", "--common", "epochs=1"),
        ],
        "benchmark": ["--weights", str(weights), "--output", "out", "--engine", "plain"],
    }[command]


CASES = [(*parameter, file) for parameter, files in WRITTEN.items() for file in files]


@pytest.mark.parametrize(("command", "parameter", "file"), CASES)
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_of_the_users_stays(folder, small, command, parameter, file, kind):
    target = folder / file
    target.parent.mkdir(exist_ok=True, parents=True)
    mine = folder / "mine" if kind == "link" else target
    mine.write_bytes(b"mine")
    if kind == "link":
        target.symlink_to(mine)
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(app, [command, *arguments(command, parameter, file, small)])
    assert result.exit_code == 2, result.output
    assert Path(file).name in result.stderr or Path(file).parent.name in result.stderr
    assert mine.read_bytes() == b"mine"
    assert target.is_symlink() == (kind == "link")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["detections.jsonl", "annotated.mp4", "tracks.txt"])
def test_a_folder_in_the_place_of_a_file_of_a_video(folder, small, name):
    """Found before any earlier result is replaced."""
    options = arguments("video", "output", name, small)
    assert CliRunner().invoke(app, ["video", *options, "--device", "cpu"]).exit_code == 0
    Path("out", name).unlink()
    Path("out", name, "mine").mkdir(parents=True)
    before = {path: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    for option in ("--overwrite", "--resume"):
        result = CliRunner().invoke(app, ["video", *options, option])
        assert result.exit_code == 2, result.output
        assert f"out/{name}: expected a file to write, got a folder" in result.stderr
    assert {path: path.read_bytes() for path in Path("out").iterdir() if path.is_file()} == before
    assert Path("out", name, "mine").is_dir()


@pytest.mark.parametrize("output", ["photo.png", "photo.png/out"])
def test_a_file_in_the_place_of_the_folder_of_a_video(folder, small, output):
    before = Path("photo.png").read_bytes()
    options = ["--weights", str(small), "--output", output, "--overwrite", "--device", "cpu"]
    result = CliRunner().invoke(app, ["video", "images", *options])
    assert result.exit_code == 2, result.output
    assert f"{output}: expected a folder for results, got a file" in result.stderr
    assert Path("photo.png").read_bytes() == before


INPUTS = [
    ("check-data", ["--data", "data.json", "--images", "images", "--json", "data.json"], "data.json"),
    ("check-data", ["--data", "data.json", "--images", "images", "--sheet", "images/10.png"], "images/10.png"),
    ("check-data", ["--data", "data.json", "--images", "images", "--sheet", "linked/11.png"], "images/11.png"),
    ("evaluate", ["--data", "data.json", "--results", "results.json", "--json", "results.json"], "results.json"),
    ("evaluate", ["--data", "data.json", "--images", "images", "--json", "hard.json"], "data.json"),
    ("analyse", ["--data", "analysis.json", "--results", "results.json", "--output", "."], "analysis.json"),
    ("detect", ["images", "--output", "linked"], "images/10.png"),
    ("detect", ["photo.png", "--output", "."], "photo.png"),
    ("detect", ["photo.png", "--output", "weights", "--no-draw"], "weights/config.json"),
    ("detect", ["photo.png", "--output", "./weights/../weights"], "weights/config.json"),
    ("convert", ["weights", "weights"], "weights/config.json"),
    ("convert", ["~/weights", "weights"], "weights/config.json"),
    ("convert", ["weights", "weights/model.safetensors", "--to", "original"], "weights/model.safetensors"),
]


@pytest.mark.parametrize(("command", "options", "file"), INPUTS)
def test_an_input_is_never_written_also_when_asked(folder, small, monkeypatch, command, options, file):
    """By the file itself, whatever its path: through a link to its folder, or another name of it."""
    shutil.copytree(small, "weights")
    Path("linked").symlink_to("images")
    os.link("data.json", "hard.json")
    Path("results.json").write_text("[]")
    shutil.copy("data.json", "analysis.json")
    monkeypatch.setenv("HOME", str(folder))
    before = Path(file).read_bytes()
    if command == "detect" or (command == "evaluate" and "--images" in options):
        options = [*options, "--weights", "weights"]
    result = CliRunner().invoke(app, [command, *options, "--overwrite"])
    assert result.exit_code == 2, result.output
    assert Path(file).read_bytes() == before


def test_results_below_the_weights(folder, small):
    """As of someone who works in the folder of the weights."""
    shutil.copytree(small, "weights")
    before = {path: path.read_bytes() for path in Path("weights").iterdir()}
    result = CliRunner().invoke(app, ["detect", "photo.png", "--weights", "weights", "--output", "weights/out"])
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in before} == before


def test_two_outputs_are_two_files(folder):
    options = ["--data", "data.json", "--images", "images", "--json", "x.png", "--sheet", "./x.png"]
    result = CliRunner().invoke(app, ["check-data", *options])
    assert result.exit_code == 2
    assert "--sheet: expected another file than that of --json" in result.stderr
    assert not Path("x.png").exists()


def test_own_drawings_are_replaced_and_those_of_other_images_are_not(folder, small):
    """An annotated image has a mark of the image that it was drawn for."""
    options = ["--weights", str(small), "--output", "out", "--device", "cpu"]

    def run(*more):
        return CliRunner().invoke(app, ["detect", *more, *options])

    assert run("photo.png").exit_code == 0
    assert run("photo.png").exit_code == 0
    assert run("photo.png", "--resume").exit_code == 0
    Path("other").mkdir()
    Image.new("RGB", (64, 48)).save("other/photo.png")
    Path("out/photo.json").unlink()
    refused = run("other/photo.png")
    assert refused.exit_code == 2
    assert "out/photo.png: expected no file, or the annotated image of an earlier run" in refused.stderr
    assert run("other/photo.png", "--overwrite").exit_code == 0
    Image.new("RGB", (8, 8)).save("out/photo.png")
    Path("out/photo.json").unlink()
    assert run("other/photo.png", "--resume").exit_code == 2
    with Image.open("out/photo.png") as image:
        assert image.size == (8, 8)


def test_overwrite_removes_the_files_of_runs_by_their_exact_names(folder, small):
    mine = [
        "detections-backup-2025.jsonl",
        "detections_by_hand.jsonl",
        "detections-1-of-2.jsonl.bak",
        "detections2.jsonl",
    ]
    for name in mine:
        Path("out", name).write_text("mine")
    Path("out/detections-2-of-3.jsonl").write_text("")
    options = ["--weights", str(small), "--output", "out", "--format", "jsonl", "--no-draw", "--device", "cpu"]
    result = CliRunner().invoke(app, ["detect", "photo.png", *options, "--overwrite"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("out").iterdir()} == {*mine, "detections.jsonl"}
    assert all(Path("out", name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize("format", ["json", "jsonl", "csv"])
def test_two_runs_do_not_write_to_one_folder(folder, format):
    from conditional_detr.inference.results import open_results

    with (
        open_results("json", "out"),
        pytest.raises(OSError, match="out: another run is writing results to this folder"),
    ):
        open_results(format, "out", resume=True)
    open_results(format, "out", resume=True).close()
    assert [path.name for path in Path("out").glob(".*")] == []
