"""Output, errors and exit codes that all commands share."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TextIO

import typer
from rich.console import Console

from conditional_detr.system.console import PlainConsole

FAILED = 1
"""Exit code of partial failure: some images could not be read, for example."""

UNUSABLE = 2
"""Exit code of a usage or setup error: wrong arguments, weights that do not load."""

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C has stopped, as in shells."""

AUTO = "auto"
"""Default of ``--device``: an accelerator if there is one."""


class Precision(str, Enum):
    """Precisions, by torch's names."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


out = PlainConsole()
err = PlainConsole(stderr=True, soft_wrap=True, highlight=False)


def print_line(text: str, *, style: str | None = None, to: Console = err) -> None:
    """Print one line; names in it may have any characters."""
    to.print(text, style=style, highlight=False, soft_wrap=True)


@contextmanager
def one_line_errors(code: int = UNUSABLE) -> Iterator[None]:
    """Turn errors of input, files and missing packages into one line on stderr and an exit code."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        print_line(f"error: {error}", style="red")
        raise typer.Exit(code) from error


def pick_device(requested: str) -> str:
    """Return the device to use; under torchrun each process of a machine takes an accelerator of its own."""
    import torch

    if requested == AUTO:
        requested = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if requested == "cuda" else requested


def warn_in_one_line() -> None:
    """Show a warning as one line, without its location in the code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print_line(f"warning: {message}", style="yellow")

    warnings.showwarning = show
    # PIL's warning of a large image: beyond the limit it is an error, below it only alarms
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")


def megabytes(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 1e6:.1f} MB"
