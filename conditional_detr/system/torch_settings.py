"""Torch's global settings, which a program may have changed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch


@contextmanager
def plain_torch_settings() -> Iterator[None]:
    """Use torch's original settings while the context is active, whatever a program has set.

    Gradients are enabled, autocast is not; the default dtype is float32 and the default device the CPU.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    on_cpu = nullcontext() if device.type == "cpu" else torch.device("cpu")  # the context slows every call of torch
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _no_autocast(), on_cpu:
            yield
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Switch autocast off on all devices on which it is on."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
