"""Free memory, within the limits of the system, the container and the shell."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
# For versions 2 and 1 of control groups: the files of the limit, the use and its parts, and the key
# of the page cache that the kernel frees on demand, that of groups below included.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes() -> int:
    """Return the bytes of memory that this process can still allocate."""
    limits = [int(psutil.virtual_memory().available), *_cgroup_available()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft - int(psutil.Process().memory_info().vms))
    return max(0, min(limits))


def _cgroup_available() -> list[int]:
    """Return the bytes left in the container's memory limit; empty if there is no limit."""
    for limit_name, used_name, stat_name, cache_key in _CGROUP_FILES:
        try:
            limit = (_CGROUP / limit_name).read_text(encoding="ascii").strip()
            used = (_CGROUP / used_name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        # A limit above the machine's memory is none. Page cache counts as used, but is reclaimed.
        if limit.isdigit() and int(limit) < psutil.virtual_memory().total:
            return [int(limit) - int(used) + _stat_bytes(stat_name, cache_key)]
    return []


def _stat_bytes(name: str, key: str) -> int:
    """Return the bytes of a key in a file of memory statistics; 0 if there is none."""
    try:
        lines = (_CGROUP / name).read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key} "))
