"""Training: the loop, its steps, checkpoints, logs and validation. Public names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conditional_detr.training.config import TrainConfig
    from conditional_detr.training.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]

_MODULES = {"TrainConfig": "config", "TrainResult": "loop", "train": "loop"}


def __getattr__(name: str) -> Any:
    """Import a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
