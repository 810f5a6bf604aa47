"""How busy this process and all others keep the processor cores of this machine."""

from __future__ import annotations

import os
import time

import psutil

CORES = os.cpu_count() or 1


def own_busy_core_s() -> float:
    """Return the core-seconds that this process has used, counted from some start."""
    return time.process_time()


def other_busy_core_s() -> float:
    """Return the core-seconds that all other processes have used, counted from some start."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0) + getattr(times, "steal", 0.0)
    # Linux counts the time of guests in that of their user.
    guests_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle_s - guests_s - time.process_time())
