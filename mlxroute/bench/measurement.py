"""Interleaved measurements, their summaries, and the environment of a report."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def run_interleaved(
    sides: Mapping[str, Callable[[int], _Result]], *, rounds: int, warm_ups: int = 1
) -> dict[str, list[_Result]]:
    """Run every side once per round; return the results of each side by round.

    The side that starts rotates from round to round.

    Args:
        sides: Functions to run, by name. They take the number of the round, 0 in a warm-up.
        rounds: Number of rounds with results.
        warm_ups: Number of rounds before, without results. 1 by default.
    """
    names = list(sides)
    results: dict[str, list[_Result]] = {name: [] for name in names}
    for index in range(-warm_ups, rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            result = sides[name](max(index, 0))
            if index >= 0:
                results[name].append(result)
    return results


def spread(values: Sequence[float], *, digits: int = 4) -> dict[str, float]:
    """Return median, minimum and maximum, rounded."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios `ours / theirs`, pair by pair."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], digits=3)


def time_call(work: Callable[[], object]) -> float:
    """Return the seconds that one call of `work` takes."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def describe_environment(command: str) -> dict[str, Any]:
    """Return command, date, machine and versions, for a report."""
    import mlx.core as mx

    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS", "all"),
            "device": str(mx.default_device()),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mlxroute", "mlx", "mlx-lm")},
        },
    }
