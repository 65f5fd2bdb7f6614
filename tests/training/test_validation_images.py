"""Images of the validation data in TensorBoard."""

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from conditional_detr import ConditionalDETR, Preprocessing
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.training import TrainConfig, train
from helpers.training_runs import SMALL, Rectangles, small_model, steps_of


def board_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


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


def test_samples_without_image_files_are_trained_without_images(tmp_path):
    config = TrainConfig(epochs=1, batch_size=2, workers=0)
    train(small_model(), Rectangles(2), Rectangles(2, seed=1), config, folder=tmp_path, progress=False)
    assert board_of(tmp_path).Tags()["images"] == []
    assert len(steps_of(tmp_path)) == 1
