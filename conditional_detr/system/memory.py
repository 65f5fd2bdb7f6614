"""How much memory a process may still take."""

import math
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> float:
    """Return the bytes of memory that this process may take; infinity where the system does not tell it."""
    found = [math.inf]
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with suppress(OSError, IndexError):
        group = _CGROUPS / Path("/proc/self/cgroup").read_text().split("::")[1].split("\n")[0].lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError, KeyError):  # no limit is "max"
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append(limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return min(found)


def readable_bytes(count: float) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
