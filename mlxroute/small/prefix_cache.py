"""KV caches of earlier sequences, found by the longest prefix that a new prompt shares."""

from __future__ import annotations

import copy
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.small.kv_cache import CacheLayers, is_plain, share

MIN_PREFIX_TOKENS: Final = 16
"""Shorter prefixes are computed again faster than they are looked after."""


@dataclass(frozen=True, slots=True)
class _Entry:
    layers: CacheLayers
    token_ids: array[int]
    owner: str
    size_bytes: int
    # Whether a part of the layers from the start on is a KV cache of its own.
    is_divisible: bool


class PrefixCache:
    """Least recently used KV caches, at most `max_bytes` of them together.

    Layers with all keys and values are usable up to any token. Others, such as sliding windows and
    recurrent states, are usable only where the prompt continues the whole sequence.

    Attributes:
        hits: Lookups that found a prefix.
        misses: Lookups that found none.
        size_bytes: Memory of all caches, with the room that their buffers have for more tokens.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # The least recently used entry first.
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._next_key = 0
        self.hits = 0
        self.misses = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, layers: CacheLayers, token_ids: Sequence[int], owner: str = "") -> None:
        """Keep a KV cache that holds `token_ids`; drop those that it contains or displaces.

        Later changes of `layers` by the sequence that uses them leave what is kept as it is. Only
        `find` with the same `owner`, by default "", returns it.
        """
        ids = array("q", token_ids)
        if len(ids) < MIN_PREFIX_TOKENS or not self.fits(layers):
            return
        is_divisible = is_plain(layers)
        for key, entry in list(self._entries.items()):
            if entry.owner != owner:
                continue
            shared = _common_length(entry.token_ids, ids)
            if is_divisible and shared == len(ids):
                self._entries.move_to_end(key)
                return
            if shared == len(entry.token_ids) and (is_divisible or shared == len(ids)):
                self._remove(key)
        kept = share(layers, len(ids)) if is_divisible else copy.deepcopy(layers)
        # What is kept is a view of the owner's buffers, which have room for more tokens.
        size_bytes = _size_bytes(layers)
        self._entries[self._next_key] = _Entry(kept, ids, owner, size_bytes, is_divisible)
        self._next_key += 1
        self.size_bytes += size_bytes
        while self.size_bytes > self._max_bytes:
            self._remove(next(iter(self._entries)))

    def fits(self, layers: CacheLayers) -> bool:
        """Return whether a KV cache is small enough to be kept."""
        return _size_bytes(layers) <= self._max_bytes

    def find(
        self, token_ids: Sequence[int], owner: str = ""
    ) -> tuple[CacheLayers, Sequence[int]] | None:
        """Return a KV cache of the longest prefix of `token_ids` kept for `owner`, and its ids."""
        ids = array("q", token_ids)
        best_key, best_length = None, MIN_PREFIX_TOKENS - 1
        for key, entry in self._entries.items():
            length = _common_length(entry.token_ids, ids)
            is_whole = length == len(entry.token_ids)
            is_usable = entry.owner == owner and (entry.is_divisible or is_whole)
            if is_usable and length > best_length:
                best_key, best_length = key, length
        if best_key is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(best_key)
        entry = self._entries[best_key]
        if entry.is_divisible:
            layers = share(entry.layers, best_length)
        else:
            layers = copy.deepcopy(entry.layers)
        return layers, ids[:best_length]

    def clear(self) -> None:
        """Drop all caches."""
        self._entries.clear()
        self.size_bytes = 0

    def _remove(self, key: int) -> None:
        self.size_bytes -= self._entries.pop(key).size_bytes


def _size_bytes(layers: CacheLayers) -> int:
    return int(sum(layer.nbytes for layer in layers))


def _common_length(first: array[int], second: array[int]) -> int:
    """Return how many leading ids two sequences share, by bisection of equal halves."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
