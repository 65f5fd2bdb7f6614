"""What the commands share: where they speak, and how they end."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

FAILED = 1
"""Exit code of a command that did its work in part: some pictures, for example, could not be read."""

UNUSABLE = 2
"""Exit code of a command that could not begin: wrong arguments, weights that do not load."""

out = Console()
err = Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def one_line_errors(code: int = UNUSABLE) -> Iterator[None]:
    """Turn what our own checks raise into one line on stderr and an exit code."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        err.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(code) from error


def megabytes(size: int) -> str:
    """Spell out a number of bytes."""
    return f"{size / 1e6:.1f} MB"
