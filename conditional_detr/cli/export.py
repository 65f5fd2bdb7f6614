"""``conditional-detr export``: export a model for torch.export, ONNX Runtime or OpenVINO."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import err, megabytes, one_line_errors, out, print_line
from conditional_detr.cli.options import OVERWRITE, REVISION, SOURCE, STORED_THRESHOLDS, TOP_K

if TYPE_CHECKING:
    from conditional_detr.inference.exported import Description


def export(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    target: Annotated[Path, typer.Argument(help="File to write: .onnx, .xml (OpenVINO) or .pt2 (torch.export).")],
    half: Annotated[bool, typer.Option("--half", help="Export in float16, for GPUs.")] = False,
    top_k: Annotated[int | None, typer.Option(min=1, help=TOP_K)] = None,
    thresholds: Annotated[Path | None, typer.Option(help=STORED_THRESHOLDS)] = None,
    image: Annotated[
        str | None, typer.Option(help="Image to compare the two models on.", show_default="a generated pattern")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference of the boxes, in fractions of the image.", show_default="1e-5; --half 0.02"
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Export a model for any image size and batch size. The exported model runs without this library.

    Before the target is written, logits and boxes are compared with the original model at two image sizes. The
    exported model contains class names and preprocessing, so detect, evaluate and Detector.from_file can run it.

    With --top-k it also takes the image sizes and returns corners in pixels, scores and labels.
    """
    with one_line_errors(), err.status("loading") as status:
        import torch

        from conditional_detr.checkpoints.loading import from_pretrained
        from conditional_detr.deploy.export import export as write
        from conditional_detr.deploy.export_files import check_free, checked_target
        from conditional_detr.inference.thresholds import read_thresholds

        inputs = [path for path in (source, thresholds) if path is not None]
        check_free(checked_target(target), *inputs, overwrite=overwrite)
        of_classes = None if thresholds is None else read_thresholds(thresholds)
        model = from_pretrained(source, revision=revision)
        dtype = torch.float16 if half else torch.float32
        checked: dict[str, Any] = {"image": image, "tolerance": tolerance, "overwrite": overwrite}
        options: dict[str, Any] = {"dtype": dtype, "top_k": top_k, "thresholds": of_classes, **checked}
        description = write(model, target, progress=status.update, **options)
    report(target, description)


def report(target: Path, description: "Description") -> None:
    """Print the size of an exported model and its differences from the original model."""
    from conditional_detr.inference.checksums import files_of

    size = sum(file.stat().st_size for file in files_of(target))
    print_line(f"wrote {target} ({description.precision}, {megabytes(size)})", to=out)
    for parity in description.parity:
        differences = f"logits differ by at most {parity.logits:.1e}, boxes by {parity.boxes:.1e}"
        print_line(f"compared with the model at {parity.height} x {parity.width}: {differences}", to=out)
