"""``conditional-detr convert-data``: write a dataset of any format as COCO JSON files or Parquet files."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from conditional_detr.cli.console import err, one_line_errors, out, print_line
from conditional_detr.cli.options import DATA, FORMAT, IMAGES, OVERWRITE, SHARES, DataFormat
from conditional_detr.system.progress import progress_bar


class Target(str, Enum):
    """What is written, by the names of convert_data()'s."""

    COCO = "coco"
    PARQUET = "parquet"


def convert_data(
    data: Annotated[Path, typer.Option(help=DATA)],
    output: Annotated[Path, typer.Option(help="Folder for instances_train.json and the like.")],
    to: Annotated[
        Target, typer.Option(help="coco: annotations only; parquet: files with the images, for data on many machines.")
    ] = Target.COCO,
    images: Annotated[Path | None, typer.Option(help=IMAGES)] = None,
    format: Annotated[
        DataFormat | None, typer.Option(metavar="<format>", help=FORMAT, show_default="recognised")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="<shares>", help=SHARES)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --split.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Write a dataset of any format as COCO JSON, one file per split. The images stay where they are.

    With --to parquet, write files of about 500 MB with the images, which train and Hugging Face's datasets read.

    --split gives each part the same share of every class, and keeps images that look nearly the same in one part.

    Exit codes: 0 success; 2 usage or setup error, such as an invalid annotation.
    """
    with one_line_errors():
        from conditional_detr.data.formats.conversion import convert_data as convert

        chosen: Any = None if format is None else format.value
        options: dict[str, Any] = {"format": chosen, "split": split, "seed": seed, "overwrite": overwrite}
        with progress_bar(err, shown=to is Target.PARQUET) as bar:
            task = bar.add_task("writing", total=None)

            def show(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            written = convert(data, output, images, to=to.value, progress=show, **options)
    for files, folder, annotations in written:
        counts = f"{len(annotations.images)} images in {folder}, {len(annotations.annotations)} annotations"
        names = f"{files[0]}" if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        print_line(f"wrote {names}: {counts}", to=out)
