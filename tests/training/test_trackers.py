"""Experiment trackers: the numbers of ``log.jsonl`` in accelerate's trackers, read back with their own packages."""

import json
import math
import os
import re
import shutil
import time
import warnings
import zipfile
from dataclasses import replace

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from conditional_detr import Metadata
from conditional_detr.training import Callback, TrainConfig, train
from helpers.training_runs import Rectangles, small_model, steps_of

QUIET = {"progress": False}
SHORT = TrainConfig(epochs=2, batch_size=2, workers=0, schedule="constant")


class Recorder(GeneralTracker):
    """Keeps all calls."""

    name, requires_logging_directory = "recorder", False

    def __init__(self, fails=""):
        super().__init__()
        self.fails, self.calls = fails, []

    @property
    def tracker(self):
        return self.calls

    def _call(self, name, *values):
        self.calls.append((name, *values))
        if self.fails == name:
            raise RuntimeError("no connection\nand more")

    def start(self):
        self._call("start")

    def store_init_configuration(self, values):
        self._call("settings", values)

    def log(self, values, step=None, **kwargs):
        self._call("log", step, values)

    def finish(self):
        self._call("finish")

    @property
    def names(self):
        return [call[0] for call in self.calls]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def expected(entry):
    """The names and numbers that a tracker gets of an entry of the log."""
    kind, values = "train" if "loss" in entry else "val", {"epoch": entry["epoch"]}
    for name, value in entry.items():
        if name == "per_class":
            values |= {f"val/per_class/{part}": ap for part, ap in value.items()}
        elif name not in ("step", "epoch"):
            values[f"{kind}/{name}"] = value
    return values


def test_a_tracker_gets_the_settings_once_and_the_numbers_of_the_log(tmp_path):
    recorder, data, val = Recorder(), Rectangles(4, noise=0.1), Rectangles(2, seed=1)
    train(small_model(), data, val, SHORT, folder=tmp_path / "run", trackers=[recorder], **QUIET)
    entries = log_of(tmp_path / "run")
    assert recorder.names == ["start", "settings", *["log"] * 6, "finish"]
    assert recorder.calls[2:-1] == [("log", entry["step"], expected(entry)) for entry in entries]
    assert {"val/AP", "val/val_loss", "val/per_class/red", "val/waited"} <= recorder.calls[4][2].keys()
    settings = recorder.calls[1][1]
    assert (settings["folder"], settings["epochs"], settings["batch_size"]) == ("run", 2, 2)
    assert (settings["architecture.width"], settings["classes"]) == (32, '["red", "blue"]')
    assert {type(value) for value in settings.values()} <= {bool, int, float, str}
    train(small_model(), data, val, SHORT, folder=tmp_path / "plain", **QUIET)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "plain")


def test_trackers_of_a_generator(tmp_path):
    recorder = Recorder()
    train(small_model(), Rectangles(2), None, SHORT, folder=tmp_path, trackers=(one for one in [recorder]), **QUIET)
    assert recorder.names == ["start", "settings", *["log"] * 4, "finish"]


def test_trackers_are_no_setting_of_the_run(tmp_path):
    """A run may be resumed with others, or with none; the numbers go on after those of before."""
    one, first, second = replace(SHORT, epochs=1), Recorder(), Recorder()
    train(small_model(), Rectangles(4), None, one, folder=tmp_path, trackers=[first], **QUIET)
    train(small_model(), Rectangles(4), None, SHORT, folder=tmp_path, resume=True, trackers=[second], **QUIET)
    steps = [[call[1] for call in recorder.calls if call[0] == "log"] for recorder in (first, second)]
    assert steps == [[1, 2, 2], [3, 4, 4]]
    train(small_model(), Rectangles(4), None, replace(SHORT, epochs=3), folder=tmp_path, resume=True, **QUIET)


def test_trackers_finish_after_an_error_of_the_training(tmp_path, recwarn):
    data, first, second = Rectangles(4), Recorder(fails="finish"), Recorder()
    data.samples[3][0].fill_(math.nan)
    with pytest.raises(ValueError, match="finite"):
        train(small_model(), data, None, SHORT, folder=tmp_path, trackers=[first, second], **QUIET)
    assert first.names[-1] == second.names[-1] == "finish"
    messages = [str(warning.message) for warning in recwarn]
    assert "tracker recorder 0: expected it to finish, got RuntimeError: no connection" in messages


def test_a_tracker_that_fails_is_left_out_and_the_training_goes_on(tmp_path):
    """A warning says so at once, and another one at the end, which nobody has to scroll back for."""
    failing, other = Recorder(fails="log"), Recorder()
    why = r"tracker recorder 0: it failed at step 1 \(RuntimeError: no connection\) and has no numbers since; "
    with pytest.warns(UserWarning, match="tracker") as warned:
        result = train(small_model(), Rectangles(4), None, SHORT, folder=tmp_path, trackers=[failing, other], **QUIET)
    messages = [str(w.message) for w in warned if str(w.message).startswith("tracker")]
    assert [bool(re.match(why, message)) for message in messages] == [True, True]
    assert messages[0].endswith("; the training goes on")
    assert messages[1].endswith("; log.jsonl has all numbers")
    assert (result.steps, failing.names.count("log"), other.names.count("log")) == (4, 1, 6)
    assert failing.names[-1] == "finish"


@pytest.mark.parametrize("fails", ["start", "settings"])
def test_a_tracker_that_cannot_start_is_an_error_before_training(tmp_path, fails):
    first, failing = Recorder(), Recorder(fails=fails)
    with pytest.raises(OSError, match=r"tracker recorder 1: expected it to start, got RuntimeError: no connection$"):
        train(small_model(), Rectangles(2), None, SHORT, folder=tmp_path, trackers=[first, failing], **QUIET)
    assert first.names == ["start", "settings", "finish"]
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("trackers", "error", "message"),
    [
        (["wandbb"], ValueError, r"trackers\[0\]: expected one of aim, .*mlflow.*wandb, got 'wandbb'"),
        (["tensorboard"], ValueError, r"trackers\[0\]: expected one of .*, got 'tensorboard'"),
        ([Recorder(), 7], TypeError, r"trackers\[1\]: expected a name or a tracker of accelerate, got int"),
        (["aim", "aim"], ValueError, "trackers: expected each name once, got aim again"),
        ("aim", TypeError, "trackers: expected a list of names and trackers, got 'aim'"),
        (None, TypeError, "trackers: expected a list of names and trackers, got None"),
        (Recorder(), TypeError, "trackers: expected a list of names and trackers, got <.*Recorder"),
    ],
)
def test_wrong_trackers_are_refused(tmp_path, monkeypatch, trackers, error, message):
    monkeypatch.setattr(tracking, "_available_trackers", ["aim"])
    with pytest.raises(error, match=message):
        train(small_model(), Rectangles(2), folder=tmp_path / "run", trackers=trackers, **QUIET)
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ModuleNotFoundError, match=r"comet_ml needs comet-ml, .*: pip install comet-ml$"):
        train(small_model(), Rectangles(2), folder=tmp_path / "run", trackers=["comet_ml"], **QUIET)
    assert not (tmp_path / "run").exists()


# ---- trackers of others


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with a folder as the store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return pytest.importorskip("mlflow", reason="MLflow is not installed")


@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_has_the_numbers_and_a_resumed_run_continues_its_run(tmp_path, monkeypatch, mlflow):
    """With class names that MLflow refuses in the name of a metric."""
    monkeypatch.chdir(tmp_path)
    names = ("../red (a)", "blau ä/1")
    val = Rectangles(2, seed=1)
    for epochs, resume in ((1, False), (2, True)):
        model = small_model()
        model.metadata = Metadata(names)
        config = replace(SHORT, epochs=epochs)
        train(model, Rectangles(4), val, config, folder="run", resume=resume, trackers=["mlflow"], **QUIET)
    (run,) = mlflow.search_runs(experiment_names=["conditional-detr"], output_format="list")
    assert (run.info.run_name, run.info.status, run.data.params["batch_size"]) == ("run", "FINISHED", "2")
    logged = log_of(tmp_path / "run")
    client = mlflow.MlflowClient()
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert history == [(entry["step"], entry["loss"]) for entry in logged if "loss" in entry]
    for name, of_class in (("_2e_._2f_red _28_a_29_", names[0]), ("blau ä_2f_1", names[1])):
        history = [m.value for m in client.get_metric_history(run.info.run_id, f"val/per_class/{name}")]
        assert history == [entry["per_class"][of_class] for entry in logged if "AP" in entry]


class Named(Callback):
    """Adds metrics whose names MLflow refuses, and one with parts."""

    def __init__(self):
        self.numbers = {"recall@0.5": 0.25, "../F1 (mean)": 0.5, "": 0.75, "recall/small": 1.0}

    def metrics(self, model, data):
        return self.numbers


@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_has_the_metrics_of_callbacks(tmp_path, mlflow):
    val, named = Rectangles(2, seed=1), Named()
    options = {"trackers": ["mlflow"], "callbacks": [named], **QUIET}
    train(small_model(), Rectangles(4), val, replace(SHORT, epochs=1), folder=tmp_path / "run", **options)
    (run,) = mlflow.search_runs(experiment_names=["conditional-detr"], output_format="list")
    names = ("recall_40_0.5", "_2e_./F1 _28_mean_29_", "_", "recall/small")
    assert [run.data.metrics[f"val/{name}"] for name in names] == list(named.numbers.values())
    assert named.numbers.items() <= log_of(tmp_path / "run")[-1].items()


@pytest.mark.filterwarnings("ignore")  # its own
def test_a_run_that_was_deleted_in_mlflow_is_followed_by_a_new_one(tmp_path, mlflow):
    """With a warning, once; later runs continue the new one, which has the settings."""
    options = {"folder": tmp_path / "run", "trackers": ["mlflow"], **QUIET}
    search = {"experiment_names": ["conditional-detr"], "output_format": "list"}
    train(small_model(), Rectangles(2), None, replace(SHORT, epochs=1), **options)
    (first,) = mlflow.search_runs(**search)
    mlflow.MlflowClient().delete_run(first.info.run_id)
    why = rf"tracker mlflow: run {first.info.run_id} cannot be continued \(MlflowException: .*\), a new one begins"
    with pytest.warns(UserWarning, match=why):
        train(small_model(), Rectangles(2), None, SHORT, resume=True, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(small_model(), Rectangles(2), None, replace(SHORT, epochs=3), resume=True, **options)
    assert not [one for one in caught if "tracker" in str(one.message)]
    (second,) = mlflow.search_runs(**search)
    history = mlflow.MlflowClient().get_metric_history(second.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [2, 3]
    assert (second.info.run_name, second.data.params["epochs"]) == ("run", "2")


@pytest.mark.filterwarnings("ignore")  # its own
def test_mlflow_that_cannot_begin_a_new_run_either_is_an_error(tmp_path, mlflow, monkeypatch):
    options = {"folder": tmp_path / "run", "trackers": ["mlflow"], **QUIET}
    train(small_model(), Rectangles(2), None, replace(SHORT, epochs=1), **options)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "file").as_uri())
    with pytest.raises(OSError, match="tracker mlflow: expected it to start, got "):
        train(small_model(), Rectangles(2), None, SHORT, resume=True, **options)
    assert len(log_of(tmp_path / "run")) == 2


def records_of(content):
    """Yield the records of a .wandb file: LevelDB's log after a header, in blocks of 32 KiB.

    A record has parts, each with checksum, length and type: 1 whole, 2 first, 3 middle, 4 last.
    """
    assert content[:4] == b":W&B"
    position, whole = 7, b""
    while position < len(content):
        if (left := -position % 32768) and left < 7:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


@pytest.mark.filterwarnings("ignore")  # its own
def test_wandb_offline_has_the_numbers_and_a_resumed_run_continues_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases, which timm then imports, too, and slowly, is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_PROJECT": "mine"}.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    for epochs, resume in ((1, False), (2, True)):
        config = replace(SHORT, epochs=epochs)
        options = {"folder": "run", "resume": resume, "trackers": ["wandb"], **QUIET}
        train(small_model(), Rectangles(4), Rectangles(2, seed=1), config, **options)
        time.sleep(1.1)  # the name of an offline run's folder is its id and the second
    assert dict(os.environ) == environment
    losses, runs, deadline = {}, set(), time.monotonic() + 30
    while len(losses) < 4 and time.monotonic() < deadline:  # a process of W&B writes the files
        for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
            for record in map(Record.FromString, records_of(path.read_bytes())):
                items = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
                if "train/loss" in items:
                    losses[json.loads(items["_step"].value_json)] = json.loads(items["train/loss"].value_json)
                if record.HasField("run"):
                    runs.add((record.run.project, record.run.display_name, record.run.run_id))
    assert losses == {entry["step"]: entry["loss"] for entry in log_of(tmp_path / "run") if "loss" in entry}
    assert len({run[2] for run in runs}) == 1
    assert ("mine", "run") in {run[:2] for run in runs}


class Remover(Callback):
    """Removes a folder after a step."""

    def __init__(self, folder, *, after):
        self.folder, self.after = folder, after

    def step(self, entry):
        if entry["step"] == self.after:
            shutil.rmtree(self.folder)


@pytest.mark.filterwarnings("ignore")  # its own
def test_a_store_of_mlflow_that_is_lost_does_not_end_the_training(tmp_path, mlflow):
    options = {"trackers": ["mlflow"], "callbacks": [Remover(tmp_path / "store", after=2)], **QUIET}
    with pytest.warns(UserWarning, match=r"tracker mlflow: it failed at step 3 .*; the training goes on"):
        result = train(small_model(), Rectangles(8), None, SHORT, folder=tmp_path / "run", **options)
    assert result.steps == 8


@pytest.mark.filterwarnings("ignore")  # its own
def test_comet_offline_has_the_numbers_and_a_resumed_run_continues_its_run(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml", reason="Comet is not installed")
    monkeypatch.chdir(tmp_path)
    for name, value in {"COMET_START_ONLINE": "0", "COMET_OFFLINE_DIRECTORY": str(tmp_path / "sent")}.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    for epochs, resume in ((1, False), (2, True)):
        config = replace(SHORT, epochs=epochs)
        options = {"folder": "run", "resume": resume, "trackers": ["comet_ml"], **QUIET}
        train(small_model(), Rectangles(4), Rectangles(2, seed=1), config, **options)
    assert dict(os.environ) == environment
    experiments, messages = [], []
    for path in (tmp_path / "sent").glob("*.zip"):
        with zipfile.ZipFile(path) as file:
            experiments.append(json.loads(file.read("experiment.json")))
            messages += map(json.loads, file.read("messages.json").splitlines())
    first, second = sorted(experiments, key=lambda experiment: experiment["start_time"])
    assert first["offline_id"] == second["offline_id"]
    assert {first["project_name"], second["project_name"]} == {"conditional-detr"}
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    logged = log_of(tmp_path / "run")
    for name, key in (("train/loss", "loss"), ("val/AP", "AP")):
        sent = {(metric["step"], metric["metricValue"]) for metric in metrics if metric["metricName"] == name}
        assert sent == {(entry["step"], entry[key]) for entry in logged if key in entry}
