"""Where things are kept."""

from __future__ import annotations

from pathlib import Path


def cache_dir_of(cache_dir: str | None) -> Path:
    """The folder weights are kept in."""
    from mlxroute.weights import default_cache_dir

    return Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
