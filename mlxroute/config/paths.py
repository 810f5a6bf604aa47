"""Paths of the config file and of the user's own catalogue."""

from __future__ import annotations

import os
from pathlib import Path


def default_config_path() -> Path:
    """Return the path in `MLXROUTE_CONFIG`, else `config.toml` in the platform's config folder."""
    import platformdirs

    path = os.environ.get("MLXROUTE_CONFIG")
    return Path(path) if path else platformdirs.user_config_path("mlxroute") / "config.toml"


def user_catalog_dir() -> Path:
    """Return the folder of the user's own catalogue files: `models` beside the config file."""
    return default_config_path().parent / "models"
