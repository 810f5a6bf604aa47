"""Model weights: resolve a name to a local directory by cache, download and conversion."""

from mlxroute.weights.resolve import (
    CachedModel,
    LocalModel,
    check_sources,
    default_cache_dir,
    list_cached,
    pull,
    resolve,
)

__all__ = [
    "CachedModel",
    "LocalModel",
    "check_sources",
    "default_cache_dir",
    "list_cached",
    "pull",
    "resolve",
]
