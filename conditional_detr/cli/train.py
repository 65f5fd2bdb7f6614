"""``conditional-detr train``: train on a data set in COCO's form, in one process or under torchrun or accelerate."""

import json
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import distributed

from conditional_detr.checkpoints.backbone_weights import load_backbone_weights
from conditional_detr.checkpoints.loading import from_pretrained
from conditional_detr.cli.console import INTERRUPTED, Precision, one_line_errors, out, tell
from conditional_detr.data.annotations import name_rows
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.dataset import Augmentation, CocoData
from conditional_detr.modeling.conditional_detr import ConditionalDETR, Config
from conditional_detr.modeling.metadata import Metadata, Preprocessing
from conditional_detr.training.checkpoints import LAST, STATE
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loop import TrainResult
from conditional_detr.training.loop import train as run

NOTHING = "none"
"""What --weights says for a model that starts untrained."""


class Preset(str, Enum):
    """Settings for the usual cases, by the names of TrainConfig's constructors."""

    FROM_SCRATCH = "from_scratch"
    FINETUNE = "finetune"
    FINETUNE_SMALL = "finetune_small"


class Augment(str, Enum):
    """What is done to training images, by the names of Augmentation's constructors."""

    PAPER = "paper"
    SMALL = "small"
    NOTHING = "none"


class Schedule(str, Enum):
    """How the learning rates change."""

    STEP = "step"
    COSINE = "cosine"
    CONSTANT = "constant"


def train(
    data: Annotated[Path, typer.Option(help="COCO's json of the training data.")],
    images: Annotated[Path, typer.Option(help="The folder of its images.")],
    output: Annotated[Path, typer.Option(help="Where checkpoints, log and curves go.")],
    val_data: Annotated[Path | None, typer.Option(help="COCO's json of the validation data, for AP.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="The folder of its images; else --images.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="What to start from: a folder, a file, a hub id; 'none': untrained.")
    ] = None,
    architecture: Annotated[
        str, typer.Option(help="With --weights none: Config's fields, 'backbone=resnet18 num_queries=100'.")
    ] = "",
    backbone_weights: Annotated[
        Path | None, typer.Option(help="With --weights none: a file with weights of timm's or torchvision's backbone.")
    ] = None,
    num_queries: Annotated[int | None, typer.Option(min=1, help="Object queries; else those of the weights.")] = None,
    preset: Annotated[Preset, typer.Option(help="Settings to start from.")] = Preset.FINETUNE_SMALL,
    augmentation: Annotated[
        Augment | None, typer.Option(help="Else small with finetune_small, paper with the other presets.")
    ] = None,
    vertical_flip: Annotated[
        bool, typer.Option("--vertical-flip", help="Upside down is as likely, as under a microscope or from above.")
    ] = False,
    quarter_turn: Annotated[
        bool, typer.Option("--quarter-turn", help="Lying on a side is as likely, as under a microscope or from above.")
    ] = False,
    dropout: Annotated[
        float | None, typer.Option(min=0, max=1, help="Dropout while training; else that of the weights.")
    ] = None,
    shortest_edge: Annotated[int | None, typer.Option(min=1, help="Pixels of an image's shorter side.")] = None,
    longest_edge: Annotated[int | None, typer.Option(min=1, help="The most pixels of its longer side.")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often every image is seen.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images a forward pass of one process.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    backbone_lr: Annotated[float | None, typer.Option(help="Learning rate of the backbone; 0 freezes it.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's.")] = None,
    clip: Annotated[float | None, typer.Option(help="The largest norm of the gradients; 0: no limit.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps in which the rates rise from 0.")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="How the rates then change.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the weights' moving average; 0: none.")] = None,
    query_groups: Annotated[int | None, typer.Option(help="Groups of queries that learn side by side.")] = None,
    autocast: Annotated[Precision, typer.Option(help="Precision of the forward pass.")] = Precision.FLOAT32,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    patience: Annotated[int | None, typer.Option(help="Evaluations without a better AP; 0: any number.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Epochs from one evaluation to the next.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps from one checkpoint to the next.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare images; 0: none.")] = None,
    seed: Annotated[int, typer.Option(help="Everything drawn follows from it.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --output, if there is a checkpoint.")] = False,
) -> None:
    """Train, or fine-tune, on a data set in COCO's form; the classes are those of the data set.

    Rows of the class head whose names the data set has, too, are kept; others start anew. Several processes train
    together: torchrun --nproc-per-node 2 --no-python conditional-detr train ..., or accelerate launch --no_python.

    In --output: best and last, checkpoints to detect with; log.jsonl, curves.png and tensorboard. What was stopped, in
    whatever way, goes on with --resume and the same options.
    """
    given = dict(locals())
    with one_line_errors():
        if val_images is not None and val_data is None:
            raise ValueError(f"--val-images: expected --val-data with it, got {val_images} alone")
        names = [f.name for f in fields(TrainConfig) if given.get(f.name) is not None]
        changes = {name: value.value if isinstance(value := given[name], Enum) else value for name in names}
        changes["autocast"] = None if autocast is Precision.FLOAT32 else autocast.value
        config = replace(getattr(TrainConfig, preset.value)(), **changes)
        model = _model(data, output if resume else None, weights, architecture, backbone_weights, num_queries, seed)
        if dropout is not None:
            model = _with_dropout(model, dropout)
        edges = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
        preprocessing = _preprocessing(model.metadata.preprocessing, edges)
        changes_of_images = _augmentation(augmentation, preset, vertical_flip, quarter_turn)
        data_sets = _data_sets(data, images, val_data, val_images, changes_of_images, preprocessing, seed)
        model.metadata = data_sets[0].metadata
        result = _run(model, *data_sets, config, output, resume)
    if result is not None:
        _show(result)


def _model(
    data: Path,
    output: Path | None,
    weights: str | None,
    architecture: str,
    backbone_weights: Path | None,
    num_queries: int | None,
    seed: int,
) -> ConditionalDETR:
    """Return the model to begin with: the output's own if it is to go on, else of weights, or untrained."""
    names, _ = name_rows(read_annotations(data), None)
    torch.manual_seed(seed)
    if output is not None and (output / LAST / STATE).exists():
        return from_pretrained(output / LAST)
    if weights is None:
        raise ValueError("--weights: expected what to start from: a folder, a file, a hub id, or none for untrained")
    if weights != NOTHING:
        for name, value in (("architecture", architecture), ("backbone-weights", backbone_weights)):
            if value:
                raise ValueError(f"--{name}: weights have their own, got {str(value)!r} with --weights {weights}")
        return from_pretrained(weights, class_names=names, num_queries=num_queries)
    queries = {} if num_queries is None else {"num_queries": num_queries}
    config = Config(**{**_read_architecture(architecture), **queries, "num_classes": len(names)})
    model = ConditionalDETR(config, Metadata(names))
    if backbone_weights is not None:
        report = load_backbone_weights(model, backbone_weights)
        unused = f", and {len(report.left_over)} tensors that it does not have" if report.left_over else ""
        tell(f"{backbone_weights}: all {len(report.filled)} tensors of the backbone{unused}")
    return model


def _with_dropout(model: ConditionalDETR, dropout: float) -> ConditionalDETR:
    """Return the same model with another dropout."""
    other = ConditionalDETR(replace(model.config, dropout=dropout), model.metadata)
    other.load_state_dict(model.state_dict())
    other.load_report = model.load_report
    return other


def _read_architecture(text: str) -> dict[str, Any]:
    """Read 'backbone=resnet18 num_queries=100'; numbers and true or false as in json, all else is text."""
    found: dict[str, Any] = {}
    known = [f.name for f in fields(Config) if f.name != "num_classes"]
    for part in text.replace(",", " ").split():
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            raise ValueError(f"--architecture: expected name=value with a name of {', '.join(known)}, got {part!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _preprocessing(present: Preprocessing, edges: dict[str, int | None]) -> Preprocessing:
    """Return the preprocessing with other sizes; if only the shorter side is told, the ratio of the two stays."""
    short, long = edges["shortest_edge"], edges["longest_edge"]
    if short is not None and long is None:
        long = round(short * present.longest_edge / present.shortest_edge)
    return replace(present, shortest_edge=short or present.shortest_edge, longest_edge=long or present.longest_edge)


def _augmentation(
    wish: Augment | None, preset: Preset, vertical_flip: bool, quarter_turn: bool
) -> Augmentation | None:
    """Return what is to be done to training images."""
    if wish is None:
        wish = Augment.SMALL if preset is Preset.FINETUNE_SMALL else Augment.PAPER
    chosen = Augmentation() if wish is Augment.NOTHING else getattr(Augmentation, wish.value)()
    if vertical_flip:
        chosen = replace(chosen, vertical_flip=0.5)
    if quarter_turn:
        chosen = replace(chosen, quarter_turn=0.5)
    return None if chosen == Augmentation() else chosen


def _data_sets(
    data: Path,
    images: Path,
    val_data: Path | None,
    val_images: Path | None,
    augmentation: Augmentation | None,
    preprocessing: Preprocessing,
    seed: int,
) -> tuple[CocoData, CocoData | None]:
    """Return the data to train on, and to validate with."""
    training = CocoData(data, images, augmentation=augmentation, preprocessing=preprocessing, seed=seed)
    if val_data is None:
        return training, None
    names = training.class_names
    return training, CocoData(val_data, val_images or images, preprocessing=preprocessing, class_names=names)


def _run(
    model: ConditionalDETR,
    train_data: CocoData,
    val_data: CocoData | None,
    config: TrainConfig,
    output: Path,
    resume: bool,
) -> TrainResult | None:
    """Train; returns the result in the first process."""
    try:
        result = run(model, train_data, val_data, config, folder=output, resume=resume)
        first = not distributed.is_initialized() or distributed.get_rank() == 0
        return result if first else None
    except KeyboardInterrupt:
        tell(f"interrupted; --resume goes on from {output / LAST}")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _show(result: TrainResult) -> None:
    """Print where things are."""
    if result.stopped_early:
        out.print("stopped early: AP had not risen for as long as the patience lasts", markup=False)
    if result.best is not None:
        out.print(f"best AP {result.best_ap:.3f}: {result.best}", markup=False, soft_wrap=True)
    out.print(f"after {result.steps} steps: {result.last}", markup=False, soft_wrap=True)
    out.print(f"curves: {result.folder / 'curves.png'}", markup=False, soft_wrap=True)
