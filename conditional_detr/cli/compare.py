"""``conditional-detr compare``: train several networks on the same data and compare how fast they converge."""

import json
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import INTERRUPTED, one_line_errors, out, print_line
from conditional_detr.cli.options import CACHE, FORMAT, IMAGES, ROTATED, TRAINING_DATA, DataFormat, RotatedBoxes
from conditional_detr.cli.train_data import (
    Augment,
    Caching,
    make_augmentation,
    open_datasets,
    read_datasets,
    resized_preprocessing,
)
from conditional_detr.cli.train_model import UNTRAINED, make_model
from conditional_detr.training.config import TrainConfig

if TYPE_CHECKING:
    from conditional_detr.data.dataset import AnnotatedData
    from conditional_detr.modeling.detection_transformer import DetectionTransformer
    from conditional_detr.training.comparison import Candidate

_DATA, _MODELS, _IMAGES = "Data", "Networks", "Image size and augmentation"
_TRAINING = [field.name for field in fields(TrainConfig) if field.name not in ("seed", "freeze")]


def compare(
    candidates: Annotated[
        list[str],
        typer.Option(
            "--candidate",
            help="'NAME: model=detr lr=2e-4 ...': fields of --architecture, and of TrainConfig; repeatable.",
            rich_help_panel=_MODELS,
        ),
    ],
    data: Annotated[str, typer.Option(metavar="<path>", help=TRAINING_DATA, rich_help_panel=_DATA)],
    output: Annotated[Path, typer.Option(help="Folder for runs, table, numbers and curves.")],
    images: Annotated[Path | None, typer.Option(help=IMAGES, rich_help_panel=_DATA)] = None,
    format: Annotated[
        DataFormat | None,
        typer.Option(metavar="<format>", help=FORMAT, show_default="recognised", rich_help_panel=_DATA),
    ] = None,
    val_data: Annotated[
        str | None,
        typer.Option(
            metavar="<path>", help="Dataset to measure AP on.", show_default="val of --data", rich_help_panel=_DATA
        ),
    ] = None,
    val_images: Annotated[
        Path | None,
        typer.Option(help="Image folder of --val-data.", show_default="--images", rich_help_panel=_DATA),
    ] = None,
    rotated: Annotated[RotatedBoxes, typer.Option(help=ROTATED, rich_help_panel=_DATA)] = RotatedBoxes.BOX,
    common: Annotated[
        str, typer.Option(help="Fields of all candidates, such as 'epochs=30 width=128'.", rich_help_panel=_MODELS)
    ] = "",
    backbone_weights: Annotated[
        Path | None,
        typer.Option(help="File with timm's or torchvision's weights of the backbone.", rich_help_panel=_MODELS),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, each a run of each candidate.")] = "0 1 2",
    shortest_edge: Annotated[
        int | None, typer.Option(min=1, help="Shorter side of images in pixels.", rich_help_panel=_IMAGES)
    ] = None,
    longest_edge: Annotated[
        int | None, typer.Option(min=1, help="Longer side of images in pixels.", rich_help_panel=_IMAGES)
    ] = None,
    augmentation: Annotated[
        Augment, typer.Option(help="Augmentation of training images.", rich_help_panel=_IMAGES)
    ] = Augment.PAPER,
    vertical_flip: Annotated[
        bool, typer.Option("--vertical-flip", help="Flip half of them upside down.", rich_help_panel=_IMAGES)
    ] = False,
    cache: Annotated[Caching | None, typer.Option(help=CACHE, show_default="decode in each epoch")] = None,
) -> None:
    """Train networks on the same images, in the same order and with the same augmentation, from random weights.

    --output receives a folder of each candidate and seed, as of train, and comparison.md, comparison.json and
    comparison.png: AP against epochs with its range over the seeds, and the epochs that each candidate needs to reach
    the final AP of the others. To continue a stopped comparison, repeat the command.
    """
    with one_line_errors():
        from conditional_detr.modeling.metadata import Preprocessing
        from conditional_detr.training.comparison import compare as run
        from conditional_detr.training.comparison_report import check_folder, to_markdown, write

        numbers = [_integer(text) for text in seeds.replace(",", " ").split()]
        chosen_format: Any = None if format is None else format.value
        found = read_datasets(data, images, val_data, val_images, chosen_format, None, 0)
        if found[1] is None:
            raise ValueError(f"--val-data: expected a dataset to measure AP on, got none, and {data} has no split val")
        start = partial(
            make_model, found[0].annotations, UNTRAINED, backbone_weights=backbone_weights, num_queries=None
        )
        edges = {"shortest_edge": shortest_edge, "longest_edge": longest_edge}
        parsed = dict(_parse(text, common, start) for text in candidates)
        if len(parsed) < len(candidates):
            raise ValueError("--candidate: expected different names, got two of one name")
        preprocessing = resized_preprocessing(Preprocessing(), edges)
        chosen = make_augmentation(augmentation, preprocessing, vertical_flip)

        def open_data(seed: int) -> "tuple[AnnotatedData, AnnotatedData]":
            training, validation = open_datasets(*found, chosen, seed, cache, rotated.value, preprocessing)
            assert validation is not None
            return training, validation

        settings = {
            "candidates": {name: asdict(candidate.config) for name, candidate in parsed.items()},
            "arguments": {
                **{"candidates": candidates, "common": common, "augmentation": augmentation.value, **edges},
                **{"vertical_flip": vertical_flip, "rotated": rotated.value, "data": data},
                "backbone_weights": None if backbone_weights is None else str(backbone_weights),
            },
        }
        check_folder(output, settings)
        try:
            trained = run(parsed, open_data, folder=output, seeds=numbers, progress=print_line)
        except KeyboardInterrupt:
            print_line(f"interrupted; the same command continues the comparison in {output}")
            raise typer.Exit(INTERRUPTED) from None
        write(trained, numbers, output, settings)
    for line in to_markdown(trained).splitlines():
        print_line(line, to=out)
    print_line(f"curves: {output / 'comparison.png'}", to=out)


def _parse(text: str, common: str, start: Any) -> "tuple[str, Candidate]":
    """Return the name and the candidate of 'NAME: field=value ...'.

    Raises:
        ValueError: text of another form.
    """
    from conditional_detr.training.comparison import Candidate
    from conditional_detr.training.comparison_report import FILES

    name, colon, own = text.partition(":")
    name = name.strip()
    if not colon or not name or not set(name).isdisjoint("/|") or name.startswith(".") or name in FILES:
        raise ValueError(f"--candidate: expected 'NAME: field=value ...', got {text!r}")
    changes: dict[str, Any] = {}
    sizes: dict[str, str] = {}
    for part in f"{common} {own}".replace(",", " ").split():
        field, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--candidate: expected field=value, got {part!r}")
        if field in _TRAINING:
            changes[field] = _value(value)
        else:
            sizes[field] = part  # the last one counts: a candidate's own
    architecture = " ".join(sizes.values())

    def create(seed: int, train_data: Any) -> "DetectionTransformer":
        model: DetectionTransformer = start(architecture=architecture, seed=seed)
        model.metadata = train_data.metadata
        return model

    return name, Candidate(create, replace(TrainConfig(), **changes))


def _value(text: str) -> Any:
    """Return a number, or the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _integer(text: str) -> int:
    """Return a seed.

    Raises:
        ValueError: it is no integer.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--seeds: expected integers such as '0 1 2', got {text!r}") from None
