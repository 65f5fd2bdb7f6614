"""What belongs together is compared before the first step: classes, preprocessing, modules, images, settings."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from conditional_detr import ConditionalDETR, Config, Metadata, Preprocessing
from conditional_detr.data.augmentation import Augmentation
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.consistency import MatchedClasses, describe_shared_images, match_classes
from conditional_detr.training.loop import train
from conditional_detr.training.optimizer import fit_warmup
from helpers.training_runs import Rectangles, small_model, steps_of

SIZE = Preprocessing(shortest_edge=48, longest_edge=64)
ONE = TrainConfig(epochs=1, batch_size=4, workers=0, schedule="constant")
TINY = {"num_queries": 5, "width": 16, "heads": 2, "encoder_layers": 0, "decoder_layers": 1, "feedforward": 16}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return write_shapes(folder, 4, seed=0, split="train", size=(64, 80)), folder / "train"


def model_of(metadata):
    torch.manual_seed(0)
    config = Config(num_classes=len(metadata.class_names), **TINY, dropout=0.0, backbone="test_resnet")
    return ConditionalDETR(replace(config, backbone_stage=1), metadata)


def run(model, data, folder, config=ONE, val=None, **options):
    return train(model, data, val, config, folder=folder, progress=False, **options)


# ---- classes and preprocessing


def test_classes_in_another_order_are_matched_by_name(shapes, tmp_path):
    """The loss of each step is that of a dataset in the model's order; a Subset is looked into."""
    names = CocoData(*shapes).class_names
    ordered, reverse = (CocoData(*shapes, preprocessing=SIZE, class_names=order) for order in (names, names[::-1]))
    metadata = ordered.metadata
    run(model_of(metadata), ordered, tmp_path / "same")
    run(model_of(metadata), reverse, tmp_path / "reverse", val=reverse)
    run(model_of(metadata), Subset(reverse, range(4)), tmp_path / "subset")
    (same,), (other,), (subset,) = (steps_of(tmp_path / name) for name in ("same", "reverse", "subset"))
    assert other == same
    assert subset["class"] == pytest.approx(same["class"], rel=1e-5)
    matched = match_classes(model_of(metadata), reverse, "train_data")
    assert matched.rows.tolist() == [5, 4, 3, 2, 1, 0]
    assert [matched[i][1]["labels"].tolist() for i in range(4)] == [ordered[i][1]["labels"].tolist() for i in range(4)]
    assert matched.shapes == reverse.shapes
    assert len(pickle.loads(pickle.dumps(MatchedClasses(Rectangles(3), [1, 0])))) == 3


def test_validation_on_training_images_is_reported(shapes, tmp_path, capsys):
    """By the paths of the images, however they were given; other images are not reported."""
    data = CocoData(*shapes, preprocessing=SIZE)
    again = CocoData(shapes[0], shapes[1] / ".." / shapes[1].name, preprocessing=SIZE)
    train(model_of(data.metadata), data, again, ONE, folder=tmp_path / "shared")
    assert "4 of the 4 validation images are training images, too, such as" in capsys.readouterr().err
    unnamed = Rectangles(4)
    unnamed.annotations = data.annotations
    assert describe_shared_images(unnamed, data) == describe_shared_images(data, unnamed) == ""
    other = CocoData(
        write_shapes(tmp_path, 2, seed=0, split="val", size=(64, 80)), tmp_path / "val", preprocessing=SIZE
    )
    train(model_of(data.metadata), data, other, ONE, folder=tmp_path / "other")
    assert "training images, too" not in capsys.readouterr().err
    with pytest.raises(NotADirectoryError, match=r"instances_train\.json: expected a folder for the run, got a file"):
        run(model_of(data.metadata), data, shapes[0])


def test_classes_that_cannot_be_matched_are_refused(shapes, tmp_path):
    data = CocoData(*shapes, preprocessing=SIZE)
    message = (
        r"^train_data: expected the classes of the model, \('red', 'blue'\), got \('disc', 'square', .*'cross'\);"
        r" load the model with from_pretrained\(\.\.\., class_names=data\.class_names\)"
    )
    with pytest.raises(ValueError, match=message):
        run(small_model(), data, tmp_path / "run")
    twice = Metadata((*data.class_names, "disc"), preprocessing=SIZE)  # two classes of one name
    with pytest.raises(ValueError, match=r"^val_data: expected the classes of the model"):
        run(model_of(twice), Rectangles(4), tmp_path / "run", val=data)
    parts = ConcatDataset([data, CocoData(*shapes, preprocessing=SIZE, class_names=data.class_names[::-1])])
    with pytest.raises(ValueError, match=r"^train_data: expected parts with the same classes in the same order"):
        run(model_of(data.metadata), parts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_preprocessing_is_refused(shapes, tmp_path):
    data = CocoData(*shapes, preprocessing=SIZE)
    for other in (Preprocessing(32, 64), replace(SIZE, std=(0.5, 0.5, 0.5))):
        model = model_of(replace(data.metadata, preprocessing=other))
        with pytest.raises(
            ValueError, match=r"^train_data: expected the preprocessing of the model, Preproc.*, got Pre"
        ):
            run(model, data, tmp_path / "run")
        with pytest.raises(ValueError, match=r"^val_data: expected the preprocessing of the model"):
            run(model, Rectangles(4), tmp_path / "run", val=Subset(data, [0]))
    assert not (tmp_path / "run").exists()


# ---- modules


def test_modules_that_checkpoints_cannot_store_are_refused_before_the_first_step(tmp_path):
    model = small_model()
    model.class_head = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"^model: cannot be saved: class_head\.weight: missing"):
        run(model, Rectangles(4), tmp_path / "run")
    model = small_model()
    model.class_head = nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r"class_head\.weight: expected \(2, 32\), got \(5, 32\)"):
        run(model, Rectangles(4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_own_modules_with_the_same_parameters_train_with_a_warning(tmp_path):
    class Head(nn.Linear):
        pass

    model = small_model()
    model.class_head = Head(32, 2)
    message = r"^model: checkpoints store weights, not classes of modules: class_head is a Head, restored as Linear$"
    with pytest.warns(UserWarning, match=message):
        result = run(model, Rectangles(4), tmp_path)
    saved = ConditionalDETR.from_pretrained(result.last)
    assert torch.equal(saved.class_head.weight, model.class_head.weight)


@pytest.mark.parametrize(("wrap", "hint"), [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_a_wrapped_model_is_refused(tmp_path, wrap, hint):
    with pytest.raises(TypeError, match=f"^model: expected a ConditionalDETR or DETR, got .*; pass its model.{hint}$"):
        run(wrap(small_model()), Rectangles(4), tmp_path)


# ---- images


def test_all_images_are_checked_before_the_first_step(shapes, tmp_path):
    content = json.loads(shapes[0].read_text())
    for entry in content["images"][:2]:
        entry["width"] = 90
    data = CocoData(content, shapes[1], preprocessing=SIZE)
    first = content["images"][0]["file_name"]
    message = rf"^2 of the 4 images of annotations cannot be used: .*{first}: expected 90 x 64 pixels, .* got 80 x 64"
    with pytest.raises(ValueError, match=message):
        run(model_of(data.metadata), data, tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()
    with pytest.raises(ValueError, match=r"expected 90 x 64 pixels, .*; there is no checkpoint yet"):
        run(model_of(data.metadata), data, tmp_path / "run", check=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_break_later_are_skipped_up_to_a_limit(shapes, tmp_path, workers):
    """Two of four images are cut off in two batches of two; a batch without a good image gets another one."""
    folder = tmp_path / "images"
    folder.mkdir()
    content = json.loads(shapes[0].read_text())
    for i, entry in enumerate(content["images"]):
        Image.open(shapes[1] / entry["file_name"]).save(folder / f"{i}.jpg")
        entry["file_name"] = f"{i}.jpg"
    for i in (1, 2):
        (folder / f"{i}.jpg").write_bytes((folder / f"{i}.jpg").read_bytes()[:700])
    data = CocoData(content, folder, preprocessing=SIZE)
    config = replace(ONE, epochs=2, batch_size=1, max_bad_images=2, workers=workers)
    with pytest.warns(
        UserWarning, match=r"the image cannot be read.*; skipped image \d, .*\.jpg, \d of at most 2"
    ) as all_:
        result = run(model_of(data.metadata), data, tmp_path / "run", config)
    assert len(all_) == 2
    assert result.steps == 8
    state = torch.load(result.last / "training_state.pt", weights_only=True)
    assert sorted(state["bad_images"]) == [1, 2]
    message = r"expected at most 1 such images \(max_bad_images\), got 2; (there is no|the last good) checkpoint"
    with pytest.raises(OSError, match=message), pytest.warns(UserWarning, match="1 of at most 1 such images"):
        run(model_of(data.metadata), data, tmp_path / "few", replace(config, max_bad_images=1))


# ---- resume


def test_resume_reports_each_difference_of_data_and_model(shapes, tmp_path):
    content = json.loads(shapes[0].read_text())
    small = Augmentation.small()
    data = CocoData(content, shapes[1], preprocessing=SIZE, augmentation=small)
    run(model_of(data.metadata), data, tmp_path)
    fewer = {**content, "annotations": content["annotations"][:3]}
    turned = {**content, "images": content["images"][::-1]}
    options = {"preprocessing": SIZE, "augmentation": small}
    others = [
        (CocoData(content, shapes[1], preprocessing=SIZE), r"got augmentation 'Augmentation\(horizontal_flip=0.0, "),
        (CocoData(content, shapes[1], **options, seed=1), "got data_seed '1', not '0'; only workers"),
        (CocoData(fewer, shapes[1], **options), "got annotations '[0-9a-f]{64}', not '[0-9a-f]{64}'; only workers"),
        (CocoData(turned, shapes[1], **options), "got annotations "),
        (Subset(data, [0, 1, 3, 2]), "got annotations "),
        (
            CocoData(content, shapes[1], augmentation=small, preprocessing=Preprocessing(32, 64)),
            "got preprocessing.shortest_edge 32, not 48; only workers",
        ),
    ]
    for other, message in others:
        model = model_of(replace(data.metadata, preprocessing=getattr(other, "preprocessing", SIZE)))
        with pytest.raises(ValueError, match=f"expected the settings that this run began with, {message}"):
            run(model, other, tmp_path, replace(ONE, epochs=2), resume=True)
    frozen = model_of(data.metadata)
    frozen.encoder.requires_grad_(False)
    frozen.class_head.requires_grad_(False)
    both = r"got lr 0.5, not 0.0001, data_seed '1', not '0', frozen_parameters '\d+ \(\w+\)', not"
    seeded = CocoData(content, shapes[1], **options, seed=1)
    with pytest.raises(ValueError, match=both):
        run(frozen, seeded, tmp_path, replace(ONE, epochs=2, lr=0.5), resume=True)
    assert run(model_of(data.metadata), data, tmp_path, replace(ONE, epochs=2), resume=True).steps == 2


def test_only_other_learning_rates_of_completed_steps_warn(tmp_path):
    """A constant rate does not depend on the epochs, nor does a step schedule before its drop."""
    for schedule, epochs in (("constant", 5), ("step", 3)):
        config = replace(ONE, schedule=schedule, epochs=2)
        folder = tmp_path / schedule
        run(
            small_model(), Rectangles(4), folder, replace(config, epochs=1, drop_at=1.0 if schedule == "step" else 0.8)
        )
        later = replace(config, epochs=epochs, drop_at=1.0 if schedule == "step" else 0.8)
        assert run(small_model(), Rectangles(4), folder, later, resume=True).steps == epochs
    cosine = replace(ONE, schedule="cosine")
    run(small_model(), Rectangles(8), tmp_path / "cosine", cosine)
    with pytest.warns(
        UserWarning, match="^epochs: got 2, not 1 as before: the first 2 steps had other learning rates"
    ):
        run(small_model(), Rectangles(8), tmp_path / "cosine", replace(cosine, epochs=2), resume=True)


@pytest.mark.parametrize(
    ("warmup", "steps", "fitted"), [(50, 27, 3), (50, 99, 10), (50, 100, 50), (4, 9, 4), (1, 1, 1)]
)
def test_a_warm_up_of_more_than_half_of_the_run_becomes_a_tenth(warmup, steps, fitted):
    config = replace(ONE, warmup=warmup)
    assert fit_warmup(config, steps) == replace(config, warmup=fitted)


def test_a_shorter_warm_up_is_reported(tmp_path, capsys):
    train(small_model(), Rectangles(12), None, replace(ONE, warmup=50), folder=tmp_path)
    assert "warm-up of 1 steps instead of 50: the whole run has 3 steps\n" in capsys.readouterr().err
    assert [entry["lr"] for entry in steps_of(tmp_path)] == [1e-4] * 3
