"""Paired, interleaved measurements, and reports that name machine, versions and command."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

Result = TypeVar("Result")


def interleaved(
    sides: Mapping[str, Callable[[int], Result]], *, rounds: int, warm_ups: int = 1
) -> dict[str, list[Result]]:
    """Run every side once a round, in turns, each round beginning with another side.

    A side is called with the round's number; the first `warm_ups` rounds, numbered 0, do not count.
    """
    names = list(sides)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for index in range(-warm_ups, rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            result = sides[name](max(index, 0))
            if index >= 0:
                results[name].append(result)
    return results


def spread(values: Sequence[float], *, digits: int = 4) -> dict[str, float]:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The spread of ours over theirs, pair by pair."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], digits=3)


def seconds(work: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call takes."""
    began = clock()
    work()
    return clock() - began


def describe_environment(command: str) -> dict[str, Any]:
    """What a reader needs to measure again."""
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
