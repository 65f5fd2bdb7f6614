"""Training states of older formats resume; those of newer ones are refused.

``files/version_0.1.0/last`` is a checkpoint that version 0.1.0 wrote after two steps on ``Rectangles(4)``. The numbers
below were computed by that version.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conditional_detr import ConditionalDETR, Config, Metadata, Preprocessing
from conditional_detr.training.checkpoints import FORMAT, STATE
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loop import train
from helpers.models import assert_same
from helpers.training_runs import RESUMED, Rectangles, small_model, steps_of

LAST = Path(__file__).parent / "files" / "version_0.1.0" / "last"
LOGITS = [[-4.881004, -3.932013], [-4.878711, -3.921525], [-4.879595, -3.924176]]
LOGITS += [[-4.878030, -3.922906], [-4.877496, -3.915872]]
BOXES = [[0.742696, 0.391293, 0.498855, 0.498873], [0.682223, 0.347462, 0.498859, 0.498877]]
BOXES += [[0.540394, 0.419920, 0.498855, 0.498873], [0.476558, 0.185002, 0.498859, 0.498877]]
BOXES += [[0.365289, 0.108748, 0.498860, 0.498879]]


def test_weights_of_version_0_1_0_give_the_same_output():
    model = ConditionalDETR.from_pretrained(LAST)
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 80))
    torch.testing.assert_close(output.logits[-1, 0], torch.tensor(LOGITS), rtol=0, atol=1e-5)
    torch.testing.assert_close(output.boxes[-1, 0], torch.tensor(BOXES), rtol=0, atol=1e-5)
    assert model.metadata == Metadata(("cell, red", "cell, white"), (1, 7), Preprocessing(64, 96))


def test_a_run_of_version_0_1_0_resumes_to_the_same_losses(tmp_path):
    shutil.copytree(LAST, tmp_path / "last")
    sizes = {"num_queries": 5, "width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 16}
    architecture = Config(num_classes=2, **sizes, dropout=0.0, backbone="test_resnet", backbone_stage=1)
    model = ConditionalDETR(architecture, Metadata(("cell, red", "cell, white"), (1, 7), Preprocessing(64, 96)))
    rates = {"lr": 1e-3, "backbone_lr": 5e-4, "warmup": 0, "schedule": "constant"}
    config = TrainConfig(epochs=2, batch_size=2, **rates, ema=0.0, workers=0, save_every=100)
    message = r"an earlier version wrote it, without preprocessing, .*, dtype: these could not be compared$"
    with pytest.warns(UserWarning, match=message) as warned:
        result = train(model, Rectangles(4), None, config, folder=tmp_path, resume=True, progress=False)
    assert len(warned) == 1
    assert result.steps == 4
    assert [entry["step"] for entry in result.history] == [2, 4]
    losses = {entry["step"]: entry["loss"] for entry in steps_of(tmp_path)}
    assert losses == pytest.approx({3: 6.730323314666748, 4: 7.222823143005371}, rel=1e-4)
    state = torch.load(result.last / STATE, weights_only=True)
    assert state["format"] == FORMAT == 4
    assert state["settings"]["images"] == 4


def test_all_parts_of_an_old_state_are_upgraded(tmp_path):
    """A state with a moving average and query groups resumes in the old format like in the new one."""
    config = replace(RESUMED, epochs=1, workers=0)
    train(small_model(), Rectangles(6), None, config, folder=tmp_path / "new", progress=False)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    state = torch.load(tmp_path / "old" / "last" / STATE, weights_only=True)
    del state["format"], state["settings"]["model"]
    for part in ("model", "average"):
        state[part] = {name.replace("backbone.body.", "backbone.trunk."): value for name, value in state[part].items()}
        assert any("backbone.trunk." in name for name in state[part])
    settings = state["settings"]
    settings["pictures"] = settings.pop("images")
    focal = "alpha=0.25, gamma=2.0"
    assert settings["criterion"].count(f"class_loss=FocalLoss({focal})") == 2
    settings["criterion"] = settings["criterion"].replace(f"class_loss=FocalLoss({focal})", focal)
    settings["architecture"], settings["classes"] = repr(small_model().config), "('red', 'blue')"
    for name in (
        "preprocessing",
        "augmentation",
        "data_seed",
        "annotations",
        "validation",
        "frozen_parameters",
        "dtype",
    ):
        del settings[name]
    torch.save(state, tmp_path / "old" / "last" / STATE)
    models = [small_model(), small_model()]
    for model, which in zip(models, ("new", "old"), strict=True):
        longer = replace(config, epochs=2)
        with pytest.warns(UserWarning, match="epochs: got 2|could not be compared") as warned:
            train(model, Rectangles(6), None, longer, folder=tmp_path / which, resume=True, progress=False)
        messages = [str(warning.message) for warning in warned]
        assert sum("an earlier version wrote it" in text for text in messages) == (which == "old")
        assert "epochs: got 2, not 1 as before: the first 2 steps had other learning rates" in messages[-1]
    assert len(steps_of(tmp_path / "new")) == 4
    assert steps_of(tmp_path / "old") == steps_of(tmp_path / "new")
    assert_same(*models)


def test_other_settings_and_newer_formats_are_refused(tmp_path):
    shutil.copytree(LAST, tmp_path / "last")
    with pytest.raises(ValueError, match=r"training_state\.pt: expected the settings .* images 6, not 4"):
        train(small_model(), Rectangles(6), None, TrainConfig(), folder=tmp_path, resume=True, progress=False)
    state = torch.load(LAST / STATE, weights_only=True)
    torch.save({**state, "format": 5}, tmp_path / "last" / STATE)
    with pytest.raises(ValueError, match=r"training_state\.pt: expected a training state of format 4, got format 5$"):
        train(small_model(), Rectangles(4), None, TrainConfig(), folder=tmp_path, resume=True, progress=False)
