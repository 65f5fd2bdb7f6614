"""Datasets and runs shared by the training tests, small enough to train in seconds."""

import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from conditional_detr import ConditionalDETR, Config, Metadata
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.logging import RunLogger
from conditional_detr.training.loop import train

COLOURS = torch.tensor([[2.0, -2.0, 0.0], [-2.0, 0.0, 2.0]])
SMALL = Config(
    num_classes=2,
    num_queries=10,
    width=32,
    heads=4,
    encoder_layers=1,
    decoder_layers=2,
    feedforward=64,
    backbone="resnet18",
    backbone_stage=2,
)


class Rectangles:
    """In-memory dataset: images of noise with one to three rectangles in the colours of two classes.

    Args:
        images: number of images.
        times: number of repetitions of each image.
        noise: amount of noise that every sample draws from the global generators, as an augmentation does.
        seed: seed of the images.
        size: side length in pixels.
    """

    def __init__(self, images, *, times=1, noise=0.0, seed=0, size=64):
        self.samples = [self._draw(torch.Generator().manual_seed(1000 * seed + i), size) for i in range(images)]
        self.times = times
        self.noise = noise
        self.epochs = []

    @staticmethod
    def _draw(generator, size):
        pixels = torch.randn(3, size, size, generator=generator) * 0.2
        boxes, labels = [], []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            sides = (torch.rand(2, generator=generator) * 0.25 + 0.2) * size
            corner = torch.rand(2, generator=generator) * (size - sides)
            (x0, y0), (x1, y1) = corner.int().tolist(), (corner + sides).int().tolist()
            labels.append(int(torch.randint(0, 2, (), generator=generator)))
            pixels[:, y0:y1, x0:x1] = COLOURS[labels[-1]][:, None, None]
            boxes.append([(x0 + x1) / 2 / size, (y0 + y1) / 2 / size, (x1 - x0) / size, (y1 - y0) / size])
        return pixels, {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes)}

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __len__(self):
        return self.times * len(self.samples)

    def __getitem__(self, index):
        pixels, target = self.samples[index % len(self.samples)]
        if self.noise:
            pixels = pixels + self.noise * (torch.randn(pixels.shape) + random.random())
        return pixels, target


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    return ConditionalDETR(replace(SMALL, **changes), Metadata(("red", "blue")))


def steps_of(folder):
    """Return the step entries of a run's log."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


RESUMED = TrainConfig(
    epochs=3,
    batch_size=2,
    accumulation=2,
    lr=1e-3,
    backbone_lr=5e-4,
    warmup=4,
    schedule="cosine",
    ema=0.9,
    query_groups=2,
    save_every=2,
)
"""3 steps an epoch on 11 images: checkpoints of steps 2, 3, 4, 6, 8, 9."""


def resumable(folder, *, workers, resume=False):
    """Train the run that is killed and resumed: dropout, noise from the global generators, accumulation."""
    data, config = Rectangles(11, noise=0.1), replace(RESUMED, workers=workers)
    model = small_model(dropout=0.1)
    return model, train(model, data, Rectangles(3, seed=1), config, folder=folder, resume=resume, progress=False)


def killed_at(folder, step, workers, threads):
    """Train in a separate process, which is killed while it logs the step."""
    torch.set_num_threads(threads)
    plain = RunLogger.log_step

    def step_and_die(self, entry):
        plain(self, entry)
        if entry["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLogger.log_step = step_and_die
    resumable(Path(folder), workers=workers)


class Slow(Rectangles):
    """Images that take as long as those of a real dataset: a step can be caught in the middle of an epoch."""

    def __getitem__(self, index):
        time.sleep(0.4)
        return super().__getitem__(index)


def five_steps(folder, *, batch_size, data=None, **options):
    """Train five steps of four images in total; some images have no target, others up to three."""
    data = data or Rectangles(20)
    for i in (1, 6, 13):
        data.samples[i] = (
            data.samples[i][0],
            {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
        )
    rates = {"lr": 1e-4, "backbone_lr": 1e-5, "warmup": 2}
    config = TrainConfig(epochs=1, batch_size=batch_size, workers=0, save_every=1, **rates)
    model = small_model(dropout=0.0)
    val = Rectangles(5, seed=1)
    return model, train(model, data, val, config, folder=folder, progress=False, **options)


def timed(folder, limit):
    """Train for some seconds, and write what this process has found."""
    config = TrainConfig(epochs=1, batch_size=2, workers=0, schedule="cosine", warmup=3, time_limit=limit)
    model, began = small_model(), time.time()
    result = train(model, Rectangles(8), Rectangles(2, seed=1), config, folder=folder, progress=False)
    found = {"began": began, "steps": result.steps, "history": result.history, "weights": model.weights_digest()}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":  # of accelerate launch or torchrun, in each of two processes on half of each batch
    kind, *arguments = sys.argv[1:]
    if kind == "timed":
        timed(Path(arguments[0]), float(arguments[1]))
    elif arguments == ["slow"]:
        five_steps(Path(kind), batch_size=2, data=Slow(20), resume=True)
    else:
        five_steps(Path(kind), batch_size=2)
    torch.distributed.destroy_process_group()
