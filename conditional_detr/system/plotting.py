"""Import matplotlib, which is an optional dependency."""

import os
import sys
from contextlib import suppress

_BACKEND = "MPLBACKEND"


def import_matplotlib() -> None:
    """Import matplotlib whatever ``MPLBACKEND`` says; its import fails if that backend is not installed."""
    if "matplotlib" in sys.modules or _BACKEND not in os.environ:
        import matplotlib

        return
    backend = os.environ.pop(_BACKEND)
    try:
        import matplotlib
    finally:
        os.environ[_BACKEND] = backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = backend  # as its import does
