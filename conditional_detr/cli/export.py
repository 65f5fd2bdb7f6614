"""``conditional-detr export``: a model as one file for other runtimes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from conditional_detr.checkpoints.loading import from_pretrained
from conditional_detr.cli.console import err, megabytes, one_line_errors, out, tell
from conditional_detr.deploy.export import checked_target
from conditional_detr.deploy.export import export as write
from conditional_detr.inference.exported import Description

OVERWRITE = "Replace what is there."


def export(
    source: Annotated[str, typer.Argument(help="Weights: a folder, a file, a short name, or a hub id 'owner/name'.")],
    target: Annotated[Path, typer.Argument(help="The file to write: .onnx, .xml (OpenVINO) or .pt2 (torch.export).")],
    half: Annotated[bool, typer.Option("--half", help="Compute in float16, for GPUs.")] = False,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="With post-processing in the file, of at most this many detections.")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="What to compare the file with the model on.", show_default="one that is drawn")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Write a model into one file that runs without this library, on images of any size and any number of them.

    The file is run at two sizes, and its logits and boxes compared with the model's, before it is moved to its place.
    Class names and preprocessing stand in it, so that detect, evaluate and Detector.from_file take it as it is.

    With --top-k the file also takes the sizes of the images and gives corners in their pixels, scores and labels.
    """
    with one_line_errors(), err.status("loading") as status:
        check_free(checked_target(target), overwrite=overwrite)
        model = from_pretrained(source, revision=revision)
        dtype = torch.float16 if half else torch.float32
        described = write(model, target, dtype=dtype, top_k=top_k, image=image, progress=status.update)
    report(target, described)


def check_free(target: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError if a file, or the weights beside an ``.xml``, would be replaced unasked."""
    files = (target, target.with_suffix(".bin")) if target.suffix == ".xml" else (target,)
    there = [file.name for file in files if file.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{target}: already there: {', '.join(there)}; --overwrite replaces")


def report(target: Path, described: Description) -> None:
    """Say what was written, and how near to the model it is."""
    weights = target.with_suffix(".bin")
    size = target.stat().st_size + (weights.stat().st_size if target.suffix == ".xml" else 0)
    tell(f"wrote {target} ({described.precision}, {megabytes(size)})", to=out)
    for one in described.parity:
        differences = f"logits differ by at most {one.logits:.1e}, boxes by {one.boxes:.1e}"
        tell(f"compared with the model at {one.height} x {one.width}: {differences}", to=out)
