"""What surrounds a run: torch's global settings, variables, another run in the folder, signals to all processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conditional_detr import HungarianMatcher, Output, SetLoss
from conditional_detr.data.augmentation import Augmentation
from conditional_detr.data.dataset import CocoData, collate
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.system.plotting import import_matplotlib
from conditional_detr.training import run_folder
from conditional_detr.training.checkpoints import STATE
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loader import BatchLoader
from conditional_detr.training.loop import train
from conditional_detr.training.steps import Stepper
from conditional_detr.training.surroundings import make_accelerator
from helpers.training_runs import Rectangles, small_model, steps_of

ONE = TrainConfig(epochs=1, batch_size=4, workers=0, query_groups=2)


def run(folder, data=None, config=ONE, val=None, **options):
    data = Rectangles(8) if data is None else data
    return train(small_model(), data, val, config, folder=folder, progress=False, **options)


# ---- torch


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "setting", [torch.no_grad, torch.inference_mode, default_dtype, autocast, lambda: torch.device("meta")]
)
def test_global_settings_of_torch_have_no_effect(tmp_path, setting):
    model, again = small_model(), small_model()
    data, val = Rectangles(8), Rectangles(2, seed=1)
    train(model, data, val, ONE, folder=tmp_path / "plain", progress=False)
    with setting():
        before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
        train(again, data, val, replace(ONE, workers=1), folder=tmp_path / "changed", progress=False)
        assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()) == before
    assert steps_of(tmp_path / "changed") == steps_of(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("setting", [default_dtype, lambda: torch.device("meta")])
def test_samples_and_losses_do_not_depend_on_torchs_defaults(tmp_path, setting):
    """Outside of train(), as in a loop of one's own."""
    annotations = write_shapes(tmp_path, 2, seed=0, split="train", size=(64, 80))

    def samples_and_losses():
        data = CocoData(annotations, tmp_path / "train", augmentation=Augmentation.small(quarter_turn=True))
        pixels, _, targets = collate([data[0], data[1]])
        generator = torch.Generator(device="cpu").manual_seed(0)
        plain = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        output = Output(torch.randn(1, 2, 9, 6, **plain), torch.rand(1, 2, 9, 4, **plain))
        pairs = HungarianMatcher()(output.logits[-1], output.boxes[-1], targets)
        return [pixels, *(targets[i]["boxes"] for i in (0, 1)), SetLoss()(output, targets)["total"], *pairs[0]]

    expected = samples_and_losses()
    with setting():
        got = samples_and_losses()
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.device) == (b.dtype, b.device)
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # torchvision computes sizes in the default dtype


# ---- variables


def test_a_backend_that_is_not_installed(tmp_path):
    """A notebook's MPLBACKEND; the variable itself is left alone."""
    code = "import os; from conditional_detr.training.curves import plot_curves; import sys; from pathlib import Path;"
    code += "plot_curves(Path(sys.argv[1]), Path(sys.argv[2])); print(os.environ['MPLBACKEND'])"
    numbers = dict.fromkeys(("loss", "class", "l1", "giou", "norm", "lr"), 1.0)
    (tmp_path / "log").write_text(json.dumps({"step": 1, "epoch": 0, **numbers}) + "\n")
    name = "module://not_installed_inline.backend_inline"
    for backend in (name, "module://matplotlib_inline.backend_inline"):
        command = [sys.executable, "-c", code, tmp_path / "log", tmp_path / "curves.png"]
        done = subprocess.run(command, env={**os.environ, "MPLBACKEND": backend}, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, backend), done.stderr
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_variables_of_accelerate(monkeypatch):
    import_matplotlib()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    accelerator = make_accelerator()
    assert accelerator.mixed_precision == "no"
    model = torch.nn.Linear(1, 1)
    assert accelerator.prepare_model(model) is model
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    message = "^ACCELERATE_USE_FSDP: expected no such variable, got 'true'; each process trains the whole model$"
    with pytest.raises(ValueError, match=message):
        make_accelerator()


# ---- the folder


def test_files_of_an_earlier_run_without_its_state_are_kept(tmp_path):
    result = run(tmp_path, val=Rectangles(2))
    (result.last / STATE).unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    message = (
        r"expected a folder without files of a run, got best/model.safetensors, .*, log.jsonl, curves.png without"
    )
    with pytest.raises(FileExistsError, match=message):
        run(tmp_path)
    with pytest.raises(
        FileExistsError, match=r"got best/model.safetensors, .* without last/training_state.pt to resume"
    ):
        run(tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for path in before:
        if path.suffix in (".safetensors", ".json"):
            path.unlink()
    with pytest.raises(FileExistsError, match=r"got log.jsonl, curves.png without last/training_state.pt"):
        run(tmp_path)
    assert run(tmp_path, resume=True).steps == 2  # of a run that was killed before its first checkpoint


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "_PATIENCE", 0.1)

    class Meets(Rectangles):
        def __getitem__(self, index):
            with pytest.raises(OSError, match=rf"got one that process {os.getpid()} on .* trains in$"):
                run(tmp_path, resume=True)
            return super().__getitem__(index)

    assert run(tmp_path, Meets(1)).steps == 1


# ---- processes


class DiesAt7(Rectangles):
    def __getitem__(self, index):
        if index == 7 and self.epochs == [0, 1]:
            os._exit(3)
        return super().__getitem__(index)


def test_the_message_of_a_dead_worker_has_the_checkpoint(tmp_path):
    message = (
        rf"DataLoader worker .* exited unexpectedly.*; the last good checkpoint is {tmp_path / 'last'}, of step 2$"
    )
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        run(tmp_path, DiesAt7(8), replace(ONE, epochs=2, workers=1))


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "no socket")])
def test_the_error_of_a_worker_that_dies_while_its_batch_is_fetched(monkeypatch, error):
    """Torch fetches shared memory through a socket of the worker, which closes before the process has ended."""

    class Fetching:
        def __iter__(self):
            yield
            raise error

    loader = BatchLoader(Rectangles(4), replace(ONE, workers=0), parts=(), pin=False, skip=print)
    loader._iterator = Fetching()
    with pytest.raises(type(error)):
        list(loader._loaded())
    living, dying = (multiprocessing.Process(target=time.sleep, args=(seconds,), daemon=True) for seconds in (60, 0.3))
    living.start()
    loader._workers = [living]
    monkeypatch.setattr("conditional_detr.training.loader._DEATH", 0.1)
    with pytest.raises(type(error)):
        list(loader._loaded())
    monkeypatch.undo()
    dying.start()
    loader._workers = [living, dying]
    with pytest.raises(RuntimeError, match=rf"^DataLoader worker \(pid {dying.pid}\) exited unexpectedly$"):
        list(loader._loaded())
    living.kill()
    living.join()


def test_workers_that_die_during_an_evaluation(tmp_path):
    """The first evaluation or the next epoch, for which they wait, ends with an error; none is left."""

    class Kills(Rectangles):
        def __getitem__(self, index):
            for worker in multiprocessing.active_children():
                if worker not in before:
                    os.kill(worker.pid, signal.SIGKILL)
            return super().__getitem__(index)

    before = multiprocessing.active_children()
    with pytest.raises(RuntimeError, match=r"(?s)DataLoader worker .*(no checkpoint yet|of step 2)$"):
        run(tmp_path, Rectangles(8), replace(ONE, epochs=3, workers=2), val=Kills(2))
    assert len(steps_of(tmp_path)) == 2
    assert multiprocessing.active_children() == before


def test_other_errors_of_a_dataset_keep_their_type_and_have_the_checkpoint(tmp_path):
    class Broken(Rectangles):
        def __getitem__(self, index):
            raise ZeroDivisionError("no area")

    with pytest.raises(ZeroDivisionError, match=r"^no area; there is no checkpoint yet$"):
        run(tmp_path, Broken(4))


@pytest.mark.parametrize("error", ["of a dead worker", "of an image", "of a step"])
def test_an_error_leaves_no_worker(tmp_path, monkeypatch, error):
    """Workers block the signal with which multiprocessing ends them at exit, and would be waited for without end.

    One of two workers dies, or an image or a step raises an error while both are at work.
    """

    class Fails(Rectangles):
        def __getitem__(self, index):
            if index == 7 and error != "of a step":
                if error == "of a dead worker":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError
            if multiprocessing.parent_process() is not None and index == 8:
                time.sleep(2)
            return super().__getitem__(index)

    def step(*_, **__):
        raise ZeroDivisionError

    if error == "of a step":
        monkeypatch.setattr(Stepper, "train_step", step)
    before = multiprocessing.active_children()
    with pytest.raises((ZeroDivisionError, RuntimeError)) as caught:
        run(tmp_path, Fails(40), replace(ONE, batch_size=2, workers=2))
    assert caught.tb is not None  # it keeps the frames, and with them the loader
    assert multiprocessing.active_children() == before


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_all_processes_saves(tmp_path, which):
    """A run with two workers in a process group of its own, as schedulers and terminals signal it."""
    code = """
import signal
import sys
from pathlib import Path
from dataclasses import replace
from test_surroundings import ONE, run
from helpers.training_runs import Rectangles
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has its children ignore it
try:
    run(Path(sys.argv[1]), Rectangles(8), replace(ONE, epochs=2000, workers=2, save_every=10**6))
except KeyboardInterrupt as error:
    print(error)
    sys.exit(130)
"""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log, end = tmp_path / "log.jsonl", time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None and not (log.exists() and len(steps_of(tmp_path)) > 3):
        time.sleep(0.05)
    os.killpg(process.pid, which)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    done = steps_of(tmp_path)[-1]["step"]
    assert output == f"stopped after step {done}; resume from {tmp_path / 'last'}\n"
    assert torch.load(tmp_path / "last" / STATE, weights_only=True)["step"] == done
