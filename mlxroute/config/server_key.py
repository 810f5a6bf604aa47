"""The API key of the large model's server."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlxroute.config.settings import DEFAULT_KEY_ENV, Settings
from mlxroute.errors import ConfigError

_VARIABLE_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


@dataclass(frozen=True, slots=True)
class Secret:
    """A key that only `reveal()` shows; its `repr` and `str` do not contain it."""

    _value: str = field(repr=False)

    def reveal(self) -> str:
        """Return the key itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"


def read_key(settings: Settings, environ: Mapping[str, str]) -> Secret | None:
    """Return the server's key, None if there is none.

    A variable named by `key_env` comes first, then the key file, then OPENAI_API_KEY, which may be
    set for another program. Raises ConfigError if the named
    variable is not set, or the key file cannot be read or is readable by other users.
    """
    is_variable_chosen = settings.key_env != DEFAULT_KEY_ENV
    if not is_variable_chosen and settings.key_file is not None:
        value = _read_key_file(Path(settings.key_file).expanduser())
    else:
        value = environ.get(settings.key_env, "").strip()
        if is_variable_chosen and not value:
            raise ConfigError(_missing_variable(settings.key_env), parameter="key_env")
    return Secret(value) if value else None


def _missing_variable(name: str) -> str:
    # The user may have typed the key itself, so only what looks like a variable name is repeated.
    if _VARIABLE_NAME.fullmatch(name):
        return f"the environment variable {name} is not set"
    return "the environment variable that should hold the key is not set"


def _read_key_file(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the key file {path} cannot be read: {exc}") from exc
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"other users can open the key file {path}; run `chmod 600 {path}`")
    return value
