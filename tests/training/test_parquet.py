"""Training on images in Parquet files: the same numbers whoever reads them, resumed or not, and the command line."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import Subset
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Preprocessing
from conditional_detr.cli import app
from conditional_detr.data.augmentation import Augmentation
from conditional_detr.data.batching import batches
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.formats.conversion import convert_data
from conditional_detr.data.formats.parquet import find_shards, open_shards
from conditional_detr.data.parquet import ParquetData
from conditional_detr.data.row_groups import ShardImages
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.evaluation.coco import evaluate
from conditional_detr.training.callbacks import Callback
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loop import train
from helpers.object_store import KEYS, object_store
from helpers.training_runs import SMALL, steps_of

SIZES = Preprocessing(64, 96)
CONFIG = TrainConfig(epochs=2, batch_size=3, workers=0, save_every=2, warmup=2, lr=1e-4, backbone_lr=1e-5)


class StopAt(Callback):
    """Ends a run with an error in a step, as a machine does that fails."""

    def __init__(self, step=0):
        self.at = step

    def step(self, entry):
        if entry["step"] == self.at:
            raise RuntimeError("the machine fails")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Shapes in COCO's form, in two splits."""
    folder = tmp_path_factory.mktemp("source")
    for split, count in (("train", 14), ("val", 5)):
        write_shapes(folder, count, seed=0, split=split, size=(64, 96))
    return folder


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    """The same in Parquet files, with row groups of four images."""
    folder = tmp_path_factory.mktemp("shards")
    for written in convert_data(source, folder, to="parquet"):
        (file,) = written.files
        pq.write_table(pq.read_table(file), file, row_group_size=4)
    return folder


def fit(shards, folder, *, stop_at=0, resume=False, buffer=6, **changes):
    """Train a small model on the shards; the validation is on those of the split val."""
    augmentation = Augmentation.paper(64)
    data = ParquetData(shards, augmentation=augmentation, preprocessing=SIZES, shuffle_buffer=buffer)
    torch.manual_seed(0)
    model = ConditionalDETR(replace(SMALL, num_classes=len(data.class_names), dropout=0.1), data.metadata)
    options = {"callbacks": [StopAt(stop_at)], "resume": resume, "progress": False}
    return model, train(model, data, None, replace(CONFIG, **changes), folder=folder, **options)


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return fit(shards, folder)[0].weights_digest(), [entry["loss"] for entry in steps_of(folder)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_stops_in_an_epoch_resumes_to_the_same_weights(shards, uninterrupted, tmp_path, workers):
    """Of two epochs of five steps, stopped in step 8; the last checkpoint is of step 6, in the second epoch."""
    with pytest.raises(RuntimeError, match=r"the machine fails; the last good checkpoint is .*, of step 6"):
        fit(shards, tmp_path / "run", stop_at=8, workers=workers)
    model, result = fit(shards, tmp_path / "run", resume=True, workers=workers)
    assert result.steps == 10
    assert model.weights_digest() == uninterrupted[0]
    assert [entry["loss"] for entry in steps_of(tmp_path / "run")] == uninterrupted[1]


def test_numbers_are_those_of_image_files_in_the_same_order(source, shards, uninterrupted, tmp_path, monkeypatch):
    """The order is that of the row groups; everything else is as with image files."""
    data = ParquetData(shards, preprocessing=SIZES, shuffle_buffer=6)
    files = CocoData(source, augmentation=Augmentation.paper(64), preprocessing=SIZES)
    monkeypatch.setattr(
        "conditional_detr.training.run.batches", lambda _, *given, **named: batches(data, *given, **named)
    )
    torch.manual_seed(0)
    model = ConditionalDETR(replace(SMALL, num_classes=len(files.class_names), dropout=0.1), files.metadata)
    train(model, files, None, CONFIG, folder=tmp_path, progress=False)
    assert [entry["loss"] for entry in steps_of(tmp_path)] == pytest.approx(uninterrupted[1], rel=1e-6)


def test_a_run_does_not_resume_in_another_order(shards, tmp_path):
    with pytest.raises(RuntimeError, match="the machine fails"):
        fit(shards, tmp_path / "run", stop_at=3)
    with pytest.raises(ValueError, match=r"sharding 'Sharding\(row_groups=4, shuffle_buffer=7, .*, not .*=6"):
        fit(shards, tmp_path / "run", resume=True, buffer=7)


def test_row_groups_are_not_read_for_single_images(shards, tmp_path):
    data = ParquetData(shards, preprocessing=SIZES)
    model = ConditionalDETR(replace(SMALL, num_classes=len(data.class_names)), data.metadata)
    with pytest.raises(TypeError, match="expected a dataset that reads row groups as it is, got it in a Subset"):
        train(model, Subset(data, [0, 1]), None, CONFIG, folder=tmp_path)
    with pytest.raises(ValueError, match="balanced: expected image files"):
        train(model, data, None, replace(CONFIG, balanced=True), folder=tmp_path)


def test_labels_are_matched_by_name(shards, uninterrupted, tmp_path):
    """A model whose classes are in another order trains on the same shards."""
    data = ParquetData(shards, augmentation=Augmentation.paper(64), preprocessing=SIZES, shuffle_buffer=6)
    names = data.class_names[::-1]
    torch.manual_seed(0)
    metadata = replace(data.metadata, class_names=names)
    model = ConditionalDETR(replace(SMALL, num_classes=len(names), dropout=0.1), metadata)
    train(model, data, None, CONFIG, folder=tmp_path, progress=False)
    losses = [entry["loss"] for entry in steps_of(tmp_path)]
    assert losses != uninterrupted[1]
    assert losses == pytest.approx(uninterrupted[1], rel=0.05)


def test_bad_images_are_skipped_up_to_the_limit(shards, tmp_path):
    """One image whose bytes are no image; the others of its row group are used."""
    for file in shards.iterdir():
        table = pq.read_table(file)
        if file.name.startswith("train"):
            images = table["image"].to_pylist()
            images[5] = {"bytes": b"text", "path": "5.jpg"}
            table = table.set_column(
                0, table.schema.field("image"), pa.array(images, table.schema.field("image").type)
            )
        pq.write_table(table, tmp_path / file.name, row_group_size=4)
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet#5: .*image"):
        fit(tmp_path, tmp_path / "run", workers=2)
    with pytest.warns(UserWarning, match=r"skipped .*train-00000-of-00001\.parquet#5, 1 of at most 1"):
        assert fit(tmp_path, tmp_path / "again", max_bad_images=1)[1].steps == 10


def test_files_in_an_object_store_give_the_same_run(shards, uninterrupted, tmp_path, monkeypatch):
    """By S3's protocol, with two workers, which are forked from the process that reads."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    with object_store() as store:
        uri = store.put(shards, "shards")
        assert [name.partition("?")[0] for name in find_shards(uri)["val"]] == [
            "s3://bucket/shards/val-00000-of-00001.parquet"
        ]
        model, _ = fit(uri, tmp_path / "run", workers=2)
        assert model.weights_digest() == uninterrupted[0]
        trained = ConditionalDETR.from_pretrained("shapes")
        val, here = open_shards(uri, split="val"), open_shards(shards, split="val")
        got, expected = (evaluate(trained, x.annotations, ShardImages(x)) for x in (val, here))
        assert got == expected


def test_metrics_are_those_of_image_files(source, shards):
    """AP, and AP by area, on the original images, whatever they are read from."""
    model = ConditionalDETR.from_pretrained("shapes")
    expected = evaluate(model, source, split="val")
    val = open_shards(shards, split="val")
    assert evaluate(model, val.annotations, ShardImages(val)).to_dict() == {
        **expected.metrics,
        "per_class": {
            name: {**of_class, "category_id": of_class["category_id"] - 1}  # rows of a ClassLabel count from 0
            for name, of_class in expected.per_class.items()
        },
    }
    with pytest.raises(ValueError, match=r"images: expected one for each image of .*, got 5 of 5 without, such as 1"):
        evaluate(model, val.annotations, {})


def test_a_bad_image_of_the_validation_is_named(shards):
    val = open_shards(shards, split="val")
    images = {**ShardImages(val), 3: b"text"}

    with pytest.raises(ValueError, match=r"val-00000-of-00001\.parquet#2: expected an image"):
        evaluate(ConditionalDETR.from_pretrained("shapes"), val.annotations, images)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.filterwarnings("default")
def test_commands_convert_train_and_evaluate(source, shards, tmp_path):
    """The AP of training is that of the command, on Parquet files and on image files."""
    code, text = run("convert-data", "--data", source, "--to", "parquet", "--output", tmp_path / "shards")
    assert (code, text.count("wrote ")) == (0, 2)
    assert "train-00000-of-00001.parquet: 14 images in" in text
    options = ("--weights", "shapes", "--epochs", 1, "--batch-size", 2, "--workers", 0)
    code, text = run("train", "--data", shards, *options, "--output", tmp_path / "run")
    assert code == 0, text
    best = tmp_path / "run" / "best"
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (ap,) = (entry["AP"] for entry in entries if "AP" in entry)
    for data in (shards, source):
        code, text = run("evaluate", "--data", data, "--weights", best, "--json", tmp_path / f"{data.name}.json")
        assert code == 0, text
        assert json.loads((tmp_path / f"{data.name}.json").read_text())["AP"] == pytest.approx(ap, abs=1e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--images", "here"), "--images: expected none for Parquet files, got here"),
        (("--format", "coco"), "--format: expected none for Parquet files, got coco"),
        (("--split", "0.8/0.2"), "--split: expected none for Parquet files, got 0.8/0.2"),
        (("--cache", "ram"), "--cache: expected none for Parquet files, got ram"),
        (("--rotated", "hull"), "--rotated: expected none for Parquet files, got hull"),
    ],
)
def test_options_of_image_files_are_refused(shards, tmp_path, option, message):
    code, text = run("train", "--data", shards, "--weights", "shapes", "--output", tmp_path / "run", *option)
    assert (code, message in text) == (2, True), text
