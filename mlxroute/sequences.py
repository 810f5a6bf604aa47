"""Helpers for sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

_T = TypeVar("_T")


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def chunks(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """Yield the items in order, `size` at a time."""
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
