"""Training: the loop, its steps, checkpoints, logs and validation. Public names are imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conditional_detr.training.callbacks import Callback
    from conditional_detr.training.config import TrainConfig
    from conditional_detr.training.loop import train
    from conditional_detr.training.result import TrainResult

__all__ = ["Callback", "TrainConfig", "TrainResult", "train"]

_MODULES = {"Callback": "callbacks", "TrainConfig": "config", "TrainResult": "result", "train": "loop"}


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
