"""A stopped run resumes to the same numbers; a checkpoint is complete, or the previous one is kept."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conditional_detr import ConditionalDETR, SetLoss
from conditional_detr.training import checkpoints
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.logging import RunLogger
from conditional_detr.training.loop import train
from conditional_detr.training.run_folder import LOCK
from conditional_detr.training.trackers import Trackers
from helpers.models import assert_same
from helpers.training_runs import RESUMED, Rectangles, resumable, small_model, steps_of

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    model, result = resumable(folder, workers=0)
    return folder, model, result


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two runs killed after step 5, one with workers and one without; the last checkpoint is of step 4."""
    folders = {workers: tmp_path_factory.mktemp(f"killed{workers}") for workers in (0, 2)}
    code = "import sys; from helpers.training_runs import killed_at; killed_at(sys.argv[1], *map(int, sys.argv[2:]))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, folder, "5", str(workers), str(torch.get_num_threads())],
            env={**os.environ, "PYTHONPATH": path},
        )
        for workers, folder in folders.items()
    ]
    assert [process.wait(120) for process in processes] == [-signal.SIGKILL] * 2
    return folders


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_the_same_numbers_to_the_last_bit(uninterrupted, killed, workers):
    """Losses, gradient norms and rates of all steps; weights, their average, and AP."""
    whole, model, result = uninterrupted
    folder = killed[workers]
    before = steps_of(folder)
    assert [entry["step"] for entry in before] == [1, 2, 3, 4, 5]
    state = torch.load(folder / "last" / checkpoints.STATE, weights_only=True)
    assert (state["step"], state["epoch"], state["batch"]) == (4, 1, 2)  # in the middle of the second epoch
    abandoned = folder / "last" / ".0123456789abcdef.unfinished"
    abandoned.mkdir()
    (abandoned / "model.safetensors").write_bytes(b"half")  # left by a process killed while writing
    again, resumed = resumable(folder, workers=workers, resume=True)
    assert steps_of(folder) == steps_of(whole)
    assert before == steps_of(whole)[:5]
    assert len({entry["loss"] for entry in before}) == 5
    assert_same(again, model)
    for which in ("last", "best"):
        a, b = (ConditionalDETR.from_pretrained(run / which) for run in (folder, whole))
        assert_same(a, b)
    states = [torch.load(run / "last" / checkpoints.STATE, weights_only=True) for run in (folder, whole)]
    for kind in ("model", "average"):
        assert all(torch.equal(states[0][kind][name], states[1][kind][name]) for name in states[1][kind])
    without_time = [[{**entry, "seconds": 0} for entry in r.history] for r in (resumed, result)]
    assert without_time[0] == without_time[1]
    assert (resumed.best_ap, resumed.steps) == (result.best_ap, 9)
    assert resumed.first_epoch is None
    assert result.first_epoch is not None
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log if "AP" in entry] == [0, 1, 2]
    assert list(folder.glob("*/.*")) == []


def test_a_finished_run_resumes_without_further_steps(uninterrupted):
    whole, model, result = uninterrupted
    again, resumed = resumable(whole, workers=0, resume=True)
    assert_same(again, model)
    assert (resumed.steps, resumed.history, resumed.best_ap) == (result.steps, result.history, result.best_ap)


def test_only_the_same_run_resumes_and_only_on_request(uninterrupted):
    whole, *_ = uninterrupted
    data = Rectangles(11, noise=0.1)
    with pytest.raises(FileExistsError, match="expected a folder without a checkpoint, got one with"):
        train(small_model(), data, None, RESUMED, folder=whole, **QUIET)
    message = (
        r"training_state.pt: expected the settings that this run began with,"
        r" got batch_size 4, not 2, lr 0.01, not 0.001; only workers, save_every, epochs,"
    )
    changed = replace(RESUMED, lr=0.01, batch_size=4, workers=1, save_every=9)
    with pytest.raises(ValueError, match=message):
        train(small_model(), data, None, changed, folder=whole, resume=True, **QUIET)
    with pytest.raises(ValueError, match="got images 10, not 11"):
        train(small_model(), Rectangles(10), None, RESUMED, folder=whole, resume=True, **QUIET)
    with pytest.raises(ValueError, match=r"got criterion 'SetLoss\(class_weight=1, .*, not 'SetLoss\(class_weight=2"):
        train(small_model(), data, folder=whole, config=RESUMED, resume=True, criterion=SetLoss(1), **QUIET)
    with pytest.raises(ValueError, match=r"got architecture.num_queries 9, not 10;"):
        train(small_model(num_queries=9), data, None, RESUMED, folder=whole, resume=True, **QUIET)


@pytest.mark.parametrize(("content", "message"), [(b"not a state", "got something else"), (b"", "got something else")])
def test_a_file_without_a_training_state_is_refused(tmp_path, content, message):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / checkpoints.STATE).write_bytes(content)
    with pytest.raises(ValueError, match=f"expected a training state, {message}"):
        train(small_model(), Rectangles(4), None, RESUMED, folder=tmp_path, resume=True, **QUIET)
    torch.save([1], tmp_path / "last" / checkpoints.STATE)
    with pytest.raises(ValueError, match="expected a training state, got list"):
        train(small_model(), Rectangles(4), None, RESUMED, folder=tmp_path, resume=True, **QUIET)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes(tmp_path, monkeypatch, which):
    """A signal during a step: the step is finished and saved, and the previous signal handlers are restored."""
    config = TrainConfig(epochs=1, batch_size=2, workers=0, save_every=100)
    before = signal.getsignal(which)
    plain = RunLogger.log_step

    def step_and_interrupt(self, entry):
        plain(self, entry)
        if entry["step"] == 2:
            os.kill(os.getpid(), which)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "log_step", step_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(small_model(), Rectangles(8), None, config, folder=tmp_path, **QUIET)
    assert signal.getsignal(which) is before
    assert torch.load(tmp_path / "last" / checkpoints.STATE, weights_only=True)["step"] == 2
    assert (tmp_path / "curves.png").stat().st_size > 0
    train(small_model(), Rectangles(8), None, config, folder=tmp_path, resume=True, **QUIET)
    train(small_model(), Rectangles(8), None, config, folder=tmp_path / "whole", **QUIET)
    assert steps_of(tmp_path) == steps_of(tmp_path / "whole")


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    """The disk is full while the second state is written: the message has the checkpoint, and it resumes."""
    config = TrainConfig(epochs=1, batch_size=2, workers=0, save_every=1)
    plain, written = torch.save, []

    def save(content, path):
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        message = f"No space left on device; the last good checkpoint is {tmp_path / 'last'}, of step 1$"
        with pytest.raises(OSError, match=message):
            train(small_model(), Rectangles(6), None, config, folder=tmp_path, **QUIET)
    state = torch.load(tmp_path / "last" / checkpoints.STATE, weights_only=True)
    assert state["step"] == 1
    assert_same(ConditionalDETR.from_pretrained(tmp_path / "last"), _loaded(state))
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        checkpoints.STATE,
    ]
    train(small_model(), Rectangles(6), None, config, folder=tmp_path, resume=True, **QUIET)
    train(small_model(), Rectangles(6), None, config, folder=tmp_path / "whole", **QUIET)
    assert steps_of(tmp_path) == steps_of(tmp_path / "whole")


def _loaded(state):
    model = small_model()
    model.load_state_dict(state["model"])
    return model


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    """Processes killed while writing a file, one in each folder of a run."""
    code = """
import os, signal, sys
from pathlib import Path
from conditional_detr.system.atomic_files import write_atomically

def write(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically({Path(sys.argv[1]) / "model.safetensors": write})
"""
    folders = [tmp_path, tmp_path / "last", tmp_path / "best"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / ".gitignore").write_text("*")
        assert subprocess.run([sys.executable, "-c", code, folder]).returncode == -signal.SIGKILL
        assert len(list(folder.glob(".*"))) == 2
    train(small_model(), Rectangles(4), None, replace(RESUMED, epochs=1), folder=tmp_path, resume=True, **QUIET)
    hidden = sorted(path.name for folder in folders for path in folder.glob(".*"))
    assert hidden == [LOCK, *[".gitignore"] * 3]


@pytest.mark.parametrize("at", range(1, 6))
def test_a_run_killed_in_its_first_save_resumes(tmp_path, monkeypatch, at):
    """After each of the renames: the journal, three files of the weights and the training state."""

    class KilledError(BaseException):
        pass

    renamed, plain = [], Path.replace

    def rename(self, target):
        plain(self, target)
        renamed.append(target)
        if len([path for path in renamed if path.parent.name == "last"]) == at:
            raise KilledError

    config = replace(RESUMED, epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", rename)
        with pytest.raises(KilledError):
            train(small_model(), Rectangles(4), None, config, folder=tmp_path, **QUIET)
    result = train(small_model(), Rectangles(4), None, config, folder=tmp_path, resume=True, **QUIET)
    assert result.steps == 1
    assert [path.name for path in (tmp_path / "last").glob(".*")] == []


def test_resume_without_a_checkpoint_starts_a_new_run(tmp_path):
    result = train(
        small_model(), Rectangles(4), None, replace(RESUMED, epochs=1), folder=tmp_path, resume=True, **QUIET
    )
    assert (result.steps, result.best, result.best_ap) == (1, None, None)


def test_log_of_a_killed_process(tmp_path):
    """An unfinished last line and entries after the checkpoint are removed."""
    numbers = dict.fromkeys(("loss", "class", "l1", "giou", "norm", "lr"), 1.0)
    lines = [json.dumps({"step": step, "epoch": 0, **numbers}) for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "ep')
    with RunLogger(tmp_path, step=2, epoch=0, total=9, trackers=Trackers(()), shown=False):
        pass
    assert [entry["step"] for entry in steps_of(tmp_path)] == [1, 2]
    assert re.match(r"\x89PNG", (tmp_path / "curves.png").read_bytes()[:4].decode("latin1"))
