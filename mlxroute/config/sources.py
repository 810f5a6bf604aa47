"""Loading of settings from the config file, environment variables and flags."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxroute.config.settings import (
    Setting,
    Settings,
    declared_settings,
    parse_share,
    replace_escapes,
)
from mlxroute.errors import ConfigError

# A pattern in the config file must stay in force when a flag adds another one.
_ADDITIVE = ("never_send", "never_send_file")
# A threshold replaces the budget of an earlier source, and a budget the threshold.
_EXCLUSIVE = ("threshold", "budget")
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
_TOML_TYPES: dict[type, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    tuple: (list, str),
}


def load_settings(flags: Mapping[str, Any], *, environ: Mapping[str, str], path: Path) -> Settings:
    """Merge the config file at `path` (if it exists), the environment and flags, in this order.

    A flag of None is not set. Later sources override earlier ones, except that never-send patterns
    add up. Raises ConfigError with the file or variable and the key.
    """
    flags_set = {name: value for name, value in flags.items() if value is not None}
    settings = Settings()
    for values in (_read_file(path), _read_environment(environ), flags_set):
        sums = {
            name: getattr(settings, name) + values[name] for name in _ADDITIVE if name in values
        }
        chosen = [name for name in _EXCLUSIVE if name in values]
        if len(chosen) > 1:
            raise ConfigError("a threshold and a budget exclude each other; set one of them")
        dropped = {name: None for name in _EXCLUSIVE if chosen and name not in chosen}
        settings = replace(settings, **(dropped | values | sums))
    return settings


def _read_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"the config file {path} cannot be read: {exc}") from exc
    where = f"config file {path}"
    return {
        key: _check_value(_find_setting(key, where=where), value, where=where)
        for key, value in table.items()
    }


def _find_setting(key: str, *, where: str) -> Setting:
    known = declared_settings()
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    raise ConfigError(f"unknown key {key!r} in {where}; {hint}")


def _check_value(setting: Setting, value: Any, *, where: str) -> Any:
    """Return a TOML value in the setting's type."""
    if setting.is_share and isinstance(value, str):
        return parse_share(value)
    types = _TOML_TYPES[setting.kind]
    # To Python True is an int, to a user it is not a number.
    fits = bool in types if isinstance(value, bool) else isinstance(value, types)
    if not fits:
        expected = " or ".join(kind.__name__ for kind in types)
        raise ConfigError(
            f"{setting.name} in {where} must be {expected}, not {type(value).__name__}"
        )
    if setting.kind is tuple:
        return (value,) if isinstance(value, str) else tuple(str(item) for item in value)
    return float(value) if setting.kind is float else value


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for setting in declared_settings().values():
        variable = next((name for name in setting.variables if name in environ), None)
        # An empty variable counts as not set.
        if variable is not None and environ[variable]:
            values[setting.name] = _parse_variable(setting, variable, environ[variable])
    return values


def _parse_variable(setting: Setting, variable: str, text: str) -> Any:
    if setting.is_share:
        return parse_share(text)
    where = f"the environment variable {variable}"
    if setting.kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ConfigError(f"{where} must be true or false, not {text!r}")
        return _BOOLEANS[text.lower()]
    if setting.kind is tuple:
        return (replace_escapes(text) if setting.has_escapes else text,)
    try:
        return setting.kind(text)
    except ValueError as exc:
        raise ConfigError(f"{where} must be a number, not {text!r}") from exc
