"""``conditional-detr check-data``: what is in a data set, and what is wrong with it."""

import json
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.table import Table

from conditional_detr.cli.console import FAILED, err, one_line_errors, out
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.contact_sheet import draw_sheet
from conditional_detr.data.report import Cases, DataReport
from conditional_detr.data.report import check_data as check
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.progress import progress_bar

SHOWN = 5  # cases of a kind on the screen; the json has all


def check_data(
    data: Annotated[Path, typer.Option(help="COCO's json of the data set.")],
    images: Annotated[Path, typer.Option(help="The folder of its images.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw some images with their boxes to this file.")] = None,
    sheet_images: Annotated[int, typer.Option(min=1, help="How many images are on the sheet.")] = 20,
) -> None:
    """Look at every image and box of a data set before training on it.

    Exit code 0: nothing to mend; 1: problems, which are listed; 2: the json
    is none, or there is no such folder. Notes are what may well be meant.
    """
    with one_line_errors():
        for path in (json_file, sheet):
            if path is not None and not path.absolute().parent.is_dir():  # before all the work, not after
                raise NotADirectoryError(f"{path}: expected a file in a folder that exists, got {path.parent}")
        if sheet is not None and sheet.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{sheet}: expected an image's suffix, such as .jpg or .png, got {sheet.suffix!r}")
        with progress_bar(err, shown=True) as bar:
            task = bar.add_task("checking", total=None)
            report = check(data, images, progress=lambda done, total: bar.update(task, completed=done, total=total))
        _show(report)
        if json_file is not None:
            text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
            write_atomically({json_file: lambda path: path.write_text(text, encoding="utf-8")})
            typer.echo(f"wrote {json_file}")
        if sheet is not None:
            drawn = draw_sheet(read_annotations(data, refused=[]), images, count=sheet_images)
            drawn.save(sheet)
            typer.echo(f"wrote {sheet}")
    if report.problems:
        raise typer.Exit(FAILED)


def _show(report: DataReport) -> None:
    """Print what is there as tables, and what is wrong kind by kind."""
    typer.echo(f"{report.name}: {report.images} images, {report.objects} objects, {report.crowds} crowds")
    classes = Table("class", "objects", "share")
    for name, count in report.classes.items():
        classes.add_row(name, str(count), f"{count / max(report.objects, 1):.1%}")
    out.print(classes)
    typer.echo("boxes: " + ", ".join(f"{name} {value:g}" for name, value in report.boxes.items()))
    sizes = [f"{size} ({count})" for size, count in list(report.image_sizes.items())[:SHOWN]]
    more = f" and {len(report.image_sizes) - SHOWN} other sizes" if len(report.image_sizes) > SHOWN else ""
    typer.echo(f"images: {', '.join(sizes)}{more}")
    _list("note", report.notes)
    _list("problem", report.problems)
    typer.echo(f"problems: {sum(map(len, report.problems.values()))}")


def _list(what: str, cases: Cases) -> None:
    """Print the number of each kind, and the first cases."""
    for kind, names in cases.items():
        typer.echo(f"{what}: {len(names)} {kind}")
        for name in names[:SHOWN]:
            typer.echo(f"  {name}")
        if len(names) > SHOWN:
            typer.echo(f"  and {len(names) - SHOWN} more")
