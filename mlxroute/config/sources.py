"""Loading of settings from the config file, environment variables and flags."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxroute.config.declarations import Setting
from mlxroute.config.never_send_patterns import compile_pattern
from mlxroute.config.paths import CONFIG_VARIABLE
from mlxroute.config.setting_choices import RouterName
from mlxroute.config.settings import (
    SERVER_SETTINGS,
    Settings,
    declared_settings,
    parse_share,
    replace_escapes,
)
from mlxroute.errors import ConfigError, MlxRouteError, UsageError
from mlxroute.types.limits import LIMITS, shown_value
from mlxroute.untrusted_text import MalformedText, TextFile, parse_toml

# A pattern in the config file must stay in force when a flag adds another one.
_ADDITIVE = ("never_send", "never_send_file")
# Of each pair a source sets one, which replaces the other one of an earlier source.
_EXCLUSIVE = (("threshold", "budget"), ("key_env", "key_file"))
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}
_MAX_CONFIG_BYTES = 64 * 1024
_TYPE_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    tuple: "a text or a list of texts",
}
# By the placeholder of such settings.
_PATH_WORDS = {"FILE": "the name of a file", "DIR": "the name of a folder"}


@dataclass(frozen=True, slots=True)
class _Origin:
    """The place that a value comes from, as errors name it.

    Args:
        subject: The value in words, as in `the environment variable MLXROUTE_SEED`.
        error: Class of the errors. ConfigError by default.
        parameter: Name of the setting if a flag set it; None by default.
    """

    subject: str
    error: type[MlxRouteError] = ConfigError
    parameter: str | None = None

    def refuse(self, expected: str, value: object) -> MlxRouteError:
        """Return the error for a value that is not what was expected."""
        shown = shown_value(value, keep_point=expected == _TYPE_WORDS[int])
        text = f"{self.subject} must be {expected}, not {shown}"
        return self.error(text, parameter=self.parameter)


@dataclass(frozen=True, slots=True)
class _Source:
    """The values of one source, and how errors name them.

    Args:
        values: The values that it sets, by setting.
        error: Class of the errors.
        name: Returns the name of a setting in this source.
        before: Words before the names of settings. None by default.
        after: Words after them. None by default.
    """

    values: Mapping[str, Any]
    error: type[MlxRouteError]
    name: Callable[[Setting], str]
    before: str = ""
    after: str = ""

    def origin(self, name: str) -> str:
        """Return in words where it sets a setting."""
        return f"{self.name(declared_settings()[name])}{self.after}"

    def changes(self, earlier: Settings) -> dict[str, Any]:
        """Return what it changes in the settings of earlier sources.

        Raises the source's error for settings that exclude each other.
        """
        values = self.values
        removed: dict[str, Any] = {}
        if "head" in values and values.get("router", RouterName.HEAD) != RouterName.HEAD:
            raise self._refuse(("router", "head"))
        for pair in _EXCLUSIVE:
            chosen = [name for name in pair if name in values]
            if len(chosen) > 1:
                raise self._refuse(pair)
            removed |= dict.fromkeys(pair if chosen else ())
        if "head" in values:
            removed["router"] = None
        if earlier.large not in (None, values.get("large", earlier.large)):
            removed |= dict.fromkeys(SERVER_SETTINGS)
        sums = {name: getattr(earlier, name) + values[name] for name in _ADDITIVE if name in values}
        return {**removed, **values, **sums}

    def _refuse(self, pair: Sequence[str]) -> MlxRouteError:
        both = " and ".join(self.name(declared_settings()[name]) for name in pair)
        names = f"{self.before}{both}{self.after}"
        return self.error(f"{names} exclude each other; set one of them")


def load_settings(flags: Mapping[str, Any], *, environ: Mapping[str, str], path: Path) -> Settings:
    """Merge the config file at `path`, the environment and flags, in this order.

    A file that does not exist is not an error unless `MLXROUTE_CONFIG` names it. A flag of None is
    not set. Later sources override earlier ones, except that never-send patterns add up. Raises
    ConfigError with the file or variable and the key, and UsageError for a flag.
    """
    of_file = _read_file(path, is_required=bool(environ.get(CONFIG_VARIABLE)))
    of_environment, of_flags = _read_environment(environ), _check_flags(flags)
    sources = (
        _Source(of_file, ConfigError, lambda item: item.name, after=f" in the config file {path}"),
        _Source(
            of_environment,
            ConfigError,
            lambda item: _variable(item, environ) or item.variables[0],
            before="the environment variables ",
        ),
        _Source(of_flags, UsageError, lambda item: item.flag),
    )
    settings = Settings(key_server=_find_key_server(of_file, of_environment, of_flags))
    for source in sources:
        settings = replace(settings, **source.changes(settings))
    origins = {name: source.origin(name) for source in sources[:2] for name in source.values}
    # A later source may have removed a setting, which then comes from nowhere.
    in_force = [name for name in origins.keys() - of_flags if getattr(settings, name) is not None]
    return replace(settings, origins={name: origins[name] for name in in_force})


def _find_key_server(
    of_file: Mapping[str, Any], of_environment: Mapping[str, Any], of_flags: Mapping[str, Any]
) -> str | None:
    """Return the server that the key is meant for: that of the source which names the key.

    It is that of an earlier source if it has none, or of a later one if there is none so far. A
    flag names a key for the address of its own command line.
    """
    large: str | None
    if _names_key(of_flags):
        large = of_flags.get("large")
    elif _names_key(of_file) and not _names_key(of_environment):
        large = of_file.get("large", of_environment.get("large"))
    else:
        large = of_environment.get("large", of_file.get("large"))
    return large


def _names_key(values: Mapping[str, Any]) -> bool:
    return "key_env" in values or "key_file" in values


def _read_file(path: Path, *, is_required: bool) -> dict[str, Any]:
    if not is_required and _is_missing(path):
        return {}
    file = TextFile(path, "the config file", max_bytes=_MAX_CONFIG_BYTES, error=ConfigError)
    try:
        table = parse_toml(file.read())
    except MalformedText as exc:
        raise file.refuse(str(exc)) from exc
    where = f"the config file {path}"
    values = {}
    for key, value in table.items():
        if _is_table(value):
            raise ConfigError(
                f"{shown_value(key)} in {where} is a table, and config files have no tables;"
                " write the keys at the top of the file"
            )
        setting = _find_setting(key, where=where)
        origin = _Origin(f"{key} in {where}")
        values[key] = _check_value(setting, _typed_value(setting, value, origin), origin)
    return values


def _is_table(value: object) -> bool:
    """Return whether a TOML value is a table or an array of tables."""
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) for item in items)


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        # Reading it gives the reason.
        return False
    return False


def _find_setting(key: str, *, where: str) -> Setting:
    known = declared_settings()
    if key in known:
        return known[key]
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    raise ConfigError(f"unknown key {shown_value(key)} in {where}; {hint}")


def _typed_value(setting: Setting, value: Any, origin: _Origin) -> Any:
    """Return a TOML value in the setting's type."""
    if setting.is_share and isinstance(value, str):
        return _share(value, origin)
    if setting.kind is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise origin.refuse(_TYPE_WORDS[tuple], value)
        return tuple(items)
    kinds = (int, float) if setting.kind is float else (setting.kind,)
    # To Python True is an int, to a user it is not a number.
    is_fitting = isinstance(value, kinds) and isinstance(value, bool) == (setting.kind is bool)
    if not is_fitting:
        raise origin.refuse(_TYPE_WORDS[setting.kind], value)
    return _float(value) if setting.kind is float else value


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for setting in declared_settings().values():
        variable = _variable(setting, environ)
        # An empty variable counts as not set.
        if variable is not None and environ[variable]:
            # Bytes that are not UTF-8 are lone surrogates here, which nothing can encode.
            text = environ[variable].encode(errors="surrogateescape").decode(errors="replace")
            origin = _Origin(f"the environment variable {variable}")
            values[setting.name] = _check_value(
                setting, _parse_variable(setting, text, origin), origin
            )
    return values


def _variable(setting: Setting, environ: Mapping[str, str]) -> str | None:
    """Return the environment variable that counts for a setting; None if there is none."""
    return next((name for name in setting.variables if name in environ), None)


def _parse_variable(setting: Setting, text: str, origin: _Origin) -> Any:
    if setting.is_share:
        return _share(text, origin)
    if setting.kind is tuple:
        return (replace_escapes(text) if setting.has_escapes else text,)
    try:
        return _BOOLEANS[text.lower()] if setting.kind is bool else setting.kind(text)
    except (KeyError, ValueError) as exc:
        raise origin.refuse(_TYPE_WORDS[setting.kind], text) from exc


def _check_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    known = declared_settings()
    return {
        name: _check_value(known[name], value, _Origin(name, UsageError, parameter=name))
        for name, value in flags.items()
        if value is not None
    }


def _check_value(setting: Setting, value: Any, origin: _Origin) -> Any:
    """Return a value of the setting's type; raise the error of its origin for one out of range."""
    limits = LIMITS.get(setting.name)
    if limits is not None and not limits.accepts(value):
        raise origin.refuse(limits.words, value)
    if setting.choices is not None and value not in list(setting.choices):
        raise origin.refuse(f"one of {', '.join(setting.choices)}", value)
    path_words = _PATH_WORDS.get(setting.metavar or "")
    if path_words and not all(value if setting.kind is tuple else [value]):
        raise origin.refuse(path_words, "")
    if setting.name == "never_send":
        for pattern in value:
            separator = ": " if origin.parameter is None else " "
            where = f"{origin.subject}{separator}{shown_value(pattern)}"
            compile_pattern(pattern, where=where, error=origin.error, parameter=origin.parameter)
    return value


def _share(text: str, origin: _Origin) -> float:
    try:
        return parse_share(text)
    except ConfigError as exc:
        raise origin.refuse(LIMITS["budget"].words, text) from exc


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
