"""``conditional-detr info``: describe a checkpoint or an exported model."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import megabytes, one_line_errors, out
from conditional_detr.cli.options import REVISION, WEIGHTS

if TYPE_CHECKING:
    from conditional_detr.deploy.summary import Summary
    from conditional_detr.inference.exported import Description
    from conditional_detr.modeling.config import Config
    from conditional_detr.modeling.metadata import Metadata


def info(
    checkpoint: Annotated[str, typer.Argument(help=WEIGHTS)],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="Image size to count FLOPs for.",
            show_default="the checkpoint's shortest x longest edge",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Describe a checkpoint or an exported model.

    Of a checkpoint: file, architecture, classes, preprocessing, parameters, and the cost of one image. FLOPs count an
    addition and a multiplication as one each; multiply-adds count both together as one.

    Of an exported model: classes, preprocessing, and its differences from the model it was exported from.
    """
    height_width = None if size is None else _parsed(size)
    with one_line_errors():
        from conditional_detr.inference.exported import ExportedModel, is_exported

        if is_exported(checkpoint):
            if size is not None or revision is not None:
                raise ValueError("--size and --revision: expected a checkpoint, got an exported model")
            description = ExportedModel(checkpoint).description
            content, rows = json.loads(description.to_json()), [*_rows_of_exported(Path(checkpoint), description)]
        else:
            from conditional_detr.checkpoints.loading import from_pretrained
            from conditional_detr.deploy.summary import summarise

            summary = summarise(from_pretrained(checkpoint, revision=revision), height_width)
            content, rows = summary.to_dict(), [*_rows(summary)]
    if as_json:
        typer.echo(json.dumps(content, indent=2))  # ASCII: safe on a terminal
        return
    from rich.table import Column, Table

    table = Table.grid("", Column(overflow="fold"), padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _parsed(size: str) -> tuple[int, int]:
    """Return height and width of '800x1333'."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
    if match is None:
        raise typer.BadParameter(
            f"expected height x width in pixels, such as 800x1333, got {size!r}", param_hint="--size"
        )
    return int(match[1]), int(match[2])


def _rows(summary: "Summary") -> Iterator[tuple[str, str]]:
    """Yield the name and value of each line."""
    if report := summary.load_report:
        yield "file", report.source
        yield "", f"{report.name_format} names, {report.dtype}, {megabytes(report.size)}"
    yield "network", summary.network
    yield from _rows_of_network(summary.config, summary.metadata)
    yield "parameters", f"{summary.total:,}, {summary.trainable:,} of them trainable"
    for part, count in summary.parameters.items():
        yield f"  {part}", f"{count:>10,}"
    height, width = summary.size
    yield f"{height} x {width}", f"{summary.flops / 1e9:.2f} GFLOP, {summary.multiply_adds / 1e9:.2f} G multiply-adds"


def _rows_of_network(config: "Config", metadata: "Metadata") -> Iterator[tuple[str, str]]:
    """Yield architecture, classes and preprocessing."""
    yield "backbone", f"{config.backbone}, stage {config.backbone_stage}{', dilated' if config.dilation else ''}"
    yield "encoder", f"{config.encoder_layers} layers, width {config.width}, {config.heads} heads"
    yield "decoder", f"{config.decoder_layers} layers, {config.num_queries} queries"
    yield "", f"feed-forward networks of {config.feedforward} units, dropout {config.dropout}"
    names = [name for name in metadata.class_names if name is not None]
    yield "classes", f"{len(names)}, and {config.num_classes - len(names)} unused rows"
    yield "", ", ".join(names)
    preprocessing = metadata.preprocessing
    height, width = preprocessing.size or (0, 0)
    sizes = {
        "edges": f"shortest edge {preprocessing.shortest_edge}, longest {preprocessing.longest_edge}",
        "fit": f"resized to the largest size within {height} x {width}",
        "stretch": f"stretched to {height} x {width}",
        "none": "images keep their size",
    }
    yield "preprocessing", sizes[preprocessing.resizing]
    yield "", f"mean {preprocessing.mean}, std {preprocessing.std}"


def _rows_of_exported(path: Path, description: "Description") -> Iterator[tuple[str, str]]:
    """Yield the description of an exported model."""
    from conditional_detr.modeling.architectures import ARCHITECTURES

    yield "file", str(path)
    top_k = description.top_k
    after = "no post-processing" if top_k is None else f"post-processing to at most {top_k} detections"
    yield "", f"{description.precision}, {after}"
    yield "written by", ", ".join(f"{package} {version}" for package, version in description.versions.items())
    yield "network", ARCHITECTURES[description.architecture].__name__
    yield from _rows_of_network(description.config, description.metadata)
    if description.thresholds is not None:
        yield "thresholds", ", ".join(f"{name} {value:g}" for name, value in description.thresholds.items())
    for one in description.parity:
        size = f"{one.height} x {one.width}"
        yield size, f"logits differ by at most {one.logits:.1e} from the model, boxes by {one.boxes:.1e}"
    for name, measured in description.measured.items():
        many = measured.items() if isinstance(measured, Mapping) else {"": measured}.items()
        yield name, ", ".join(f"{key} {_format(value)}".strip() for key, value in many)


def _format(value: Any) -> str:
    """Format a measured value."""
    if isinstance(value, list):
        return " and ".join(value) or "nothing"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
