"""The prefix cache: the longest shared prefix, within its memory, the least used out."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlxroute.sequences import common_prefix_length
from mlxroute.small.prefix_cache import MIN_PREFIX_TOKENS, PrefixCache

_TOKEN_BYTES = 8


def layers_of(ids: list[int]) -> list[Any]:
    """Return a cache of one layer whose keys are the ids."""
    layer = KVCache()
    keys = mx.array(ids, dtype=mx.float32).reshape(1, 1, -1, 1)
    layer.state = (keys, keys, len(ids))
    return [layer]


def sliding_layers_of(ids: list[int]) -> list[Any]:
    layer = RotatingKVCache(max_size=8)
    for token_id in ids:
        keys = mx.full((1, 1, 1, 1), token_id, dtype=mx.float32)
        layer.update_and_fetch(keys, keys)
    return [layer]


def held_ids(layers: list[Any]) -> list[int]:
    (layer,) = layers
    keys, _ = layer.keys_and_values()
    return [int(value) for value in keys[0, 0, :, 0].tolist()]


_PREFIX = list(range(MIN_PREFIX_TOKENS))
_SEQUENCES = st.lists(st.integers(0, 2), max_size=12).map(lambda tail: [*_PREFIX, *tail])


@given(
    actions=st.lists(st.tuples(st.booleans(), _SEQUENCES), max_size=30),
    capacity=st.integers(0, 120),
)
def test_the_longest_prefix_of_what_is_kept_is_returned(
    actions: list[tuple[bool, list[int]]], capacity: int
) -> None:
    cache = PrefixCache(capacity * _TOKEN_BYTES)
    # The least recently used first.
    kept: list[list[int]] = []
    for is_addition, ids in actions:
        if is_addition:
            cache.add(layers_of(ids), ids)
            container = [old for old in kept if old[: len(ids)] == ids]
            if container:
                kept.remove(container[0])
                kept.append(container[0])
                continue
            if len(ids) <= capacity:
                kept = [*(old for old in kept if ids[: len(old)] != old), ids]
                while sum(map(len, kept)) > capacity:
                    kept.pop(0)
        elif (match := cache.find(ids)) is None:
            assert not kept
        else:
            layers, prefix = match
            length = max(common_prefix_length(old, ids) for old in kept)
            assert held_ids(layers) == list(prefix) == ids[:length]
            used = next(old for old in kept if common_prefix_length(old, ids) == length)
            kept.remove(used)
            kept.append(used)
        assert len(cache) == len(kept)
        assert cache.size_bytes == _TOKEN_BYTES * sum(map(len, kept)) <= capacity * _TOKEN_BYTES


def test_the_memory_is_that_of_the_buffers_whatever_part_of_them_is_kept() -> None:
    cache = PrefixCache(1 << 20)
    before = mx.get_active_memory()
    for first in range(30):
        layer = KVCache()
        keys = mx.full((1, 2, 30, 64), float(first))
        layer.update_and_fetch(keys, keys)
        mx.eval(layer.keys, layer.values)
        cache.add([layer], range(100 * first, 100 * first + 30))
    del layer, keys
    assert len(cache) == 4
    assert mx.get_active_memory() - before == cache.size_bytes == 1 << 20


def test_later_steps_of_either_side_leave_what_is_kept_alone() -> None:
    cache = PrefixCache(1 << 20)
    ids = list(range(40))
    layers = layers_of(ids)
    cache.add(layers, ids)
    new = mx.full((1, 1, 1, 1), 99, dtype=mx.float32)
    layers[0].update_and_fetch(new, new)
    for _ in range(2):
        match = cache.find([*ids[:30], 7])
        assert match is not None
        assert held_ids(match[0]) == ids[:30]
        match[0][0].update_and_fetch(new, new)
        assert held_ids(match[0]) == [*ids[:30], 99]
    assert (cache.hits, cache.misses) == (2, 0)


def test_a_sliding_window_is_used_whole_or_not_at_all() -> None:
    cache = PrefixCache(1 << 20)
    ids = list(range(20))
    cache.add(sliding_layers_of(ids), ids)
    assert cache.find([*ids[:18], 99]) is None
    match = cache.find([*ids, 99])
    assert match is not None
    assert list(match[1]) == ids
    assert match[0][0].offset == 20
    cache.clear()
    assert cache.find([*ids, 99]) is None
    assert cache.size_bytes == len(cache) == 0


def test_a_prefix_is_found_by_its_owner_only() -> None:
    cache = PrefixCache(1 << 20)
    ids = list(range(40))
    for owner, count in (("a", 40), ("b", 20)):
        cache.add(layers_of(ids[:count]), ids[:count], owner)
    # That of one owner neither contains nor displaces that of another.
    assert len(cache) == 2
    lengths = {}
    for owner in ("a", "b", "c"):
        match = cache.find(ids, owner)
        lengths[owner] = None if match is None else len(match[1])
    assert lengths == {"a": 40, "b": 20, "c": None}
