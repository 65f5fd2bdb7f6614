"""``conditional-detr convert``: convert a checkpoint from any name format to any other."""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conditional_detr.cli.console import Precision, megabytes, one_line_errors, out, print_line
from conditional_detr.cli.options import OVERWRITE, REVISION, SOURCE
from conditional_detr.system.outputs import check_output

if TYPE_CHECKING:
    from conditional_detr.checkpoints.key_maps import NameFormat


class Target(str, Enum):
    """The name formats, as the command line's choices."""

    PUBLISHED = "published"
    TRANSFORMERS5 = "transformers5"
    ORIGINAL = "original"


def convert(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    target: Annotated[Path, typer.Argument(help="The folder to write; with --to original, the .pth file.")],
    to: Annotated[Target, typer.Option(help="The format to write, see above.")] = Target.PUBLISHED,
    dtype: Annotated[Precision, typer.Option(help="Precision on disk. Loading gives float32.")] = Precision.FLOAT32,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Convert a checkpoint from any name format to any other.

    **published**: a folder that transformers and this library read.

    **transformers5**: the same folder, with the parameter names that transformers 5 uses in memory, for
    load_state_dict.

    **original**: one .pth file for the authors' code. It supports only backbones that this code builds, ResNets of
    torchvision, and does not store class names, category ids and preprocessing; a warning reports when these are
    lost.
    """
    name_format: NameFormat = to.value
    with one_line_errors():
        import torch

        from conditional_detr.checkpoints.loading import from_pretrained
        from conditional_detr.checkpoints.saving import files_of, save_as

        for file in files_of(target, name_format):
            if file.parent.is_dir():  # otherwise it is made
                check_output(file, inputs=[source], overwrite=overwrite)
        model = from_pretrained(source, revision=revision)
        weights, *_ = save_as(model, target, name_format, dtype=getattr(torch, dtype.value), overwrite=overwrite)
    report = model.load_report
    assert report is not None  # a loaded model has one
    written = f"{weights} ({name_format} names, {dtype.value}, {megabytes(weights.stat().st_size)})"
    print_line(f"read {report.source} ({report.name_format} names, {report.dtype}), wrote {written}", to=out)
