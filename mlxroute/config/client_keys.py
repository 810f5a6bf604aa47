"""The keys that clients of the endpoint must send."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from mlxroute.config.server_key import Secret
from mlxroute.config.settings import Settings
from mlxroute.errors import ConfigError

_SHORTEST_KEY = 16


def read_client_keys(settings: Settings, environ: Mapping[str, str]) -> tuple[Secret, ...]:
    """Return the keys of the settings' variable and file; empty if neither is set.

    Raises ConfigError if a variable or file has no key, or others can read the file.
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
        keys += _read_file(Path(settings.client_key_file).expanduser())
    for key in keys:
        if len(key) < _SHORTEST_KEY:
            raise ConfigError(
                f"a key of clients has fewer than {_SHORTEST_KEY} characters; `openssl rand -hex"
                " 24` prints a good one"
            )
    return tuple(map(Secret, keys))


def _read_file(path: Path) -> list[str]:
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the key file {path} cannot be read: {exc}") from exc
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"other users can open the key file {path}; run `chmod 600 {path}`")
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigError(f"the key file {path} holds no key", parameter="client_key_file")
    return keys
