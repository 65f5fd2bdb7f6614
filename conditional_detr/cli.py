"""The command line: ``conditional-detr``."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from conditional_detr.detections import Detections
from conditional_detr.detector import PUBLISHED, Detector
from conditional_detr.evaluate_command import evaluate_command

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Conditional DETR: detect objects on pictures."""


@app.command()
def detect(
    picture: Annotated[Path, typer.Argument(help="A picture file.")],
    weights: Annotated[str, typer.Option(help="A folder, a file, or a hub id 'owner/name'.")] = PUBLISHED,
    threshold: Annotated[float, typer.Option(help="Report objects that score above this, 0 to 1.")] = 0.5,
    top_k: Annotated[int, typer.Option(help="Report at most this many, the best.")] = 100,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, mps.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for the annotated picture and the json.")] = Path("detections"),
) -> None:
    """Detect objects on a picture: print them, draw them, write them as json."""
    try:
        detector = Detector.from_pretrained(weights, device=device)
        found = detector(picture, threshold=threshold, top_k=top_k)
        output.mkdir(parents=True, exist_ok=True)
        drawn, written = output / f"{picture.stem}.png", output / f"{picture.stem}.json"
        found.draw().save(drawn)
        written.write_text(json.dumps({"picture": str(picture), **found.to_dict()}, indent=2) + "\n", encoding="utf-8")
    except (OSError, TypeError, ValueError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    _show(found)
    typer.echo(f"wrote {drawn} and {written}")


app.command("evaluate")(evaluate_command)


def _show(found: Detections) -> None:
    """Print a table of what was found."""
    table = Table("object", "score", "x0", "y0", "x1", "y1", title=f"{len(found)} objects")
    for box, score, name in found:
        table.add_row(name, f"{score:.3f}", *(f"{value:.1f}" for value in box))
    Console().print(table)
