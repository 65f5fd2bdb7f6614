"""Images of the validation data in TensorBoard."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from conditional_detr import ConditionalDETR, Detections, Preprocessing, from_pretrained
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from conditional_detr.training import TrainConfig, run, train
from conditional_detr.training.logging import RunLogger
from helpers.training_runs import SMALL, Rectangles, small_model, steps_of


def board_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def datasets_of(folder):
    """Two drawn images for training and two for AP."""
    size = Preprocessing(shortest_edge=64, longest_edge=96)
    return [
        CocoData(write_shapes(folder, 2, seed=0, split=split, size=(64, 96)), folder / split, preprocessing=size)
        for split in ("train", "val")
    ]


def test_images_with_annotations_and_detections_are_in_tensorboard_when_ap_improves(tmp_path):
    size = Preprocessing(shortest_edge=64, longest_edge=96)
    train_data, val = (
        CocoData(write_shapes(tmp_path, n, seed=0, split=split, size=(64, 96)), tmp_path / split, preprocessing=size)
        for split, n in (("train", 2), ("val", 6))
    )
    model = ConditionalDETR(replace(SMALL, num_classes=len(train_data.class_names)), train_data.metadata)
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    train(model, train_data, val, config, folder=tmp_path / "run", progress=False)
    board = board_of(tmp_path / "run")
    assert sorted(board.Tags()["images"]) == [f"val/images/{i}" for i in range(4)]
    for i, index in enumerate((0, 1, 3, 4)):  # 6 · i / 4, rounded down
        (event,) = board.Images(f"val/images/{i}")
        got = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)), np.int64)
        photo = np.asarray(Image.open(val.describe(index)).convert("RGB"), np.int64)
        below = got[-photo.shape[0] :]  # the titles are above
        assert event.step == 1
        close = (np.abs(below[:, : photo.shape[1]] - photo).max(axis=2) <= 2).mean()
        assert 0.3 < close < 1  # the annotated half: the image, but for its boxes and names


def distance_to_drawing(drawn, photo, box):
    """The largest distance, over the middles of a box's sides, to the nearest pixel on its axis that is drawn on."""
    changed = np.abs(drawn - photo).max(axis=2) > 30
    x0, y0, x1, y1 = box
    middle_x, middle_y = round((x0 + x1) / 2), round((y0 + y1) / 2)
    columns, rows = np.flatnonzero(changed[middle_y]), np.flatnonzero(changed[:, middle_x])
    return max(
        *(np.abs(columns - side).min(initial=999) for side in (x0, x1)),
        *(np.abs(rows - side).min(initial=999) for side in (y0, y1)),
    )


def test_images_are_drawn_again_with_each_better_ap(tmp_path, monkeypatch):
    train_data, val = datasets_of(tmp_path)
    measured = iter([0.1, 0.05, 0.1, 0.3])
    monkeypatch.setattr(run, "measure", lambda *arguments: {"AP": (ap := next(measured)), "AP50": ap})
    model = ConditionalDETR(replace(SMALL, num_classes=len(train_data.class_names)), train_data.metadata)
    config = TrainConfig(epochs=4, batch_size=2, workers=0)
    train(model, train_data, val, config, folder=tmp_path / "run", progress=False)
    board = board_of(tmp_path / "run")
    assert [[event.step for event in board.Images(f"val/images/{i}")] for i in range(2)] == [[1, 4], [1, 4]]


def test_boxes_are_drawn_where_the_objects_are(tmp_path):
    """Annotations on the left, on the right what a trained model detects, which is close to them."""
    train_data, val = (
        CocoData(write_shapes(tmp_path, n, seed=seed, split=split), tmp_path / split, class_names=CLASS_NAMES)
        for split, n, seed in (("train", 2, 0), ("val", 3, 1))
    )
    model = from_pretrained("shapes")
    train_data.preprocessing = val.preprocessing = model.metadata.preprocessing
    config = TrainConfig(epochs=1, batch_size=2, workers=0, lr=1e-9, backbone_lr=0.0)
    train(model, train_data, val, config, folder=tmp_path / "run", progress=False)
    board = board_of(tmp_path / "run")
    assert sorted(board.Tags()["images"]) == [f"val/images/{i}" for i in range(3)]
    truth = COCO(str(tmp_path / "instances_val.json"))
    far = []
    for i in range(3):
        (event,) = board.Images(f"val/images/{i}")
        assert event.step == 1
        got = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)), np.int64)
        photo = np.asarray(Image.open(val.describe(i)).convert("RGB"), np.int64)
        assert (event.width, event.height) == got.shape[1::-1]
        below = got[-photo.shape[0] :]
        left, right = below[:, : photo.shape[1]], below[:, -photo.shape[1] :]
        for entry in truth.loadAnns(truth.getAnnIds(list(truth.imgs)[i])):
            x, y, width, height = entry["bbox"]
            assert distance_to_drawing(left, photo, (x, y, x + width, y + height)) <= 2
            far.append(distance_to_drawing(right, photo, (x, y, x + width, y + height)))
    assert np.mean(np.array(far) <= 8) >= 0.7  # AP50 of these weights is above 0.9


class Own(torch.utils.data.Dataset):
    """A dataset whose annotations are a file, which evaluations take, too."""

    def __init__(self, data, annotations, images):
        self.data, self.annotations, self.images = data, annotations, images

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def test_annotations_in_a_file_are_evaluated_without_images(tmp_path, recwarn):
    train_data, val = datasets_of(tmp_path)
    own = Own(val, tmp_path / "instances_val.json", tmp_path / "val")
    model = ConditionalDETR(replace(SMALL, num_classes=len(train_data.class_names)), train_data.metadata)
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    result = train(model, train_data, own, config, folder=tmp_path / "run", progress=False)
    assert result.best == tmp_path / "run" / "best"
    assert board_of(tmp_path / "run").Tags()["images"] == []
    assert not [one for one in recwarn if "validation images" in str(one.message)]


@pytest.mark.parametrize("fault", ["drawing", "writing"])
def test_images_that_fail_do_not_end_the_training(tmp_path, monkeypatch, fault):
    """After a warning it saves the checkpoints, and the numbers are those of a run whose images did not fail."""
    train_data, val = datasets_of(tmp_path)
    config = TrainConfig(epochs=2, batch_size=2, workers=0)

    def trained(name):
        torch.manual_seed(0)
        model = ConditionalDETR(replace(SMALL, num_classes=len(train_data.class_names)), train_data.metadata)
        return train(model, train_data, val, config, folder=tmp_path / name, progress=False)

    def fail(*_):
        raise RuntimeError("out of memory")

    trained("plain")
    owner, name = (Detections, "draw_beside") if fault == "drawing" else (RunLogger, "log_images")
    monkeypatch.setattr(owner, name, fail)
    with pytest.warns(UserWarning, match="no validation images in TensorBoard at step 1: out of memory"):
        result = trained("run")
    assert (result.steps, result.best) == (2, tmp_path / "run" / "best")
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "plain")
    for checkpoint in ("best", "last"):
        expected, got = (from_pretrained(tmp_path / name / checkpoint).state_dict() for name in ("plain", "run"))
        assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_samples_without_image_files_are_trained_without_images(tmp_path):
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    train(small_model(), Rectangles(2), Rectangles(2, seed=1), config, folder=tmp_path, progress=False)
    assert board_of(tmp_path).Tags()["images"] == []
    assert len(steps_of(tmp_path)) == 1
