"""Settings: flags override environment variables, which override the config file."""

from mlxroute.config.never_send_patterns import read_never_send
from mlxroute.config.paths import default_config_path, user_catalog_dir
from mlxroute.config.prices import read_prices
from mlxroute.config.server_key import Secret, read_key
from mlxroute.config.settings import SERVER_SETTINGS, Settings, parse_share
from mlxroute.config.sources import load_settings

__all__ = [
    "SERVER_SETTINGS",
    "Secret",
    "Settings",
    "default_config_path",
    "load_settings",
    "parse_share",
    "read_key",
    "read_never_send",
    "read_prices",
    "user_catalog_dir",
]
