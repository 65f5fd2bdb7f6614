"""The settings of a training run, and presets for the usual cases."""

import math
from dataclasses import dataclass

SCHEDULES: tuple[str, ...] = ("step", "cosine", "constant")
PRECISIONS: tuple[str | None, ...] = (None, "bfloat16", "float16")
_AT_LEAST_ONE = ("epochs", "batch_size", "accumulation", "evaluate_every", "save_every", "query_groups")
_AT_LEAST_ZERO = ("warmup", "patience", "workers", "seed", "max_bad_images")
_NOT_NEGATIVE = ("time_limit", "layer_decay", "lr", "backbone_lr", "weight_decay", "clip", "ema", "drop_at")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. The defaults are the paper's, except for the number of images a step.

    Change a preset with ``dataclasses.replace(TrainConfig.finetune(), epochs=10)``.

    Attributes:
        epochs: number of passes over the training data.
        time_limit: seconds after which the run ends, with its last evaluation and checkpoint, instead of after
            ``epochs``; 0: none. The schedule follows the time, so two such runs differ. A warm-up ends after a
            tenth of the limit at the latest.
        batch_size: images a forward pass in each process. A step uses batch_size x accumulation x processes images.
        accumulation: forward and backward passes a step; their gradients are those of the joined batch.
        lr: learning rate of AdamW.
        backbone_lr: learning rate of the backbone; 0 freezes it.
        layer_decay: in (0, 1], factor of the learning rate from each layer to the one before it. Heads train with
            ``lr``, the last decoder layer with layer_decay x lr, and so on to the first encoder layer; the backbone's
            last stage with ``backbone_lr``, the stage before it with layer_decay x backbone_lr. 1: equal rates.
        freeze: names of parts that are not trained, such as ("backbone", "encoder", "decoder.layers.0").
        weight_decay: weight decay of AdamW.
        clip: maximum norm of all gradients together; 0: no limit.
        warmup: steps in which the learning rates rise linearly from 0. If that is more than half of the run's steps,
            a tenth of them instead, and a line reports it.
        schedule: of the learning rates, "step": a tenth from ``drop_at`` on; "cosine": down to 0; "constant".
        drop_at: in [0, 1], the fraction of the epochs after which "step" lowers the learning rates.
        ema: decay of the exponential moving average of the weights, which is then evaluated and saved; 0: no average.
            In the first steps the decay is lower, (1 + n) / (10 + n), so that the initial weights lose their
            influence.
        query_groups: number of groups of object queries in training, the model's own and others that are not saved
            (Group DETR): fewer epochs, each somewhat slower; 1: the paper's training.
        autocast: precision of the forward pass, "bfloat16" or "float16" (which needs a GPU); None: the model's dtype.
        gradient_checkpointing: recompute activations in the backward pass instead of storing them: less memory, more
            time, the same numbers.
        patience: evaluations without a better AP after which training stops; 0: never.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        save_every: steps between checkpoints; the end of an epoch always writes one.
        workers: processes that load images; 0: the main process loads them.
        balanced: sample the images of an epoch at random, so that every class is in equally many draws: first a class,
            then one of its images; images without targets keep their share. False: each image once.
        seed: seed of all random numbers.
        max_bad_images: number of training images in each process that may be unreadable, and are then skipped with a
            warning. One more stops the run. With 0, two runs with the same settings always see the same images.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of its range.
    """

    epochs: int = 50
    time_limit: float = 0.0
    batch_size: int = 4
    accumulation: int = 1
    lr: float = 1e-4
    backbone_lr: float = 1e-5
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    weight_decay: float = 1e-4
    clip: float = 0.1
    warmup: int = 0
    schedule: str = "step"
    drop_at: float = 0.8
    ema: float = 0.0
    query_groups: int = 1
    autocast: str | None = None
    gradient_checkpointing: bool = False
    patience: int = 0
    evaluate_every: int = 1
    save_every: int = 500
    workers: int = 2
    balanced: bool = False
    seed: int = 0
    max_bad_images: int = 0

    def __post_init__(self) -> None:
        whole = {**dict.fromkeys(_AT_LEAST_ONE, 1), **dict.fromkeys(_AT_LEAST_ZERO, 0)}
        for name, minimum in {**whole, **dict.fromkeys(_NOT_NEGATIVE, 0)}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name in whole else int | float):
                raise TypeError(f"{name}: expected {'an int' if name in whole else 'a number'}, got {value!r}")
            if not minimum <= value < math.inf:
                raise ValueError(f"{name}: expected at least {minimum}, got {value}")
        for name in ("gradient_checkpointing", "balanced"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if not isinstance(self.freeze, tuple) or not all(isinstance(part, str) for part in self.freeze):
            raise TypeError(f"freeze: expected a tuple of names, got {self.freeze!r}")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay: expected a factor above 0, at most 1, got {self.layer_decay}")
        if self.ema >= 1:
            raise ValueError(f"ema: expected a decay below 1, got {self.ema}")
        if self.drop_at > 1:
            raise ValueError(f"drop_at: expected a fraction of the epochs, at most 1, got {self.drop_at}")
        for name, allowed in (("schedule", SCHEDULES), ("autocast", PRECISIONS)):
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(repr, allowed))
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")

    @classmethod
    def from_scratch(cls) -> "TrainConfig":
        """Return the paper's recipe, for an untrained transformer and a dataset of COCO's size.

        The paper's 16 images a step are 4 forward passes of 4 images here, for one process.
        """
        return cls(accumulation=4)

    @classmethod
    def finetune(cls) -> "TrainConfig":
        """Return settings for fine-tuning trained weights on thousands of images."""
        return cls(epochs=24, accumulation=4, warmup=200, schedule="cosine", ema=0.999, patience=8)

    @classmethod
    def finetune_small(cls) -> "TrainConfig":
        """Return settings for fine-tuning trained weights on tens to hundreds of images."""
        return cls(
            epochs=80,
            batch_size=4,
            accumulation=2,
            warmup=50,
            schedule="cosine",
            ema=0.995,
            patience=20,
            save_every=200,
        )
