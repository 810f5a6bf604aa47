"""Model weights: a cache of model directories, filled by downloads and GGUF conversion."""

from mlxroute.weights.request import LocalModel
from mlxroute.weights.resolve import (
    CachedModel,
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
