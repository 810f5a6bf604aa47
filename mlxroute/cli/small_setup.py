"""The small model of the settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mlxroute.cli.folders import expand_optional
from mlxroute.config import Settings

if TYPE_CHECKING:
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.small import SmallModel

_GENERAL_SMALL = "qwen2.5-0.5b"
# Also on the package index, for networks that reach no model hub.
_INDEXED_SMALL = "qwen2.5-coder-0.5b"


def default_small() -> str:
    """Return the small model where none is chosen: on a Mac a general one, elsewhere a coder."""
    return _GENERAL_SMALL if sys.platform == "darwin" else _INDEXED_SMALL


def small_name(settings: Settings) -> str:
    """Return the name that the small model of the settings has: with an adapter, it shows which.

    Raises UsageError if the adapter cannot be read.
    """
    from mlxroute.backend.adapter_folder import adapted_name

    return adapted_name(settings.small or default_small(), expand_optional(settings.adapter))


def load_small(settings: Settings, progress: ByteProgress) -> SmallModel:
    """Fetch the small model if it is not cached, and load it."""
    from mlxroute.small import SmallModel

    return SmallModel.load(
        settings.small or default_small(),
        adapter=expand_optional(settings.adapter),
        cache_dir=expand_optional(settings.cache_dir),
        offline=settings.offline,
        kernel=settings.kernel,
        skip_memory_check=settings.skip_memory_check,
        progress=progress.progress,
        notify=progress.notify,
    )
