"""``conditional-detr attention``: draw where the model attends, the paper's figure 1."""

from pathlib import Path
from typing import Annotated

import typer

from conditional_detr.cli.console import AUTO, one_line_errors, out, pick_device, print_line
from conditional_detr.cli.marks import has_mark, save_marked
from conditional_detr.cli.options import OVERWRITE, SOURCE
from conditional_detr.inference.listing import list_images
from conditional_detr.modeling.metadata import PUBLISHED
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.outputs import check_output


def attention(
    image: Annotated[str, typer.Argument(help="An image file or http(s) URL.", show_default=False)],
    weights: Annotated[str, typer.Option(help=SOURCE, rich_help_panel="Model")] = PUBLISHED,
    index: Annotated[int, typer.Option("--object", help="Which detection: 1 has the highest score.", min=1)] = 1,
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Of this class only; repeatable.", show_default="all")
    ] = None,
    layers: Annotated[
        list[int] | None,
        typer.Option("--layer", help="Decoder layer, from 0, or from -1 at the end; repeatable.", show_default="-1"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.", rich_help_panel="Model")] = AUTO,
    output: Annotated[Path, typer.Option(help="Folder for the drawing.")] = Path("detections"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Draw the cross-attention of one detection: content, spatial and combined maps, a column per head."""
    with one_line_errors():
        if image == "-" or Path(image).is_dir():
            raise ValueError(f"expected one image, got {'standard input' if image == '-' else image}")
        (source, name), *more = list_images([image], output=output).images
        if more:
            raise ValueError(f"expected one image, got {image}, which matches {len(more) + 1}")
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{name.name}-attention-{index}.png"
        check_output(path, inputs=[source], overwrite=overwrite, ours=has_mark(path, source))
        from conditional_detr.inference.detector import Detector

        detector = Detector.from_pretrained(weights, device=pick_device(device))
        detections = detector(source, threshold=0, top_k=index, classes=classes)
        if len(detections) < index:
            raise ValueError(f"--object: expected 1 to {len(detections)}, the number of detections, got {index}")
        figure = detector.draw_attention(detections, index - 1, layers=layers or (-1,))
        write_atomically({path: lambda unfinished: save_marked(figure, unfinished, source, ".png")})
    box, score, class_name = detections[index - 1]
    corners = " ".join(f"{value:.1f}" for value in box)
    print_line(f"{class_name} {score:.3f} at {corners}; drawn in {path}", to=out)
