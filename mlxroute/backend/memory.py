"""How much memory a new model may take."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes a process can still take: free memory within the container's and the shell's limits."""
    limits = [int(psutil.virtual_memory().available), *_cgroup_left()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft - int(psutil.Process().memory_info().vms))
    return max(0, min(limits))


def _cgroup_left() -> list[int]:
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit = (_CGROUP / limit_name).read_text(encoding="ascii").strip()
            used = (_CGROUP / used_name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        # Page cache counts as used but is given back, so only a real limit below the machine's
        # own memory is of interest.
        if limit.isdigit() and int(limit) < psutil.virtual_memory().total:
            return [int(limit) - int(used) + _reclaimable()]
    return []


def _reclaimable() -> int:
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
