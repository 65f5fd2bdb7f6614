"""``conditional-detr attention``: where the model looks for an object, the paper's figure 1."""

from pathlib import Path
from typing import Annotated

import typer

from conditional_detr.cli.console import AUTO, one_line_errors, out, pick_device
from conditional_detr.inference.detector import PUBLISHED, Detector
from conditional_detr.inference.listing import list_images
from conditional_detr.system.atomic_files import write_atomically


def attention(
    image: Annotated[str, typer.Argument(help="An image's file or http(s) address.", show_default=False)],
    weights: Annotated[str, typer.Option(help="A folder, a file, or a hub id 'owner/name'.")] = PUBLISHED,
    which: Annotated[int, typer.Option("--object", help="Which object: 1 is the best one.", min=1)] = 1,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Of this class only; again for more.", show_default="all")
    ] = None,
    layers: Annotated[
        list[int] | None,
        typer.Option("--layer", help="Decoder layer, from 0 or, from the end, -1; again for more.", show_default="-1"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, mps.")] = AUTO,
    output: Annotated[Path, typer.Option(help="Folder for the image that is written.")] = Path("detections"),
) -> None:
    """Draw where the model looks for an object: a column a head, with its content, spatial and combined attention."""
    with one_line_errors():
        if image == "-" or Path(image).is_dir():
            raise ValueError(f"expected one image, got {'standard input' if image == '-' else image}")
        (source, name), *more = list_images([image], output=output).images
        if more:
            raise ValueError(f"expected one image, got {image}, which means {len(more) + 1}")
        detector = Detector.from_pretrained(weights, device=pick_device(device))
        found = detector(source, threshold=0, top_k=which, classes=classes)
        if len(found) < which:
            raise ValueError(f"--object {which}: expected 1 to {len(found)}, the number of objects")
        figure = detector.draw_attention(found, which - 1, layers=layers or (-1,))
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{name.name}-attention-{which}.png"
        write_atomically({path: lambda unfinished: figure.save(unfinished, "PNG")})
    box, score, called = found[which - 1]
    place = " ".join(f"{value:.1f}" for value in box)
    out.print(f"{called} {score:.3f} at {place}; drawn in {path}", soft_wrap=True, highlight=False, markup=False)
