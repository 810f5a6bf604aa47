"""Free memory, within the limits of the system, the container and the shell."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Return the bytes of memory that this process can still allocate."""
    limits = [int(psutil.virtual_memory().available), *_cgroup_available()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft - int(psutil.Process().memory_info().vms))
    return max(0, min(limits))


def _cgroup_available() -> list[int]:
    """Return the bytes left in the container's memory limit; empty if there is no limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = (_CGROUP / limit_name).read_text(encoding="ascii").strip()
            used = (_CGROUP / used_name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        # A limit above the machine's memory is none. Page cache counts as used, but is reclaimed.
        if limit.isdigit() and int(limit) < psutil.virtual_memory().total:
            return [int(limit) - int(used) + _reclaimable()]
    return []


def _reclaimable() -> int:
    """Return the bytes of page cache that the kernel frees on demand."""
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
