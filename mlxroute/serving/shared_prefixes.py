"""The KV caches that a prompt begins with: kept ones, and those of answers that are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mlxroute.sequences import common_prefix_length
from mlxroute.serving.small_client import SmallClient

if TYPE_CHECKING:
    from mlxroute.small.kv_cache import CacheLayers
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


class ReadChunks:
    """The whole chunks that have been read of a prompt, to be kept if its client leaves.

    They are not kept before, as a prompt that is too large to be kept would displace others.

    Args:
        client: The client.
        cache: Where they are kept.
    """

    def __init__(self, client: SmallClient, cache: PrefixCache) -> None:
        self._client = client
        self._cache = cache
        self._layers: CacheLayers = []
        self._ids: Sequence[int] = ()

    def update(self) -> None:
        """Note what the client has read, after each chunk; nothing if it could not be kept."""
        sequence = self._client.sequence
        if sequence.is_divisible and self._cache.fits(sequence.layers):
            self._layers, self._ids = sequence.copy(len(sequence.ids))

    def keep(self) -> None:
        """Keep them for later prompts of the client's owner."""
        self._cache.add(self._layers, self._ids, self._client.prompt.owner)
