"""The API key of the large model's server."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlxroute.config.settings import Settings
from mlxroute.errors import ConfigError
from mlxroute.untrusted_text import TextFile
from mlxroute.user_folders import expand_user

DEFAULT_KEY_ENV = "OPENAI_API_KEY"
MAX_KEY_FILE_BYTES = 64 * 1024
_NO_KEY = "holds no key: it has a line break or other characters that no key has"
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

    It is in the variable that `key_env` names or in the key file, else in OPENAI_API_KEY, which may
    be set for another program. Raises ConfigError if the named variable is not set, the key file
    cannot be read, is empty or is readable by other users, or what is there cannot be a key.
    """
    if settings.key_env is None and settings.key_file is not None:
        return _read_key_file(expand_user(settings.key_file))
    name = settings.key_env or DEFAULT_KEY_ENV
    value = environ.get(name, "").strip()
    if settings.key_env is not None and not value:
        raise ConfigError(_missing_variable(name), parameter="key_env")
    if not is_key(value):
        raise ConfigError(f"the environment variable {name} {_NO_KEY}")
    return Secret(value) if value else None


def is_key(text: str) -> bool:
    """Return whether every client sends a text in a header in the same way."""
    return text.isascii() and text.isprintable() and text == text.strip()


def _missing_variable(name: str) -> str:
    # The user may have typed the key itself, so only what looks like a variable name is repeated.
    if _VARIABLE_NAME.fullmatch(name):
        return f"the environment variable {name} is not set"
    return "the environment variable that should hold the key is not set"


def is_open_to_others(path: Path) -> bool:
    """Return whether other users can open a file. Raises OSError."""
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def refuse_readable_by_others(path: Path) -> None:
    """Raise ConfigError for a key file that other users can open."""
    if is_open_to_others(path):
        raise ConfigError(f"other users can open the key file {path}; run `chmod 600 {path}`")


def _read_key_file(path: Path) -> Secret:
    file = TextFile(path, "the key file", max_bytes=MAX_KEY_FILE_BYTES, error=ConfigError)
    value = file.read().strip()
    refuse_readable_by_others(path)
    if not value:
        raise ConfigError(f"the key file {path} is empty; write the key into it")
    if not is_key(value):
        raise ConfigError(f"the key file {path} {_NO_KEY}")
    return Secret(value)
