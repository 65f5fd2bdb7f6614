"""``conditional-detr info``: what a checkpoint is."""

import json
import re
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from conditional_detr.cli.console import megabytes, one_line_errors, out
from conditional_detr.summary import Summary, summarise
from conditional_detr.weights import from_pretrained


def info(
    checkpoint: Annotated[
        str, typer.Argument(help="Weights of any family: a folder, a file, or a hub id 'owner/name'.")
    ],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="The picture whose FLOPs are counted. Default: the checkpoint's shortest x longest edge.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one json object instead.")] = False,
) -> None:
    """Tell what a checkpoint is.

    Its file, architecture, classes, preprocessing, parameters, and what one
    picture costs: FLOPs count an addition and a multiplication as one each,
    multiply-adds count both together as one.
    """
    height_width = None if size is None else _parsed(size)
    with one_line_errors():
        summary = summarise(from_pretrained(checkpoint, revision=revision), height_width)
    if as_json:
        typer.echo(json.dumps(summary.to_dict(), indent=2, ensure_ascii=False))
        return
    table = Table.grid(padding=(0, 2))
    for what, value in _rows(summary):
        table.add_row(what, Text(value, overflow="fold"))
    out.print(table)


def _parsed(size: str) -> tuple[int, int]:
    """Return height and width of '800x1333'."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if match is None:
        raise typer.BadParameter(
            f"expected height x width in pixels, such as 800x1333, got {size!r}", param_hint="--size"
        )
    return int(match[1]), int(match[2])


def _rows(summary: Summary) -> Iterator[tuple[str, str]]:
    """Say it line by line: what, and how much of it."""
    config, metadata, preprocessing = summary.config, summary.metadata, summary.metadata.preprocessing
    if report := summary.load_report:
        yield "file", report.source
        yield "", f"{report.family} names, {report.dtype}, {megabytes(report.size)}"
    yield "trunk", f"{config.backbone}, stage {config.backbone_stage}{', dilated' if config.dilation else ''}"
    yield "encoder", f"{config.encoder_layers} layers, width {config.width}, {config.heads} heads"
    yield "decoder", f"{config.decoder_layers} layers, {config.num_queries} queries"
    yield "", f"feed-forward networks of {config.feedforward} units, dropout {config.dropout}"
    names = [name for name in metadata.class_names if name is not None]
    yield "classes", f"{len(names)}, and {config.num_classes - len(names)} unused rows"
    yield "", ", ".join(names)
    yield "preprocessing", f"shortest edge {preprocessing.shortest_edge}, longest {preprocessing.longest_edge}"
    yield "", f"mean {preprocessing.mean}, std {preprocessing.std}"
    yield "parameters", f"{summary.total:,}, of which {summary.trainable:,} train"
    for part, count in summary.parameters.items():
        yield f"  {part}", f"{count:>10,}"
    height, width = summary.size
    yield f"{height} x {width}", f"{summary.flops / 1e9:.2f} GFLOP, {summary.multiply_adds / 1e9:.2f} G multiply-adds"
