"""The command line: ``conditional-detr``. One file a command."""

from importlib.metadata import version as version_of
from typing import Annotated

import typer

from conditional_detr.cli.attention import attention
from conditional_detr.cli.benchmark import benchmark
from conditional_detr.cli.check_data import check_data
from conditional_detr.cli.console import warn_in_one_line
from conditional_detr.cli.convert import convert
from conditional_detr.cli.detect import detect
from conditional_detr.cli.evaluate import evaluate
from conditional_detr.cli.export import export
from conditional_detr.cli.info import info
from conditional_detr.cli.quantize import quantize
from conditional_detr.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version_of("conditional-detr"))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Conditional DETR: detect objects on images, and look after the weights that do it.

    Every command ends with 0 if all went well, 1 if something failed on the way, 2 if it could not begin.
    """
    warn_in_one_line()


app.command()(detect)
app.command()(attention)
app.command()(train)
app.command()(evaluate)
app.command()(check_data)
app.command()(info)
app.command()(convert)
app.command()(export)
app.command()(quantize)
app.command()(benchmark)
