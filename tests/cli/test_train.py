"""``conditional-detr train``: from COCO's json to a folder that detects; what is refused."""

import json
import os
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torchvision.models import resnet18
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing
from conditional_detr.cli import app
from conditional_detr.cli.train_data import Augment, make_augmentation
from conditional_detr.cli.train_model import with_dropout
from conditional_detr.cli.train_run import read_duration, weighted_criterion
from conditional_detr.data import image_cache
from conditional_detr.data.augmentation import Augmentation
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from conditional_detr.training.logging import RunLogger
from helpers.models import TINY_CONFIG, assert_same
from helpers.training_runs import steps_of


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for split, images in (("train", 8), ("val", 3)):
        write_shapes(folder, images, seed=0, split=split, size=(64, 96))
    return folder


def data_of(shapes, *, val=True):
    data = ["--data", shapes / "instances_train.json", "--images", shapes / "train"]
    if val:
        data += ["--val-data", shapes / "instances_val.json", "--val-images", shapes / "val"]
    return data


SHORT = ("--shortest-edge", 64, "--batch-size", 4, "--accumulation", 1, "--workers", 0)


@pytest.mark.filterwarnings("default")
def test_a_cache_changes_no_number_and_may_change_on_resume(shapes, small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = (*data_of(shapes, val=False), *SHORT, "--weights", small)
    told = {
        "ram": "cache: 8 images, 0.1 MB in memory\n",
        "disk": f"cache: 8 images, 0.1 MB in {tmp_path / 'cache' / 'conditional_detr' / 'images'}\n",
    }
    for epochs, cache in ((1, "ram"), (2, "disk"), (3, "disk"), (4, None)):
        chosen = ("--cache", cache) if cache else ()
        done = run("train", *options, "--output", tmp_path / "kept", "--epochs", epochs, "--resume", *chosen)
        assert done.exit_code == 0, done.output
        assert [text for text in told.values() if text in done.stderr] == ([told[cache]] if cache else [])
        done = run("train", *options, "--output", tmp_path / "plain", "--epochs", epochs, "--resume")
        assert done.exit_code == 0, done.output
        assert "cache" not in done.stderr
    assert len(steps_of(tmp_path / "kept")) == 8
    assert steps_of(tmp_path / "kept") == steps_of(tmp_path / "plain")
    assert len(list((tmp_path / "cache" / "conditional_detr" / "images").iterdir())) == 8
    refused = run("train", *options, "--output", tmp_path / "other", "--cache", "tape")
    assert refused.exit_code == 2
    assert "'tape' is not one of 'ram', 'disk'" in " ".join(refused.stderr.replace("│", " ").split())
    assert not (tmp_path / "other").exists()


def test_images_that_do_not_fit_in_the_cache(shapes, small, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "_free_memory", lambda: 1e5)
    options = (*data_of(shapes, val=False), *SHORT, "--weights", small, "--output", tmp_path / "run")
    refused = run("train", *options, "--cache", "ram")
    assert (refused.exit_code, (tmp_path / "run").exists()) == (2, False)
    assert refused.stderr == (
        "error: cache: expected at most 0.1 MB, 80% of the free memory, got 8 images of 0.1 MB; use cache='disk'\n"
    )


@pytest.mark.filterwarnings("default")
def test_fine_tunes_weights_resumes_and_detects(shapes, small, tmp_path):
    """The classes are the data set's, their loss starts low; --resume needs no --weights."""
    output = tmp_path / "run"
    options = (*data_of(shapes), *SHORT, "--output", output)
    begun = run("train", *options, "--weights", small, "--epochs", 1)
    assert begun.exit_code == 0, begun.output
    assert "best AP 0.0" in begun.stdout
    assert f"after 2 steps: {output / 'last'}" in begun.stdout
    assert "after the first epoch, on 8 training images with" in begun.stderr
    first, second = steps_of(output)
    assert first["class"] < 2  # new rows begin at the prior; boxes of random weights are anywhere
    model = ConditionalDETR.from_pretrained(output / "best")
    assert model.metadata.class_names == CLASS_NAMES
    categories = json.loads((shapes / "instances_train.json").read_text())["categories"]
    assert list(model.metadata.category_ids) == [category["id"] for category in categories]
    assert (model.metadata.preprocessing.shortest_edge, model.metadata.preprocessing.longest_edge) == (64, 107)
    again = run("train", *options, "--weights", small, "--epochs", 1)
    assert again.exit_code == 2
    assert "resume that run, or use another folder" in again.stderr
    resumed = run("train", *options, "--resume", "--epochs", 2)
    assert resumed.exit_code == 0, resumed.output
    assert "warning: epochs: got 2, not 1 as before: the first 2 steps had other learning rates" in resumed.stderr
    assert [entry["step"] for entry in steps_of(output)] == [1, 2, 3, 4]
    assert steps_of(output)[:2] == [first, second]
    image = next((shapes / "val").iterdir())
    assert len(Detector.from_pretrained(output / "best")(image, threshold=0)) == 66
    measured = run("evaluate", *data_of(shapes, val=False), "--weights", output / "best")
    assert measured.exit_code == 0, measured.output


def test_untrained_of_an_architecture(shapes, tmp_path):
    architecture = "backbone=resnet18 backbone_stage=2,width=32 heads=4 encoder_layers=0 decoder_layers=1 dropout=0.0"
    options = (*data_of(shapes, val=False), *SHORT, "--architecture", architecture, "--num-queries", 9)
    settings = ("--preset", "from_scratch", "--augmentation", "none", "--epochs", 1, "--lr", 0.001, "--clip", 1)
    settings += ("--backbone-lr", 0, "--weight-decay", 0, "--warmup", 1, "--schedule", "cosine", "--ema", 0.9)
    settings += ("--patience", 1, "--evaluate-every", 1, "--save-every", 1, "--seed", 3, "--gradient-checkpointing")
    settings += ("--autocast", "bfloat16", "--longest-edge", 100)
    result = run("train", *options, *settings, "--weights", "none", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "best" not in result.stdout
    model = ConditionalDETR.from_pretrained(tmp_path / "last")
    config = model.config
    assert (config.width, config.heads, config.num_queries, config.num_classes, config.dropout) == (32, 4, 9, 6, 0.0)
    assert (config.encoder_layers, config.decoder_layers, config.backbone, config.backbone_stage) == (
        0,
        1,
        "resnet18",
        2,
    )
    saved = torch.load(tmp_path / "last" / "training_state.pt", weights_only=True)["settings"]
    expected = {"lr": 0.001, "clip": 1, "backbone_lr": 0, "weight_decay": 0, "warmup": 1, "schedule": "cosine"}
    expected |= {"ema": 0.9, "patience": 1, "save_every": 1, "seed": 3, "gradient_checkpointing": True}
    expected |= {"autocast": "bfloat16", "epochs": 1, "batch_size": 4, "workers": 0, "accumulation": 1}
    assert {name: saved[name] for name in expected} == expected


def test_a_backbone_that_has_weights(shapes, tmp_path):
    """It is filled, all else is drawn as without it; groups of queries and vertical flips are settings like any."""
    torch.manual_seed(1)
    tensors = resnet18().state_dict()
    torch.save(tensors, tmp_path / "resnet18.pth")
    architecture = "backbone=resnet18 backbone_stage=2 width=32 heads=4 encoder_layers=0 decoder_layers=1"
    options = (*data_of(shapes, val=False), *SHORT, "--weights", "none", "--architecture", architecture)
    options += ("--preset", "from_scratch", "--augmentation", "none", "--epochs", 1, "--backbone-lr", 0)
    options += ("--query-groups", 3, "--vertical-flip", "--output", tmp_path / "run")
    result = run("train", *options, "--backbone-weights", tmp_path / "resnet18.pth")
    assert result.exit_code == 0, result.output
    assert "resnet18.pth: all 50 tensors of the backbone, and 52 tensors that it does not have" in result.stderr
    backbone = ConditionalDETR.from_pretrained(tmp_path / "run" / "last").backbone.body.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in backbone.items())
    saved = torch.load(tmp_path / "run" / "last" / "training_state.pt", weights_only=True)
    assert saved["settings"]["query_groups"] == 3
    assert saved["other_queries"]["weight"].shape == (600, 32)


@pytest.mark.parametrize(("wish", "most"), [("none", 0.0), ("small", 0.2)])
def test_vertical_flips_and_turns_come_on_top(wish, most):
    make = partial(make_augmentation, preprocessing=Preprocessing(96, 128))
    augmentation = make(Augment(wish), vertical_flip=True, quarter_turn=False)
    assert (augmentation.vertical_flip, augmentation.quarter_turn, augmentation.brightness) == (0.5, 0.0, most)
    augmentation = make(Augment(wish), vertical_flip=False, quarter_turn=True)
    assert (augmentation.vertical_flip, augmentation.quarter_turn, augmentation.brightness) == (0.0, 0.5, most)
    assert make(Augment.NOTHING, vertical_flip=False, quarter_turn=False) is None


def test_the_papers_augmentation_has_the_size_that_the_model_detects_at():
    augmentation = make_augmentation(Augment.PAPER, Preprocessing(200, 333))
    assert augmentation.shortest_edges == (120, 128, 136, 144, 152, 160, 168, 176, 184, 192, 200)
    assert (augmentation.crop_edges, augmentation.crop_sides) == ((100, 125, 150), (96, 150))
    assert augmentation.longest_edge == 333
    assert make_augmentation(Augment.PAPER, Preprocessing()) == Augmentation.paper()


def test_another_dropout_and_the_same_weights(small):
    model = ConditionalDETR.from_pretrained(small)
    other = with_dropout(model, 0.25)
    assert (other.config.dropout, other.encoder.layers[0].dropout.p) == (0.25, 0.25)
    assert (other.decoder.layers[0].self_attention.dropout, other.metadata) == (0.25, model.metadata)
    assert_same(model, other)


def test_interrupted(shapes, small, tmp_path, monkeypatch):
    import signal

    plain = RunLogger.log_step

    def step_and_interrupt(self, entry):
        plain(self, entry)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunLogger, "log_step", step_and_interrupt)
    result = run("train", *data_of(shapes, val=False), *SHORT, "--weights", small, "--output", tmp_path)
    assert result.exit_code == 130
    assert f"interrupted; --resume continues from {tmp_path / 'last'}" in result.stderr
    assert len(steps_of(tmp_path)) == 1


def test_resume_needs_only_the_training_state_and_compares_the_options_of_the_model(shapes, small, tmp_path):
    """Damaged or missing files beside the state; the same options again; other ones, each refused."""
    output, weights = tmp_path / "run", ("--weights", small)
    options = (*data_of(shapes, val=False), *SHORT, "--schedule", "constant", "--output", output)
    assert run("train", *options, *weights, "--epochs", 1).exit_code == 0
    damages = (
        lambda: (output / "last" / "config.json").write_text(""),
        lambda: os.truncate(output / "last" / "model.safetensors", 1000),
        lambda: (output / "last" / "model.safetensors").unlink(),
    )
    for epochs, damage in enumerate(damages, start=2):
        damage()
        given = weights if epochs == 3 else ()
        resumed = run("train", *options, *given, "--num-queries", 11, "--resume", "--epochs", epochs)
        assert resumed.exit_code == 0, resumed.output
        assert len(steps_of(output)) == 2 * epochs
        ConditionalDETR.from_pretrained(output / "last")
    (output / "last" / "model.safetensors").unlink()
    finished = run("train", *options, "--resume", "--epochs", 4)
    assert finished.exit_code == 0, finished.output
    assert "the run is finished: all 4 epochs are done; nothing to train" in finished.stderr
    ConditionalDETR.from_pretrained(output / "last")
    other = ConditionalDETR.from_pretrained(small)
    torch.nn.init.ones_(other.projection.weight)
    other.save_pretrained(tmp_path / "other")
    for arguments, message in (
        (
            ("--weights", tmp_path / "other"),
            f"--weights: expected the weights that the run in {output} began with, got",
        ),
        (("--num-queries", 9), f"--num-queries: expected 11, as the run in {output} has, got 9"),
        ((*weights, "--num-queries", 9), "got architecture.num_queries 9, not 11; only workers"),
        (("--dropout", 0.25), "got architecture.dropout 0.25, not 0.1; only workers"),
        (("--architecture", "width=8"), "--architecture: expected --weights none with it, got 'width=8' alone"),
        (("--backbone-weights", "x.pth"), "--backbone-weights: expected --weights none with it, got 'x.pth' alone"),
        (("--shortest-edge", 32), "got preprocessing.shortest_edge 32, not 64, preprocessing.longest_edge "),
        (("--augmentation", "none"), "got augmentation 'Augmentation(horizontal_flip=0.0"),
    ):
        refused = run("train", *options, "--resume", "--epochs", 5, *arguments)
        assert refused.exit_code == 2, refused.output
        assert message in refused.stderr


@pytest.mark.filterwarnings("default")
def test_images_are_checked_unless_no_check_is_given(shapes, small, tmp_path):
    content = json.loads((shapes / "instances_train.json").read_text())
    content["images"][0]["height"] = 65
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    options = ("--data", tmp_path / "wrong.json", "--images", shapes / "train", *SHORT, "--weights", small)
    checked = run("train", *options, "--output", tmp_path / "a")
    assert checked.exit_code == 2
    assert "1 of the 8 images of" in checked.stderr
    assert not (tmp_path / "a" / "log.jsonl").exists()
    options += ("--no-check", "--max-bad-images", 1, "--epochs", 1)
    skipped = run("train", *options, "--output", tmp_path / "b")
    assert skipped.exit_code == 0, skipped.output
    assert ", 1 of at most 1 such images" in skipped.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--weights: expected a checkpoint to start from: a folder, a file, a hub id, or none for random"),
        (
            ("--weights", "none", "--architecture", "depth=3"),
            "--architecture: expected name=value with a name of model, num_",
        ),
        (
            ("--weights", "none", "--architecture", "width"),
            "--architecture: expected name=value with a name of model, num_",
        ),
        (("--weights", "none", "--architecture", "width=wide"), "width: expected int, got 'wide'"),
        (
            ("--weights", "{small}", "--architecture", "width=8"),
            "--architecture: expected none with --weights",
        ),
        (
            ("--weights", "{small}", "--backbone-weights", "x.pth"),
            "--backbone-weights: expected none with --weights",
        ),
        (("--weights", "none", "--backbone-weights", "missing.pth"), "missing.pth"),
        (("--weights", "none", "--epochs", "0"), "epochs: expected at least 1, got 0"),
        (("--weights", "none", "--val-images", "x"), "--val-images: expected --val-data with it, got x alone"),
        (("--weights", "nowhere/at-all"), "nowhere/at-all"),
        (  # before weights are looked for
            ("--weights", "nowhere/at-all", "--images", "gone"),
            "gone: expected the folder of the images, got a path that does not exist",
        ),
    ],
)
def test_what_cannot_begin_is_one_line(shapes, small, tmp_path, arguments, message):
    arguments = [argument.format(small=small) for argument in arguments]
    result = run("train", *data_of(shapes, val=False), "--output", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_without_the_packages_one_line_says_what_to_install(shapes, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = run("train", *data_of(shapes), *SHORT, "--weights", small, "--output", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "error: training needs accelerate, which is not installed: pip install 'conditional-detr[train]'"
    )


@pytest.mark.filterwarnings("default")
def test_options_that_fit_the_machine_and_the_data(shapes, small, tmp_path, monkeypatch):
    """They reach the run's settings; a resumed run keeps its batch size."""
    name = CLASS_NAMES[1]
    options = (*data_of(shapes, val=False), "--shortest-edge", 64, "--workers", 0, "--weights", small)
    options += ("--batch-size", "auto", "--freeze", "backbone", "--freeze", "encoder", "--layer-decay", 0.5)
    options += ("--balanced", "--class-weights", f"{name}=2.5", "--output", tmp_path / "run", "--resume")
    done = run("train", *options, "--epochs", 1)
    assert done.exit_code == 0, done.output
    assert "batch size 8 x accumulation 1, for 64 x 96: an estimate, as a CPU gives no signal" in done.stderr
    settings = torch.load(tmp_path / "run" / "last" / "training_state.pt", weights_only=True)["settings"]
    assert (settings["batch_size"], settings["accumulation"], settings["layer_decay"]) == (8, 1, 0.5)
    assert (settings["freeze"], settings["balanced"]) == (("backbone", "encoder"), True)
    assert settings["class_weights"] == tuple(2.5 if other == name else 1.0 for other in CLASS_NAMES)
    monkeypatch.setattr("conditional_detr.training.batch_fitting.free_memory", lambda: 0.0)
    again = run("train", *options, "--epochs", 2)
    assert again.exit_code == 0, again.output
    assert len(steps_of(tmp_path / "run")) == 2


def test_weights_of_classes_whose_names_have_spaces():
    model = ConditionalDETR(replace(TINY_CONFIG, num_classes=3), Metadata(("stop sign", "cat", "red cat")))
    criterion = weighted_criterion(model, "stop sign=2, red cat=1e-1")
    assert criterion.class_loss.class_weights == (2.0, 1.0, 0.1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--time-limit", "soon"), "--time-limit: expected a duration such as 2h, 1h30m, 45s or 3600, got 'soon'"),
        (("--time-limit", "0s"), "--time-limit: expected more than 0 seconds, got '0s'"),
        (("--class-weights", " , "), "--class-weights: expected class=number, each class once, got ' , '"),
        (("--class-weights", "disc=2 disc=3"), "--class-weights: expected class=number, each class once"),
        (("--batch-size", "many"), "--batch-size: expected a number of images, or auto, got 'many'"),
        (("--batch-size", "0"), "batch_size: expected at least 1, got 0"),
        (("--class-weights", "cat=2"), "--class-weights: expected class=number with a class of disc"),
        (("--class-weights", "disc=2 ring"), "got 'ring'"),
        (("--class-weights", "disc=2, ring=much"), "got 'ring=much'"),
        (("--class-weights", "=2"), "got '=2'"),
        (("--freeze", "neck"), "freeze: expected parts of the model, such as backbone,"),
    ],
)
def test_wrong_values_of_these_options(shapes, small, tmp_path, option, message):
    refused = run("train", *data_of(shapes, val=False), "--weights", small, "--output", tmp_path / "run", *option)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("90m", 5400), ("45s", 45), ("3600", 3600)]
)
def test_durations(text, seconds):
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1h30", "1m30", "1h1m5", "h", "30m1h", "1 h", "-1", "1e3", "2d"])
def test_durations_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match=rf"--time-limit: expected a duration such as .*, got '{text}'$"):
        read_duration(text)
