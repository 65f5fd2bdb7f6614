"""Share work among the processes that torchrun starts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

_TIMEOUT = timedelta(days=30)  # some processes have more to do than others


class Process(NamedTuple):
    """One of the processes that share the work.

    Attributes:
        rank: index of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()

    def sum(self, number: int) -> int:
        """Return the sum of the numbers of all processes; each of them must call this."""
        if self.size == 1:
            return number
        import torch

        total = torch.tensor(number)
        torch.distributed.all_reduce(total)
        return int(total)


@contextmanager
def join_processes() -> Iterator[Process]:
    """Join the other processes that torchrun has started, if any, and yield this one.

    Raises:
        ValueError: RANK and WORLD_SIZE have values that torchrun does not set.
    """
    variables = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    process = Process(*(int(value) if value.isdecimal() else -1 for value in variables.values()))
    if not 0 <= process.rank < process.size:
        raise ValueError(f"expected RANK and WORLD_SIZE as torchrun sets them, got {variables}")
    if process.size == 1:
        yield process
        return
    from torch import distributed

    # only numbers on the host are exchanged, whatever the device
    distributed.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield process
    finally:
        distributed.destroy_process_group()
