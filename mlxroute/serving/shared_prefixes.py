"""The KV caches that a prompt begins with: kept ones, and those of answers that are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mlxroute.sequences import common_prefix_length
from mlxroute.serving.small_client import SmallClient

if TYPE_CHECKING:
    from mlxroute.small.prefix_cache import PrefixCache


def load_prefix(
    client: SmallClient, ids: Sequence[int], cache: PrefixCache, running: Iterable[SmallClient]
) -> None:
    """Give a client the longest prefix of `ids` that the cache or a running answer holds.

    Those of other owners are not used: how much of a prompt was known tells what others asked.
    """
    # It imports MLX, which must follow the BLAS that loading a model opens.
    from mlxroute.small.prefix_cache import MIN_PREFIX_TOKENS

    owner = client.prompt.owner
    prefix = cache.find(ids, owner)
    length = MIN_PREFIX_TOKENS - 1 if prefix is None else len(prefix[1])
    for other in running:
        if other.prompt.owner != owner or not other.sequence.is_divisible:
            continue
        shared = common_prefix_length(other.sequence.ids, ids)
        if shared > length:
            prefix, length = other.sequence.copy(shared), shared
    if prefix is not None:
        client.sequence.load(*prefix)


def keep_read_part(client: SmallClient, cache: PrefixCache) -> None:
    """Keep what a client has read of its prompt for later prompts of its owner."""
    cache.add(client.sequence.layers, client.sequence.ids, client.prompt.owner)
