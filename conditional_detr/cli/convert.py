"""``conditional-detr convert``: weights from any family of files into any."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from conditional_detr.checkpoints.key_maps import Family
from conditional_detr.checkpoints.loading import from_pretrained
from conditional_detr.checkpoints.saving import files_of, save_as
from conditional_detr.cli.console import Precision, megabytes, one_line_errors


class Target(str, Enum):
    """What the command line calls the families."""

    PUBLISHED = "published"
    TRANSFORMERS5 = "transformers5"
    ORIGINAL = "original"


_FAMILIES: dict[Target, Family] = {
    Target.PUBLISHED: "published",
    Target.TRANSFORMERS5: "transformers 5",
    Target.ORIGINAL: "original",
}


def convert(
    source: Annotated[str, typer.Argument(help="Weights of any family: a folder, a file, or a hub id 'owner/name'.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; with --to original, the .pth file.")],
    to: Annotated[Target, typer.Option(help="The format to write, see above.")] = Target.PUBLISHED,
    dtype: Annotated[Precision, typer.Option(help="Precision on disk. Loading gives float32.")] = Precision.FLOAT32,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Convert weights from any family of files into any other.

    published: a folder that transformers and this library read.

    transformers5: the same folder, its weights under the names that
    transformers 5 has in memory, for load_state_dict.

    original: one .pth for the authors' code. It takes only backbones which that
    code builds, ResNets of torchvision, and has no place for class names,
    category ids and preprocessing; a warning tells when these are lost.
    """
    family = _FAMILIES[to]
    with one_line_errors():
        there = [file.name for file in files_of(target, family) if file.exists()]
        if there and not overwrite:
            raise FileExistsError(f"{target}: already there: {', '.join(there)}; --overwrite replaces")
        model = from_pretrained(source, revision=revision)
        weights, *_ = save_as(model, target, family, dtype=getattr(torch, dtype.value))
    report = model.load_report
    assert report is not None  # a loaded model has one
    written = f"{weights} ({family} names, {dtype.value}, {megabytes(weights.stat().st_size)})"
    typer.echo(f"read {report.source} ({report.family} names, {report.dtype}), wrote {written}")
