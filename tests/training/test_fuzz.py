"""Training states of any content are resumed from, or refused by one of the documented errors."""

import copy
import math
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conditional_detr import ConditionalDETR, Config, Metadata
from conditional_detr.training.checkpoints import LAST, STATE
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loop import train
from helpers.fuzzing import LIMITS
from helpers.training_runs import Rectangles

SIZES = {"num_queries": 5, "width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 16}
CONFIG = TrainConfig(epochs=1, batch_size=2, warmup=0, schedule="constant", ema=0.9, workers=0)
TENSORS = st.sampled_from(
    [
        torch.zeros(2),
        torch.zeros(()),
        torch.zeros(0, 9),
        torch.zeros(2, dtype=torch.int8),
        torch.tensor([float("nan")]),
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | TENSORS
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=5,
)
DROPPED = object()


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """Drawing them takes most of the time of a step."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("conditional_detr.training.logging.plot_curves", lambda *_, **__: None)
        yield


def resume(folder, epochs=2):
    """Resume a run for one more step."""
    torch.manual_seed(0)
    config = Config(num_classes=2, **SIZES, backbone="test_resnet", backbone_stage=1)
    model = ConditionalDETR(config, Metadata(("red", "blue")))
    return train(
        model, Rectangles(2), None, replace(CONFIG, epochs=epochs), folder=folder, resume=True, progress=False
    )


class Begun:
    """A run of one epoch: its folder, and its training state."""

    def __init__(self, folder):
        self.folder = folder
        self.state = torch.load(resume(folder, epochs=1).last / STATE, weights_only=True)

    def __repr__(self):  # hypothesis shows the arguments of a failing example
        return "begun"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    return Begun(tmp_path_factory.mktemp("begun"))


def changed(begun, folder, path, value):
    """Copy the run, and replace or drop the value under a path of keys in its state."""
    shutil.copytree(begun.folder, folder)
    state = inner = copy.deepcopy(begun.state)
    for key in path[:-1]:
        inner = inner[key]
    if value is DROPPED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    torch.save(state, folder / LAST / STATE)


def paths_of(value, depth=4):
    """Yield the paths of keys to all values in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items if depth else ():
        yield (key,)
        yield from ((key, *path) for path in paths_of(inner, depth - 1))


@settings(LIMITS, max_examples=40)
@given(depth=st.integers(1, 4), index=st.integers(0, 10**6), value=ANYTHING | st.just(DROPPED))
def test_any_state(begun, tmp_path_factory, depth, index, value):
    folder = tmp_path_factory.mktemp("any") / "run"
    paths = [path for path in paths_of(begun.state) if len(path) == depth]  # most paths lead to weights
    changed(begun, folder, paths[index % len(paths)], value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resume(folder)
    except (OSError, TypeError, ValueError) as error:
        assert str(folder) in str(error)  # noqa: PT017
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(((name,), DROPPED) for name in ("model", "optimizer", "scaler", "average", "history", "losses", "settings")),
        (("model", "class_head.weight"), torch.zeros(1, 16)),
        (("model", "class_head.weight"), DROPPED),
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(7)),
        (("optimizer", "state", 1, "exp_avg_sq"), DROPPED),
        (("optimizer", "state", 1), DROPPED),
        (("optimizer", "state", 1), torch.zeros(2)),
        *((("optimizer", "state", 0, "step"), torch.tensor(float(step))) for step in (-6738, -2, -1, 0, 2, math.nan)),
        (("optimizer", "state", 1, "step"), -1),
        (("optimizer", "state", 0, "step"), torch.tensor(1, dtype=torch.complex64)),
        (("optimizer", "param_groups", 0, "betas"), (0.5, 0.5)),
        (("optimizer", "param_groups", 0, "eps"), "small"),
        (("batch",), 10**9),
        (("step",), 5),
        (("epoch",), -1),
        (("settings", "epochs"), "many"),
        (("settings", "seed"), torch.zeros(2)),
        (("format",), "3"),
        (("history",), [3]),
    ],
)
def test_states_that_lack_or_contradict(begun, tmp_path, path, value):
    changed(begun, tmp_path / "run", path, value)
    with pytest.raises(ValueError, match="run/last"):
        resume(tmp_path / "run")
    weights = tmp_path / "run" / LAST / "model.safetensors"
    assert weights.read_bytes() == (begun.folder / LAST / weights.name).read_bytes()
