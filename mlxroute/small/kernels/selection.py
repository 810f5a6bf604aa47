"""The choice of the kernel for this device, after a self-test of the Metal kernel."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import cast

import mlx.core as mx

from mlxroute.errors import UsageError
from mlxroute.small.kernels import graph_kernel, metal_kernel
from mlxroute.small.kernels.packed_row import HEADER_SIZE
from mlxroute.types import Notify

Kernel = Callable[[mx.array], mx.array]
"""Logits [B, V] to packed rows, lazily."""

_NAMES = ("auto", "metal", "graph")
# Relative and absolute; rounding makes the sums of correct kernels differ by less.
_TOLERANCE = 1e-4


def select_kernel(name: str, *, notify: Notify) -> Kernel:
    """Return the kernel called `name`; `auto` is the Metal kernel if it works, else the graph.

    Raises UsageError for an unknown name, and for `metal` where it does not work.
    """
    if name not in _NAMES:
        raise UsageError(
            f"unknown kernel {name!r}; choose one of {', '.join(_NAMES)}", parameter="kernel"
        )
    if name == "graph" or (name == "auto" and not _has_metal()):
        return graph_kernel.pack_signals
    fault = "MLX has no Metal GPU here" if not _has_metal() else _find_metal_fault()
    if fault is None:
        return metal_kernel.pack_signals
    if name == "metal":
        raise UsageError(
            f"the Metal kernel cannot be used: {fault}; choose kernel auto", parameter="kernel"
        )
    notify(f"the Metal kernel is not used: {fault}; the graph kernel runs instead")
    return graph_kernel.pack_signals


def _has_metal() -> bool:
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


@functools.cache
def _find_metal_fault() -> str | None:
    return find_fault(metal_kernel.pack_signals)


def find_fault(kernel: Kernel) -> str | None:
    """Compare a kernel with the graph kernel on hard rows; describe the first difference.

    Returns None if there is no difference.
    """
    for label, logits in _hard_rows():
        try:
            computed = cast("list[list[float]]", kernel(logits).tolist())
        except (RuntimeError, ValueError) as exc:
            return f"it failed on {label} ({' '.join(str(exc).split())[:200]})"
        expected = cast("list[list[float]]", graph_kernel.pack_signals(logits).tolist())
        # In half precision the greedy id may differ, by how a logsumexp rounds.
        has_exact_ids = logits.dtype == mx.float32
        rows = zip(computed, expected, strict=True)
        if not all(_agrees(row, with_row, has_exact_ids=has_exact_ids) for row, with_row in rows):
            return f"it is wrong on {label}"
    return None


def _agrees(computed: list[float], expected: list[float], *, has_exact_ids: bool) -> bool:
    """Return whether two packed rows have the same ids, and the same sums but for rounding."""
    token = slice(0, 2 if has_exact_ids else 0)
    exact = [values[token] + values[HEADER_SIZE:] for values in (computed, expected)]
    sums = zip(computed[2:HEADER_SIZE], expected[2:HEADER_SIZE], strict=True)
    return exact[0] == exact[1] and all(_is_close(a, b) for a, b in sums)


def _is_close(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or math.isclose(
        a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE
    )


def _hard_rows() -> list[tuple[str, mx.array]]:
    """Return logits [B, V] with special values, ties and uneven sizes, with labels for messages.

    They run each form of the Metal kernel: threadgroups share a wide row, and one reads a short
    one. Rows after the first begin at an offset.
    """
    key = mx.random.key(0)
    wide = mx.random.normal((1, 50_257), key=key) * 4
    ties = mx.round(mx.random.normal((1, 9_001), key=key))
    masked = mx.where(ties > 0, ties, -mx.inf)
    short = mx.random.normal((3, 300), key=key) * 4
    return [
        ("five values", mx.array([[0.5, -1.0, 2.0, 2.0, 0.0]])),
        ("a wide row", wide),
        ("a wide row in bfloat16", wide.astype(mx.bfloat16)),
        ("a row in float16", ties.astype(mx.float16)),
        ("ties", ties),
        ("three wide rows", mx.random.normal((3, 9_001), key=key) * 4),
        ("three short rows", short),
        ("three short rows in bfloat16", short.astype(mx.bfloat16)),
        ("three short rows in float16", short.astype(mx.float16)),
        ("masked values", masked),
        ("a NaN", mx.where(mx.arange(9_001) == 7, mx.nan, ties)),
        ("an infinity", mx.where(mx.arange(9_001) == 8_999, mx.inf, ties)),
    ]
