"""The notebooks in examples/notebooks run from the first cell to the last, without a network and in little time."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def read(name):
    return nbformat.read(ROOT / "examples" / "notebooks" / f"{name}.ipynb", as_version=4)


def run(name, folder):
    """Run a notebook as its user does, but shorter, and return what it prints and the number of its images."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"CONDITIONAL_DETR_SHORT": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    settings |= {"TMPDIR": str(folder), "IPYTHONDIR": str(folder / ".ipython")}
    notebook = read(name)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env={**os.environ, **settings})
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


def numbers(pattern, printed):
    found = re.search(pattern, printed)
    assert found, printed
    return [float(number) for number in found.groups()]


def test_every_notebook_is_run():
    tested = re.findall(r'run\("(\w+)", tmp_path\)', Path(__file__).read_text(encoding="utf-8"))
    assert [path.stem for path in NOTEBOOKS] == sorted(tested)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_without_outputs(path):
    """So that a change shows what was changed, and nothing of the machine it ran on."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(stored)
    code = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert [cell["id"] for cell in stored["cells"]] == [f"cell-{i + 1}" for i in range(len(stored["cells"]))]
    assert {key for cell in stored["cells"] for key in cell["metadata"]} <= {"tags"}
    assert stored["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_files_that_a_notebook_mentions_exist(path):
    text = "".join(cell.source for cell in read(path.stem).cells if cell.cell_type == "markdown")
    mentioned = re.findall(r"`((?:docs|examples)/[\w/.]+|\w+\.ipynb)`", text)
    assert mentioned or path.stem == "paper"
    for name in mentioned:
        assert (ROOT / name if "/" in name else path.parent / name).exists(), name


def test_finetune(tmp_path):
    printed, images = run("finetune", tmp_path)
    assert "('round', 'angular')" in printed
    assert re.search(r"epoch 0: loss \d+\.\d+, AP 0\.\d+, AP50 0\.\d+\n", printed)
    assert images == 4  # boxes, augmentation, curves, detections
    (best,) = tmp_path.glob("*/run/best/config.json")
    assert json.loads(best.read_text())["id2label"] == {"0": "round", "1": "angular"}


def test_errors(tmp_path):
    """Wrong labels were written into the file that the notebook analyses: they are found."""
    printed, images = run("errors", tmp_path)
    found, planted, listed = numbers(r"(\d+) of (\d+) wrong labels are in the list of (\d+)", printed)
    assert found == planted == 3
    assert listed < 10
    assert images > 5  # plots and the gallery
    (report,) = tmp_path.glob("*/report/analysis.json")
    costs = {kind: entry["cost"] for kind, entry in json.loads(report.read_text())["errors"].items()}
    for kind, cost in costs.items():
        (shown,) = numbers(rf"{kind} +(\d+\.\d+) points of AP50", printed)
        assert shown == pytest.approx(100 * cost, abs=0.00501)


def test_deploy(tmp_path):
    printed, images = run("deploy", tmp_path)
    assert "same classes: True" in printed
    assert numbers(r"scores differ by (\S+)\n", printed)[0] < 1e-4
    assert numbers(r"boxes differ by (\S+) pixels", printed)[0] < 1e-2
    assert images == 1
    alone = "\n".join(cell.source for cell in read("deploy").cells if "without-torch" in cell.metadata.get("tags", []))
    (model,) = tmp_path.glob("*/shapes.onnx")
    blocked = "import sys\nsys.modules['torch'] = sys.modules['conditional_detr'] = None\n"
    paths = f"model_path, image_path = {str(model)!r}, {str(model.with_name('image.png'))!r}\n"
    detected = subprocess.check_output([sys.executable, "-c", blocked + paths + alone], text=True)
    assert len(detected.splitlines()) == 6  # the shapes that are drawn
    assert detected in printed


def test_paper(tmp_path):
    """The numbers show what the paper says: combined attention is on the object, and λ_q knows its size."""
    printed, images = run("paper", tmp_path)
    assert "the second is the model's own: True" in printed
    assert images == 5
    content, combined = (numbers(rf"{part} +(\d+) %", printed)[0] for part in ("content", "combined"))
    assert combined > content
    without, with_lambda = numbers(r"box: (-?\d\.\d+) from p_s, (-?\d\.\d+) from p_q", printed)
    assert abs(without) < with_lambda
