"""``conditional-detr train``: train or fine-tune on a dataset in any format, in one process or several."""

from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from conditional_detr.cli.console import Precision, one_line_errors
from conditional_detr.cli.options import (
    CACHE,
    FAST_PREPROCESSING,
    FORMAT,
    IMAGES,
    ROTATED,
    SHARES,
    TRAINING_DATA,
    DataFormat,
    RotatedBoxes,
)
from conditional_detr.cli.train_data import (
    Augment,
    Caching,
    make_augmentation,
    open_datasets,
    read_datasets,
    resized_preprocessing,
)
from conditional_detr.cli.train_model import make_model, resumed_model, with_dropout
from conditional_detr.cli.train_run import (
    AUTO,
    read_batch_size,
    read_duration,
    run_training,
    show_result,
    weighted_criterion,
    with_batch_size,
)
from conditional_detr.training.config import TrainConfig

_DATA, _MODEL, _IMAGES = "Data", "Model", "Image size and augmentation"
_OPTIMIZER, _SPEED, _CHECKPOINTS = "Optimisation", "Speed and memory", "Evaluation and checkpoints"


class Preset(str, Enum):
    """Presets, by the names of TrainConfig's constructors."""

    FROM_SCRATCH = "from_scratch"
    FINETUNE = "finetune"
    FINETUNE_SMALL = "finetune_small"


class Schedule(str, Enum):
    """Schedules of the learning rate."""

    STEP = "step"
    COSINE = "cosine"
    CONSTANT = "constant"


def train(
    data: Annotated[str, typer.Option(metavar="<path>", help=TRAINING_DATA, rich_help_panel=_DATA)],
    output: Annotated[
        Path, typer.Option(help="Folder for checkpoints, log and curves.", rich_help_panel=_CHECKPOINTS)
    ],
    images: Annotated[Path | None, typer.Option(help=IMAGES, rich_help_panel=_DATA)] = None,
    format: Annotated[
        DataFormat | None,
        typer.Option(metavar="<format>", help=FORMAT, show_default="recognised", rich_help_panel=_DATA),
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="<shares>", help=SHARES, rich_help_panel=_DATA)] = None,
    val_data: Annotated[
        str | None,
        typer.Option(
            metavar="<path>",
            help="Dataset to measure AP on.",
            show_default="the split val of --data, if any",
            rich_help_panel=_DATA,
        ),
    ] = None,
    val_images: Annotated[
        Path | None,
        typer.Option(help="Image folder of --val-data.", show_default="--images", rich_help_panel=_DATA),
    ] = None,
    rotated: Annotated[RotatedBoxes, typer.Option(help=ROTATED, rich_help_panel=_DATA)] = RotatedBoxes.BOX,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to start from: a folder, a file, a hub id; 'none': random weights.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    architecture: Annotated[
        str,
        typer.Option(
            help="With --weights none: fields of Config, such as 'backbone=resnet18 num_queries=100', and model=detr.",
            show_default="the published one",
            rich_help_panel=_MODEL,
        ),
    ] = "",
    backbone_weights: Annotated[
        Path | None,
        typer.Option(help="With --weights none: file with timm's or torchvision's weights.", rich_help_panel=_MODEL),
    ] = None,
    num_queries: Annotated[
        int | None,
        typer.Option(min=1, help="Object queries.", show_default="of the weights", rich_help_panel=_MODEL),
    ] = None,
    query_groups: Annotated[
        int | None,
        typer.Option(help="Groups of object queries that train side by side.", rich_help_panel=_MODEL),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Dropout in training.", show_default="of the weights", rich_help_panel=_MODEL),
    ] = None,
    shortest_edge: Annotated[
        int | None,
        typer.Option(
            min=1, help="Pixels of the shorter side.", show_default="of the weights", rich_help_panel=_IMAGES
        ),
    ] = None,
    longest_edge: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most pixels of the longer side.", show_default="in proportion", rich_help_panel=_IMAGES
        ),
    ] = None,
    fast_preprocessing: Annotated[
        bool, typer.Option("--fast-preprocessing", help=FAST_PREPROCESSING, rich_help_panel=_IMAGES)
    ] = False,
    augmentation: Annotated[
        Augment | None,
        typer.Option(
            metavar="<name>",
            help="Augmentation: paper, small, strong or none.",
            show_default="small with finetune_small, else paper",
            rich_help_panel=_IMAGES,
        ),
    ] = None,
    vertical_flip: Annotated[
        bool,
        typer.Option(
            "--vertical-flip", help="Also flip upside down: microscopy, aerial images.", rich_help_panel=_IMAGES
        ),
    ] = False,
    quarter_turn: Annotated[
        bool,
        typer.Option(
            "--quarter-turn", help="Also turn by 90 degrees: microscopy, aerial images.", rich_help_panel=_IMAGES
        ),
    ] = False,
    preset: Annotated[
        Preset,
        typer.Option(
            metavar="<preset>",
            help="Defaults of these options: from_scratch, finetune or finetune_small.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = Preset.FINETUNE_SMALL,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", rich_help_panel=_OPTIMIZER)] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(help="End after a time such as 2h or 90m instead of --epochs.", rich_help_panel=_OPTIMIZER),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="Images per forward pass; 'auto': as many as fit.", rich_help_panel=_OPTIMIZER),
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Forward passes per step.", rich_help_panel=_OPTIMIZER)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel=_OPTIMIZER)] = None,
    backbone_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the backbone; 0 freezes it.", rich_help_panel=_OPTIMIZER)
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(help="Factor of the learning rate from a layer to the one before.", rich_help_panel=_OPTIMIZER),
    ] = None,
    freeze: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<part>", help="Part not to train, such as encoder; repeatable.", rich_help_panel=_OPTIMIZER
        ),
    ] = None,
    class_weights: Annotated[
        str,
        typer.Option(help="Factors of classes' losses: 'cat=2 dog=0.5'.", rich_help_panel=_OPTIMIZER),
    ] = "",
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay of AdamW.", rich_help_panel=_OPTIMIZER)
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Largest norm of the gradients; 0: no limit.", rich_help_panel=_OPTIMIZER)
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Steps in which the learning rate rises from 0.", rich_help_panel=_OPTIMIZER)
    ] = None,
    schedule: Annotated[
        Schedule | None, typer.Option(help="Learning rate after the warm-up.", rich_help_panel=_OPTIMIZER)
    ] = None,
    ema: Annotated[
        float | None, typer.Option(help="Decay of the weights' moving average; 0: none.", rich_help_panel=_OPTIMIZER)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.", rich_help_panel=_OPTIMIZER)] = 0,
    autocast: Annotated[
        Precision, typer.Option(help="Precision of the forward pass.", rich_help_panel=_OPTIMIZER)
    ] = Precision.FLOAT32,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Use less memory and more time.", rich_help_panel=_SPEED)
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that load images; 0: none.", rich_help_panel=_SPEED)
    ] = None,
    cache: Annotated[
        Caching | None,
        typer.Option(help=CACHE, show_default="decode in each epoch", rich_help_panel=_SPEED),
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Epochs between evaluations.", rich_help_panel=_CHECKPOINTS)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after this many evaluations without a better AP; 0: never.", rich_help_panel=_CHECKPOINTS
        ),
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints.", rich_help_panel=_CHECKPOINTS)
    ] = None,
    balanced: Annotated[
        bool,
        typer.Option("--balanced", help="Draw images so that classes are equally likely.", rich_help_panel=_DATA),
    ] = False,
    max_bad_images: Annotated[
        int | None,
        typer.Option(help="Unreadable images that are skipped before training stops.", rich_help_panel=_DATA),
    ] = None,
    no_check: Annotated[
        bool,
        typer.Option("--no-check", help="Do not check the images before the first step.", rich_help_panel=_DATA),
    ] = False,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<name>",
            help="Also log to wandb, mlflow, comet_ml or another tracker of accelerate; repeatable.",
            rich_help_panel=_CHECKPOINTS,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the checkpoint in --output, if any.", rich_help_panel=_CHECKPOINTS
        ),
    ] = False,
) -> None:
    """Train or fine-tune on a dataset. The classes are those of the dataset.

    Of a dataset with splits, the split train is used, and val to measure AP on.

    Class head rows are kept where the weights have a class of the same name; all others are initialised anew.

    --output receives the checkpoints "best" and "last", log.jsonl, curves.png, tensorboard, and at the end README.md,
    a model card; one of your own stays. To continue a stopped run, repeat the command with --resume. Options of the
    model and the data must then be the same, or left out; only --epochs, --workers, --cache, --patience,
    --evaluate-every, --save-every, --max-bad-images, --tracker and --gradient-checkpointing may differ.

    Several processes train together under torchrun --nproc-per-node 2 --no-python conditional-detr train ..., or
    under accelerate launch --no_python.
    """
    given = dict(locals())
    with one_line_errors():
        from conditional_detr.training.trackers import Trackers

        if val_images is not None and val_data is None:
            raise ValueError(f"--val-images: expected --val-data with it, got {val_images} alone")
        given["batch_size"] = None if batch_size is None else read_batch_size(batch_size)
        given["time_limit"] = None if time_limit is None else read_duration(time_limit)
        given["freeze"] = tuple(freeze or ())
        names = [f.name for f in fields(TrainConfig) if given.get(f.name) is not None]
        changes = {name: value.value if isinstance(value := given[name], Enum) else value for name in names}
        changes["autocast"] = None if autocast is Precision.FLOAT32 else autocast.value
        config = replace(getattr(TrainConfig, preset.value)(), **changes)
        if tracker:
            Trackers(tracker)  # before the data and the model are loaded
        chosen_format: Any = None if format is None else format.value
        found = read_datasets(data, images, val_data, val_images, chosen_format, split, seed)
        start = (weights, architecture, backbone_weights, num_queries, seed)
        model = resumed_model(found[0].annotations, output, *start) if resume else None
        model = model or make_model(found[0].annotations, *start)
        if dropout is not None:
            model = with_dropout(model, dropout)
        edges = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
        preprocessing = resized_preprocessing(model.metadata.preprocessing, edges)
        preprocessing = replace(preprocessing, backend="torchvision" if fast_preprocessing else "pil")
        choice = augmentation or (Augment.SMALL if preset is Preset.FINETUNE_SMALL else Augment.PAPER)
        chosen = make_augmentation(choice, preprocessing, vertical_flip, quarter_turn)
        datasets = open_datasets(*found, chosen, seed, cache, rotated.value, preprocessing)
        model.metadata = datasets[0].metadata
        criterion = weighted_criterion(model, class_weights) if class_weights else None
        if batch_size == AUTO:
            config = with_batch_size(model, datasets[0], config, criterion, output if resume else None)
        result = run_training(model, *datasets, config, criterion, output, resume, not no_check, tracker or ())
        if result is not None:
            show_result(model, result)
