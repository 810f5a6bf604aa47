"""Paths of the config file and of the user's own catalogue."""

from __future__ import annotations

import os
from pathlib import Path

from mlxroute.user_folders import config_folder, expand_user

CONFIG_VARIABLE = "MLXROUTE_CONFIG"


def default_config_path() -> Path:
    """Return the path in `MLXROUTE_CONFIG`, else `config.toml` in the platform's config folder.

    Raises ConfigError where no home folder is known.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    return expand_user(path) if path else config_folder() / "config.toml"


def user_catalog_dir() -> Path:
    """Return the folder of the user's own catalogue files: `models` beside the config file."""
    return default_config_path().parent / "models"
