"""What the commands share: where they speak, and how they end."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TextIO

import torch
import typer
from PIL import Image
from rich.console import Console

FAILED = 1
"""Exit code of a command that did its work in part: some images, for example, could not be read."""

UNUSABLE = 2
"""Exit code of a command that could not begin: wrong arguments, weights that do not load."""

INTERRUPTED = 130
"""Exit code of a command that was stopped by Ctrl-C, as shells have it."""

AUTO = "auto"
"""The device option's default: an accelerator where there is one."""


class Precision(str, Enum):
    """Precisions, by torch's names."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


out = Console()
err = Console(stderr=True, soft_wrap=True, highlight=False)


def tell(text: str, *, style: str | None = None, to: Console = err) -> None:
    """Print a line as it is: whatever names stand in it are neither markup nor must they be valid UTF-8."""
    readable = text.encode("utf-8", "backslashreplace").decode("utf-8")
    to.print(readable, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def one_line_errors(code: int = UNUSABLE) -> Iterator[None]:
    """Turn what our own checks raise, and packages that are missing, into one line on stderr and an exit code."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        tell(f"error: {error}", style="red")
        raise typer.Exit(code) from error


def pick_device(wish: str) -> str:
    """Return the device to use; under torchrun each process of a machine takes an accelerator of its own."""
    if wish == AUTO:
        wish = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if wish == "cuda" else wish


def warn_in_one_line() -> None:
    """Show warnings as a person wants them, without the place in the code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        tell(f"warning: {message}", style="yellow")

    warnings.showwarning = show
    # that a large image "could be a decompression bomb" frightens without need: the limit is an error of its own
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def megabytes(size: int) -> str:
    """Spell out a number of bytes."""
    return f"{size / 1e6:.1f} MB"
