"""Evaluate under torch.distributed: each process computes a part, and all get the result of all parts."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")
Part = TypeVar("Part")


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gather(compute: Callable[[], Part], merge: Callable[[list[Part]], T]) -> T:
    """Compute a part in each process, merge all parts in the first one, and return the result in every process.

    An error in one process is raised in every process.
    """
    rank, processes = process_rank()
    if processes == 1:
        return merge([compute()])
    parts: list[Any] | None = [None] * processes if rank == 0 else None
    distributed.gather_object(_catch(compute), parts)
    outcome = [None if parts is None else _catch(lambda: merge([_unwrap(part) for part in parts]))]
    distributed.broadcast_object_list(outcome)
    return _unwrap(outcome[0])


def _catch(function: Callable[[], T]) -> T | Exception:
    """Return a function's result or error: if one process raised alone, the others would wait forever."""
    try:
        return function()
    except (OSError, TypeError, ValueError) as error:
        return error


def _unwrap(outcome: Any) -> Any:
    """Return a result, or raise it if it is an error."""
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
