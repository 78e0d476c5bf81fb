"""How many threads a pool gets."""

import os
from math import ceil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may use: of the machine those in its affinity, and no more than a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, min(cores, ceil(quota))) if quota else max(1, cores)


def pool_size(asked: int) -> int:
    """Threads for a pool. asked: by the user, 0 for one per core. More than there are cores wait for each other, which is
    many times as slow, so that they are never started."""
    cores = usable_cores()
    return min(asked or cores, cores)


def _quota(cgroup: Path) -> float:
    """Of processor time, in cores: cgroup v2's cpu.max, or v1's two files; 0 is none."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return 0.0
    try:
        return max(0.0, int(limit) / int(period))
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return 0.0
