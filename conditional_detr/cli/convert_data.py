"""``conditional-detr convert-data``: write a dataset of any format as COCO JSON files."""

from pathlib import Path
from typing import Annotated, Any

import typer

from conditional_detr.cli.console import one_line_errors, out, print_line
from conditional_detr.cli.options import DATA, FORMAT, IMAGES, OVERWRITE, SHARES, DataFormat


def convert_data(
    data: Annotated[Path, typer.Option(help=DATA)],
    output: Annotated[Path, typer.Option(help="Folder for instances_train.json and the like.")],
    images: Annotated[Path | None, typer.Option(help=IMAGES)] = None,
    format: Annotated[
        DataFormat | None, typer.Option(metavar="<format>", help=FORMAT, show_default="recognised")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="<shares>", help=SHARES)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --split.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Write a dataset of any format as COCO JSON, one file per split. The images stay where they are.

    --split gives each part the same share of every class, and keeps images that look nearly the same in one part.

    Exit codes: 0 success; 2 usage or setup error, such as an invalid annotation.
    """
    with one_line_errors():
        from conditional_detr.data.formats.conversion import convert_data as convert

        chosen: Any = None if format is None else format.value
        written = convert(data, output, images, format=chosen, split=split, seed=seed, overwrite=overwrite)
    for path, folder, annotations in written:
        counts = f"{len(annotations.images)} images in {folder}, {len(annotations.annotations)} annotations"
        print_line(f"wrote {path}: {counts}", to=out)
