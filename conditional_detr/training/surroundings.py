"""What surrounds a training run: packages and environment variables."""

import os
from collections.abc import Callable
from typing import Any

from conditional_detr.system.plotting import import_matplotlib

_SHARDED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")


def make_accelerator() -> Any:
    """Return an Accelerator, after checking that all packages for training are installed.

    ``TrainConfig`` alone decides precision, accumulation and compilation, whatever ``ACCELERATE_*`` variables say.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: a variable asks for parameters that are split among processes.
    """
    check_packages()
    from accelerate import Accelerator

    for name in _SHARDED:
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise ValueError(
                f"{name}: expected no such variable, got {os.environ[name]!r}; each process trains the whole model"
            )
    return Accelerator(mixed_precision="no", dynamo_backend="no")


def check_packages() -> None:
    """Raise ModuleNotFoundError unless all packages for training are installed."""
    try:
        import_matplotlib()  # checked before training, because it is first used at the end
        import accelerate  # noqa: F401
        import tensorboard  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"training needs {error.name}, which is not installed: pip install 'conditional-detr[train]'"
        ) from error


def in_first_process(accelerator: Any, function: Callable[[], None]) -> None:
    """Call a function in the first process only; all processes raise its OSError or ValueError."""
    errors: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            function()
        except (OSError, ValueError) as error:
            errors = [error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]
