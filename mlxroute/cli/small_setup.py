"""The small model of the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxroute.cli.folders import expand_optional
from mlxroute.config import Settings

if TYPE_CHECKING:
    from mlxroute.cli.progress import ByteProgress
    from mlxroute.small import SmallModel

DEFAULT_SMALL = "qwen2.5-coder-0.5b"


def load_small(settings: Settings, progress: ByteProgress) -> SmallModel:
    """Fetch the small model if it is not cached, and load it."""
    from mlxroute.small import SmallModel

    return SmallModel.load(
        settings.small or DEFAULT_SMALL,
        adapter=expand_optional(settings.adapter),
        cache_dir=expand_optional(settings.cache_dir),
        offline=settings.offline,
        kernel=settings.kernel,
        progress=progress.progress,
        notify=progress.notify,
    )
