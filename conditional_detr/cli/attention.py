"""``conditional-detr attention``: draw where the model attends, the paper's figure 1."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conditional_detr.cli.console import AUTO, one_line_errors, out, pick_device, print_line
from conditional_detr.cli.marks import has_mark, save_marked
from conditional_detr.cli.options import OVERWRITE, SOURCE
from conditional_detr.inference.listing import list_images
from conditional_detr.modeling.metadata import PUBLISHED
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.outputs import check_output

if TYPE_CHECKING:
    from PIL.Image import Image

    from conditional_detr.inference.detections import Detections

_SOURCES = f"{SOURCE} Repeat it to compare models."


def attention(
    image: Annotated[str, typer.Argument(help="An image file or http(s) URL.", show_default=False)],
    weights: Annotated[
        list[str] | None, typer.Option(help=_SOURCES, show_default=PUBLISHED, rich_help_panel="Model")
    ] = None,
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
    """Draw the cross-attention of one detection: content, spatial and combined maps, a column per head.

    With several --weights, the drawings are below one another: for the same object, which is the first model's
    detection, and the one of each other model that overlaps it most.
    """
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

        all_weights = weights or [PUBLISHED]
        box: Sequence[float] = ()
        figures = []
        for model in all_weights:
            detector = Detector.from_pretrained(model, device=pick_device(device))
            detections = detector(
                source, threshold=0, top_k=detector.model.config.num_queries if box else index, classes=classes
            )
            if len(detections) < (1 if box else index):
                raise ValueError(f"--object: expected 1 to {len(detections)}, the number of detections, got {index}")
            chosen, overlap = _most_overlapping(detections, box) if box else (index - 1, 1.0)
            label = model if len(all_weights) > 1 else ""
            figures.append(detector.draw_attention(detections, chosen, layers=layers or (-1,), name=label))
            found, score, class_name = detections[chosen]
            where = f"at {' '.join(f'{value:.1f}' for value in found)}"
            compared = f", IoU {overlap:.2f} with the first" if box else ""
            print_line(f"{label and label + ': '}{class_name} {score:.3f} {where}{compared}", to=out)
            box = box or found
        write_atomically({path: lambda unfinished: save_marked(_stack(figures), unfinished, source, ".png")})
    print_line(f"drawn in {path}", to=out)


def _most_overlapping(detections: "Detections", box: Sequence[float]) -> tuple[int, float]:
    """Return the index of the detection whose IoU with a box (x0 y0 x1 y1, in pixels) is largest, and that IoU."""
    import torch
    from torchvision.ops import box_iou

    overlaps = box_iou(torch.tensor([box]), detections.boxes)[0]
    return int(overlaps.argmax()), float(overlaps.max())


def _stack(images: "Sequence[Image]") -> "Image":
    """Return images below one another."""
    from PIL import Image

    stacked = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        stacked.paste(image, (0, top))
        top += image.height
    return stacked
