"""``conditional-detr check-data``: describe a dataset, and check its images and annotations."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import FAILED, err, one_line_errors, out, print_line
from conditional_detr.cli.options import DATA, FORMAT, IMAGES, OVERWRITE, SPLIT_NAME, DataFormat
from conditional_detr.cli.train_data import Augment, make_augmentation
from conditional_detr.system.atomic_files import encode_text, write_atomically
from conditional_detr.system.outputs import check_output
from conditional_detr.system.progress import progress_bar

if TYPE_CHECKING:
    from conditional_detr.data.report import Cases, DataReport

_SHOWN = 5  # cases of a kind that are printed; the JSON file has all


def check_data(
    data: Annotated[Path, typer.Option(help=DATA)],
    images: Annotated[Path | None, typer.Option(help=IMAGES)] = None,
    format: Annotated[
        DataFormat | None, typer.Option(metavar="<format>", help=FORMAT, show_default="recognised")
    ] = None,
    split_name: Annotated[str, typer.Option(help=SPLIT_NAME)] = "train",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the whole report to this file.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Draw some images with their boxes to this file.")] = None,
    sheet_images: Annotated[int, typer.Option(min=1, help="Number of images on the sheet.")] = 20,
    preview_augmentation: Annotated[
        Path | None, typer.Option(help="Draw some images as --augmentation changes them to this file.")
    ] = None,
    augmentation: Annotated[
        Augment, typer.Option(metavar="<name>", help="Of the preview: paper, small, strong or none.")
    ] = Augment.SMALL,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Check every image and box of a dataset before training on it.

    Problems must be corrected; notes may be intended.

    Exit codes: 0 no problems; 1 problems, which are listed; 2 usage or setup error, such as a missing folder.
    """
    with one_line_errors():
        from PIL import Image

        from conditional_detr.data.contact_sheet import draw_augmented, draw_sheet
        from conditional_detr.data.dataset import CocoData
        from conditional_detr.data.formats.reading import open_data
        from conditional_detr.data.report import check_data as check
        from conditional_detr.modeling.metadata import Preprocessing

        inputs = [path for path in (data, images) if path is not None]
        written = {"json": json_file, "sheet": sheet, "preview-augmentation": preview_augmentation}
        names: dict[Path, str] = {}
        for name, path in written.items():
            if path is None:
                continue
            check_output(path, inputs=inputs, overwrite=overwrite)  # before all the work, not after
            if (other := names.setdefault(path.resolve(), name)) != name:
                raise ValueError(f"--{name}: expected another file than that of --{other}, got {path}")
            if name != "json" and path.suffix.lower() not in Image.registered_extensions():
                raise ValueError(f"{path}: expected the suffix of an image, such as .jpg or .png, got {path.suffix!r}")
        options: dict[str, Any] = {"split": split_name, "format": None if format is None else format.value}

        def write_image(drawn: Image.Image, target: Path) -> None:
            kind = Image.registered_extensions()[target.suffix.lower()]
            write_atomically({target: lambda path: drawn.save(path, kind)})
            print_line(f"wrote {target}", to=out)

        with progress_bar(err, shown=True) as bar:
            task = bar.add_task("checking", total=None)
            report = check(
                data,
                images,
                **options,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        _show(report)
        if json_file is not None:
            text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
            write_atomically({json_file: lambda path: path.write_bytes(encode_text(text))})
            print_line(f"wrote {json_file}", to=out)
        if sheet is not None or preview_augmentation is not None:
            usable = open_data(data, images, **options, errors=[])
        if sheet is not None:
            write_image(draw_sheet(*usable, count=sheet_images), sheet)
        if preview_augmentation is not None:
            dataset = CocoData(*usable, augmentation=make_augmentation(augmentation, Preprocessing()))
            write_image(draw_augmented(dataset), preview_augmentation)
    if report.problems:
        raise typer.Exit(FAILED)


def _show(report: "DataReport") -> None:
    """Print the contents as tables, and the problems by kind."""
    from rich.table import Table

    counts = f"{report.images} images, {report.annotations} annotations, {report.crowds} crowds"
    print_line(f"{report.name}: {counts}", to=out)
    classes = Table("class", "annotations", "share")
    for name, count in report.classes.items():
        classes.add_row(name, str(count), f"{count / max(report.annotations, 1):.1%}")
    out.print(classes)
    print_line("boxes: " + ", ".join(f"{name} {value:g}" for name, value in report.boxes.items()), to=out)
    sizes = [f"{size} ({count})" for size, count in list(report.image_sizes.items())[:_SHOWN]]
    more = f" and {len(report.image_sizes) - _SHOWN} other sizes" if len(report.image_sizes) > _SHOWN else ""
    print_line(f"images: {', '.join(sizes)}{more}", to=out)
    _list("note", report.notes)
    _list("problem", report.problems)
    print_line(f"problems: {sum(map(len, report.problems.values()))}", to=out)


def _list(what: str, cases: "Cases") -> None:
    """Print the number of cases of each kind, and the first of them."""
    for kind, names in cases.items():
        print_line(f"{what}: {len(names)} {kind}", to=out)
        for name in names[:_SHOWN]:
            print_line(f"  {name}", to=out)
        if len(names) > _SHOWN:
            print_line(f"  and {len(names) - _SHOWN} more", to=out)
