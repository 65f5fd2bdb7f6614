"""Paths as users write them."""

from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """Return a path with ``~`` replaced by the home folder; that of a user who does not exist stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
