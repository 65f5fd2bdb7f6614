"""More than one machine: bulk detection on Ray, and the service on Ray Serve."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conditional_detr.distributed.detect import detect_dataset
    from conditional_detr.distributed.pool import BulkResult
    from conditional_detr.distributed.serve import deployment

__all__ = ["BulkResult", "deployment", "detect_dataset"]

_MODULES = {"BulkResult": "pool", "deployment": "serve", "detect_dataset": "detect"}


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use: Ray's small processes need no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
