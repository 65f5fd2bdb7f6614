"""Commands that share their work among the processes torchrun starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed

_PATIENCE = timedelta(days=30)  # some processes have more to do than others


class Process(NamedTuple):
    """One of the processes.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    def sum(self, number: int) -> int:
        """Return the sum of every process's number, having waited for all."""
        if self.size == 1:
            return number
        total = torch.tensor(number)
        distributed.all_reduce(total)
        return int(total)


@contextmanager
def join_processes() -> Iterator[Process]:
    """Join the other processes that torchrun started, if any.

    Raises:
        ValueError: RANK and WORLD_SIZE that torchrun does not set.
    """
    told = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    numbers = [int(value) if value.isdecimal() else -1 for value in told.values()]
    process = Process(*numbers)
    if not 0 <= process.rank < process.size:
        raise ValueError(f"expected RANK and WORLD_SIZE as torchrun sets them, got {told}")
    if process.size == 1:
        yield process
        return
    # only numbers on the host are exchanged, whatever the device
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield process
    finally:
        distributed.destroy_process_group()
