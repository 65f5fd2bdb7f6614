"""Build a model on the meta device, without initialising its weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from conditional_detr.modeling.architectures import plain_class
from conditional_detr.modeling.detection_transformer import DetectionTransformer

_FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.tensor}
    | {torch.arange, torch.linspace, torch.rand, torch.randn}
)
_CONSTANTS = frozenset({torch.zeros, torch.ones})
_INITIALISERS = frozenset(
    {Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_}
    | {nn.init.normal_, nn.init.uniform_, nn.init.constant_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_}
)


class MetaInit(TorchFunctionMode):
    """Context in which modules are built on the meta device and initialisation is skipped.

    With the meta device alone, every initialiser still runs, which takes longer than reading the weights.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip initialisers, allocate on the meta device, and call everything else unchanged."""
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        if func in _CONSTANTS:
            func = torch.empty
        if func in _FACTORIES and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def other_modules(model: DetectionTransformer) -> dict[str, tuple[type[nn.Module], type[nn.Module] | None]]:
    """Return the modules of a model that are of another class than those of a new model, such as a user's own.

    Returns:
        For each name the class, and that of the new model's module of this name; None if it has none.
    """
    with MetaInit():
        plain = {name: type(module) for name, module in plain_class(model)(model.config).named_modules()}
    got = {name: type(module) for name, module in model.named_modules()}
    return {name: (kind, plain.get(name)) for name, kind in got.items() if kind is not plain.get(name)}
