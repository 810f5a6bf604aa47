"""Model weights: a cache of model directories, filled by downloads and GGUF conversion."""

from mlxroute.weights.request import CheckSize, LocalModel, WeightsSize, accept_any_size
from mlxroute.weights.resolve import (
    CachedModel,
    check_sources,
    list_cached,
    pull,
    resolve,
)

__all__ = [
    "CachedModel",
    "CheckSize",
    "LocalModel",
    "WeightsSize",
    "accept_any_size",
    "check_sources",
    "list_cached",
    "pull",
    "resolve",
]
