"""Model weights: resolve a name to a local directory by cache, download and conversion."""

from mlxroute.weights.resolve import (
    CachedModel,
    LocalModel,
    cached,
    default_cache_dir,
    pull,
    reachable_sources,
    resolve,
)

__all__ = [
    "CachedModel",
    "LocalModel",
    "cached",
    "default_cache_dir",
    "pull",
    "reachable_sources",
    "resolve",
]
