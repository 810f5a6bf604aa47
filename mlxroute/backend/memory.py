"""Free memory, within the limits of the system, the container, the job and the shell."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import NamedTuple

import psutil

_CGROUP = Path("/sys/fs/cgroup")
# A line for each hierarchy: its number, its controllers and the process's group in it.
_OWN_CGROUPS = Path("/proc/self/cgroup")
_OWN_CGROUP = re.compile(r"\d+:(.*?):/(.*)")


class _Version(NamedTuple):
    """A version of control groups: its controller of memory, and names of files and of a key.

    `cache` is the key of the page cache that the kernel frees on demand, that of groups below
    included.
    """

    controller: str
    limit: str
    used: str
    cache: str


_VERSIONS = (
    _Version("", "memory.max", "memory.current", "inactive_file"),
    _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes() -> int:
    """Return the bytes of memory that this process can still allocate."""
    limits = [int(psutil.virtual_memory().available), *_cgroup_available()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft - int(psutil.Process().memory_info().vms))
    return max(0, min(limits))


def _cgroup_available() -> list[int]:
    """Return the bytes left in each memory limit on this process: its group's, and those above."""
    return [
        left
        for version in _VERSIONS
        for folder in _own_folders(version.controller)
        if (left := _bytes_left(folder, version)) is not None
    ]


def _own_folders(controller: str) -> set[Path]:
    """Return the folders of this process's group and of those above it; some may not exist.

    A container often has a view of its own group alone, as the topmost one.
    """
    root = _CGROUP / controller
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {root}
    entries = [match for line in lines if (match := _OWN_CGROUP.fullmatch(line))]
    groups = [Path(entry[2]) for entry in entries if controller in entry[1].split(",")]
    return {root} | {root / part for group in groups for part in (group, *group.parents)}


def _bytes_left(folder: Path, version: _Version) -> int | None:
    """Return the bytes left in the memory limit of a group; None if it has none."""
    try:
        limit = (folder / version.limit).read_text(encoding="ascii").strip()
        used = (folder / version.used).read_text(encoding="ascii").strip()
    except OSError:
        return None
    # A limit above the machine's memory is none. Page cache counts as used, but is reclaimed.
    if not limit.isdigit() or int(limit) >= psutil.virtual_memory().total:
        return None
    return int(limit) - int(used) + _stat_bytes(folder / "memory.stat", version.cache)


def _stat_bytes(file: Path, key: str) -> int:
    """Return the bytes of a key in a file of memory statistics; 0 if there is none."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{key} "))
