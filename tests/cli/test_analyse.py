"""``conditional-detr analyse``, and the thresholds that it writes in the other commands."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from conditional_detr.analysis.report import FILES
from conditional_detr.cli import app
from helpers import coco
from helpers.analysis import known_case

NAMES = [f"LABEL_{i}" for i in range(7)]  # of the tiny checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with the known case and its images."""
    monkeypatch.chdir(tmp_path)
    content, results = known_case()
    Path("known.json").write_text(json.dumps(content))
    Path("results.json").write_text(json.dumps(results))
    Path("images").mkdir()
    for i in range(1, 8):
        Image.new("RGB", (100, 80)).save(f"images/{i}.png")
    return tmp_path


def run(command, *arguments):
    return CliRunner().invoke(app, [command, *map(str, arguments)], env={"COLUMNS": "120"})


def test_report_of_results(folder):
    data = ("--data", "known.json", "--results", "results.json")
    result = run("analyse", *data, "--images", "images", "--output", "new/report")
    assert result.exit_code == 0, result.output
    assert "wrote new/report/report.html" in result.stdout
    assert "3 suspicious labels" in result.stdout
    assert sorted(path.name for path in Path("new/report").iterdir()) == sorted(FILES)
    assert Path("new/report/report.html").read_text().count("data:image/jpeg") == 8
    rows = [line.split() for line in result.stdout.splitlines() if "localisation" in line]
    assert rows[0][1:6:2] == ["localisation", "16.50", "1"]
    again = run("analyse", *data, "--output", "new/report")
    assert again.exit_code == 2
    assert "report.html: already exists; set overwrite, or --overwrite, to replace it" in again.stderr
    Path("images").rename("elsewhere")
    without = run("analyse", *data, "--output", "new/report", "--overwrite")
    assert without.exit_code == 0
    assert "data:image/jpeg" not in Path("new/report/report.html").read_text()


def test_numbers_without_the_images(folder):
    Path("images/2.png").unlink()
    result = run("analyse", "--data", "known.json", "--results", "results.json")
    assert result.exit_code == 0, result.output
    assert "warning: no gallery: " in result.stderr
    assert "2.png: no such file; 1 of the 7 images of known.json are missing" in result.stderr
    assert "data:image/jpeg" not in Path("analysis/report.html").read_text()


def test_scores_that_are_none(folder):
    results = json.loads(Path("results.json").read_text())
    Path("results.json").write_text(json.dumps([results[0], {**results[1], "score": 7}]))
    refused = run("analyse", "--data", "known.json", "--results", "results.json")
    assert refused.exit_code == 2
    assert "results: [1]: expected a score of 0..1, got 7" in refused.stderr


def test_detect_and_use_the_thresholds(tmp_path, small, monkeypatch):
    """From the weights to thresholds.json, which detect and evaluate take."""
    monkeypatch.chdir(tmp_path)
    content = coco.content()
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    for annotation in content["annotations"]:
        annotation["category_id"] %= 7
    coco.write(tmp_path, content)
    data = ("--data", "data.json", "--images", "images", "--weights", small, "--device", "cpu")
    assert run("analyse", *data).exit_code == 0
    thresholds = json.loads(Path("analysis/thresholds.json").read_text())
    assert list(thresholds) == NAMES
    Path("mine.json").write_text(json.dumps({**dict.fromkeys(NAMES, 1.0), "LABEL_3": 0.0}))
    mine = ("--thresholds", "mine.json")
    result = run("detect", "images/10.png", "--weights", small, "--device", "cpu", "--output", "o", "--no-draw", *mine)
    assert result.exit_code == 0, result.output
    written = json.loads(Path("o/10.json").read_text())
    assert {one["name"] for one in written["detections"]} == {"LABEL_3"}
    assert written["settings"]["threshold"] == {**dict.fromkeys(NAMES, 1.0), "LABEL_3": 0.0}
    all_of_them = run("evaluate", *data, "--json", "all.json")
    few = run("evaluate", *data, "--json", "few.json", *mine)
    assert "no threshold" in all_of_them.stdout
    assert "with thresholds" in few.stdout
    recall = [json.loads(Path(name).read_text())["per_class"] for name in ("all.json", "few.json")]
    assert recall[0]["LABEL_3"] == recall[1]["LABEL_3"]
    assert recall[1]["LABEL_2"]["AR100"] == 0


CASES = [
    (
        ["analyse", "--data", "known.json", "--results", "results.json", "--weights", "shapes"],
        "--weights: expected none with --results, got shapes",
    ),
    (
        ["analyse", "--data", "known.json", "--results", "results.json", "--output", "known.json"],
        "known.json: expected a folder to write to, got the file known.json",
    ),
    (["analyse", "--data", "known.json", "--images", "none"], "none"),
    (
        ["detect", "images", "--weights", "shapes", "--thresholds", "t.json"],
        "t.json: expected class names of the model, got 'cat'; the names are disc, square",
    ),
    (
        ["detect", "images", "--thresholds", "t.json", "--threshold", "0.3"],
        "expected --threshold or --thresholds, got both",
    ),
    (["serve", "--thresholds", "t.json", "--threshold", "0.3"], "expected --threshold or --thresholds, got both"),
    (
        ["evaluate", "--data", "known.json", "--results", "results.json", "--thresholds", "t.json"],
        "--thresholds: expected none with --results, got t.json",
    ),
    (
        ["detect", "images", "--weights", "shapes", "--thresholds", "gone.json"],
        "gone.json: cannot be read: No such",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), CASES)
def test_wrong_options(folder, arguments, message):
    Path("t.json").write_text('{"cat": 0.5}')
    Path("empty").mkdir()
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not Path("analysis").exists()


def test_matplotlib_is_missing(folder, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("conditional_detr.analysis.plots.import_matplotlib", missing)
    result = run("analyse", "--data", "known.json", "--results", "results.json")
    assert result.exit_code == 2
    assert (
        "the report needs matplotlib, which is not installed: pip install 'conditional-detr[train]'" in result.stderr
    )
