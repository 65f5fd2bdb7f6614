"""``conditional-detr push``: upload a checkpoint with its model card to the hub."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import Precision, one_line_errors, out, print_line
from conditional_detr.cli.options import SOURCE

if TYPE_CHECKING:
    from conditional_detr.checkpoints.model_card import CardDetails

_CARD = "Model card"
_STATED = "--licence, --data, --metrics or --thresholds"


def push(
    weights: Annotated[str, typer.Argument(help=SOURCE)],
    repository: Annotated[str, typer.Argument(help="The hub id to upload to, 'owner/name'.")],
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights, such as apache-2.0.", rich_help_panel=_CARD)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The data it was trained on, one line.", rich_help_panel=_CARD)
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(help="Metrics, written by 'conditional-detr evaluate --json'.", rich_help_panel=_CARD),
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            help="Best threshold of each class, written by 'conditional-detr analyse'.", rich_help_panel=_CARD
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            help="Your own card, instead of a generated one.",
            show_default="the README.md beside the weights or of the run, unless it was generated",
            rich_help_panel=_CARD,
        ),
    ] = None,
    dtype: Annotated[Precision, typer.Option(help="Precision of the weights.")] = Precision.FLOAT32,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, created if needed.")] = None,
) -> None:
    """Upload a checkpoint with a model card to the hub.

    The generated card has the classes, the network, the usage, what you state, and for the folders best and last of a
    training run its settings, curves and metrics. Of the folder of a run, best is uploaded, or last if there is none.

    The token is that of HF_TOKEN or of 'hf auth login'.
    """
    with one_line_errors():
        import torch

        from conditional_detr.checkpoints.hub import check_repository, push_to_hub
        from conditional_detr.checkpoints.loading import from_pretrained
        from conditional_detr.inference.thresholds import read_thresholds
        from conditional_detr.training.card import checkpoint_of_run

        check_repository(repository)
        if card is not None and any(stated is not None for stated in (licence, data, metrics, thresholds)):
            raise ValueError(f"--card: expected no {_STATED} with it, which a generated card states")
        weights = checkpoint_of_run(weights)
        stated = {
            "licence": licence,
            "data": data,
            "evaluation": None if metrics is None else _read_metrics(metrics),
            "thresholds": None if thresholds is None else read_thresholds(thresholds),
        }
        chosen = card or _own_card(weights, {k: v for k, v in stated.items() if v is not None})
        if isinstance(chosen, Path) and not chosen.is_file():
            raise FileNotFoundError(f"{chosen}: no such file")
        address = push_to_hub(
            from_pretrained(weights),
            repository,
            card=chosen,
            dtype=getattr(torch, dtype.value),
            private=private or None,
            revision=revision,
        )
    print_line(f"uploaded to {address}", to=out)


def _own_card(weights: str, stated: dict[str, Any]) -> "CardDetails | Path":
    """Return the card beside the weights that somebody has written; else the details for a generated one.

    Raises:
        ValueError: there is a written card, and something that only a generated one would state.
    """
    from conditional_detr.checkpoints.model_card import CardDetails, folder_of
    from conditional_detr.training.card import details_of_run, written_card

    folder = folder_of(weights)
    if folder is None:
        return CardDetails(**stated)
    written = written_card(folder)
    if written is None:
        return replace(details_of_run(folder), **stated)
    if stated:
        raise ValueError(
            f"{written}: expected no card beside the weights with {_STATED}, which a generated card states; move it,"
            " or state them in it"
        )
    return written


def _read_metrics(path: Path) -> dict[str, Any]:
    """Read the metrics that ``conditional-detr evaluate --json`` has written.

    Raises:
        ValueError: something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected the JSON of 'conditional-detr evaluate --json', got {error}") from error
    per_class = content.get("per_class") if isinstance(content, dict) and "AP" in content else None
    if not isinstance(per_class, dict) or not all(isinstance(of_class, dict) for of_class in per_class.values()):
        raise ValueError(f"{path}: expected the JSON of 'conditional-detr evaluate --json', got other content")
    return content
