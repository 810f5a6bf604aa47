"""The keys that clients of the endpoint must send."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mlxroute.config.server_key import (
    MAX_KEY_FILE_BYTES,
    Secret,
    is_key,
    refuse_readable_by_others,
)
from mlxroute.config.settings import Settings
from mlxroute.errors import ConfigError
from mlxroute.untrusted_text import TextFile
from mlxroute.user_folders import expand_user

SHORTEST_KEY = 16
"""The least number of characters of a client's key."""
UNSENDABLE = "that not every client can send; use letters, digits and signs of ASCII"
"""Why a key is refused that is none to `is_key`."""


def read_client_keys(settings: Settings, environ: Mapping[str, str]) -> tuple[Secret, ...]:
    """Return the keys of the settings' variable and file; empty if neither is set.

    A file has one key per row; blank rows and rows that begin with `#` are ignored. Raises
    ConfigError if a variable or file has no key, for a key that not every client can send, that has
    a space in it or is too short, and if others can read the file.
    """
    keys = []
    if settings.client_key_env is not None:
        if not (value := environ.get(settings.client_key_env, "").strip()):
            raise ConfigError(
                "the environment variable that should hold the clients' key is not set",
                parameter="client_key_env",
            )
        keys.append(value)
    if settings.client_key_file is not None:
        keys += _read_file(expand_user(settings.client_key_file))
    for key in keys:
        if len(key) < SHORTEST_KEY:
            raise ConfigError(
                f"a key of clients has fewer than {SHORTEST_KEY} characters; `openssl rand -hex"
                " 24` prints a good one"
            )
        if not is_key(key):
            raise ConfigError(f"there is a key of clients {UNSENDABLE}")
        if " " in key:
            raise ConfigError(
                "a key of clients has a space in it; put one key on each line, and comments on"
                " lines of their own, which begin with #"
            )
    return tuple(map(Secret, keys))


def _read_file(path: Path) -> list[str]:
    file = TextFile(path, "the key file", max_bytes=MAX_KEY_FILE_BYTES, error=ConfigError)
    rows = [text.strip() for _, text in file.rows()]
    keys = [row for row in rows if row and not row.startswith("#")]
    refuse_readable_by_others(path)
    if not keys:
        raise ConfigError(f"the key file {path} holds no key", parameter="client_key_file")
    return keys
