"""The command line: ``conditional-detr``. One file per command.

The files import what a command needs when it runs: ``--help`` and shell completion load neither torch nor torchvision.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version as version_of
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from conditional_detr.cli.analyse import analyse
from conditional_detr.cli.attention import attention
from conditional_detr.cli.benchmark import benchmark
from conditional_detr.cli.check_data import check_data
from conditional_detr.cli.compare import compare
from conditional_detr.cli.console import one_line_errors, warn_in_one_line
from conditional_detr.cli.convert import convert
from conditional_detr.cli.convert_data import convert_data
from conditional_detr.cli.detect import detect
from conditional_detr.cli.evaluate import evaluate
from conditional_detr.cli.export import export
from conditional_detr.cli.info import info
from conditional_detr.cli.push import push
from conditional_detr.cli.quantize import quantize
from conditional_detr.cli.serve import serve
from conditional_detr.cli.train import train
from conditional_detr.cli.video import video
from conditional_detr.system.console import PIPE_CLOSED, printable


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Escape control characters of arguments in typer's own messages; end clearly if standard output is refused."""
    try:
        yield
    except BrokenPipeError as error:  # the reader, such as "head", has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it exits
        raise typer.Exit(PIPE_CLOSED) from error
    except OSError as error:
        with one_line_errors():
            if error.filename is not None:  # not of a stream
                raise
            raise OSError(f"standard output: cannot be written: {error.strerror or error}") from error
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):  # the class of usage errors is not public
            error.message = "\n".join(map(printable, message.split("\n")))  # type: ignore[attr-defined]
        raise


class _Commands(TyperGroup):
    """The commands, with clear errors of their arguments and of standard output."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _clear_errors():
            return super().make_context(*args, **options)

    def invoke(self, *args: Any) -> Any:
        with _clear_errors():
            return super().invoke(*args)


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")

_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Detect": (detect, video, attention),
    "Train and evaluate": (train, evaluate, analyse, check_data, convert_data, compare),
    "Checkpoints": (info, convert, push),
    "Deploy": (serve, export, quantize, benchmark),
}


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
    """Detect objects with Conditional DETR; train, evaluate, convert and export its models.

    Exit codes: 0 success; 1 partial failure; 2 usage or setup error; 130 interrupted; 141 output closed by its reader.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an encoding such as ASCII lacks characters
    warn_in_one_line()


for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
