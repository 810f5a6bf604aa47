"""Settings: flags over environment over config file. Secrets never appear in a `repr`."""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mlxroute.errors import ConfigError
from mlxroute.types import Prices

ENV_PREFIX = "MLXROUTE_"
_FIELD_ENV = {"large": "OPENAI_BASE_URL"}
DEFAULT_KEY_ENV = "OPENAI_API_KEY"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


@dataclass(frozen=True, slots=True)
class Secret:
    """A key that shows itself only through `reveal()`."""

    _value: str = field(repr=False)

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"


@dataclass(frozen=True, slots=True)
class Settings:
    """What `ask`, `chat` and `demo` share. None means: not set, a default applies.

    `large` is a server's address, `threshold` in units of the router's score (nats for entropy),
    `budget` a share, at most one of the two given, `timeout` in seconds, `key_file` a file of
    mode 0600 holding the server's key, `key_env` the environment variable holding it, `ca_bundle`
    a PEM file of the only authorities a server's certificate may come from. Prices are per million
    tokens. `never_send` and `never_send_file` add up over all sources of settings.
    """

    small: str | None = None
    large: str | None = None
    large_model: str | None = None
    adapter: str | None = None
    router: str | None = None
    head: str | None = None
    mode: str = "auto"
    prefetch: int | None = None
    call_ceiling: float | None = None
    kernel: str = "auto"
    threshold: float | None = None
    budget: float | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    timeout: float = 30.0
    stop: tuple[str, ...] = ()
    system: str | None = None
    cache_dir: str | None = None
    key_file: str | None = None
    key_env: str = DEFAULT_KEY_ENV
    ca_bundle: str | None = None
    ledger: str | None = None
    never_send: tuple[str, ...] = ()
    never_send_file: tuple[str, ...] = ()
    price_input: float | None = None
    price_cached_input: float | None = None
    price_output: float | None = None
    offline: bool = False
    strict: bool = False
    heat: bool = False


_TYPES: dict[str, tuple[type, ...]] = {
    "threshold": (float, int),
    "budget": (float, int),
    "temperature": (float, int),
    "top_p": (float, int),
    "timeout": (float, int),
    "price_input": (float, int),
    "price_cached_input": (float, int),
    "price_output": (float, int),
    "max_tokens": (int,),
    "seed": (int,),
    "prefetch": (int,),
    "call_ceiling": (float, int),
    "offline": (bool,),
    "strict": (bool,),
    "heat": (bool,),
    "stop": (list, str),
    "never_send": (list, str),
    "never_send_file": (list, str),
}
# A pattern set for good must not fall away because another one is given today.
_ADDED = ("never_send", "never_send_file")
# Two ways to say one thing: what is said later counts.
_ONE_OF = ("threshold", "budget")


def default_config_path() -> Path:
    """The config file in the platform's folder, or what `MLXROUTE_CONFIG` names."""
    import platformdirs

    named = os.environ.get(f"{ENV_PREFIX}CONFIG")
    return Path(named) if named else platformdirs.user_config_path("mlxroute") / "config.toml"


def user_catalog_dir() -> Path:
    """The folder of the user's own catalogue files: `models` beside the config file."""
    return default_config_path().parent / "models"


def load_settings(flags: Mapping[str, Any], *, environ: Mapping[str, str], path: Path) -> Settings:
    """Merge flags (None = not given) over environment over the file at `path`, if it exists.

    Raises ConfigError naming the file or variable and the key.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    settings = Settings()
    for values in (_from_file(path), _from_environment(environ), given):
        added = {key: getattr(settings, key) + values[key] for key in _ADDED if key in values}
        said = [key for key in _ONE_OF if key in values]
        if len(said) > 1:
            raise ConfigError("a threshold and a budget exclude each other; give one of them")
        dropped = {key: None for key in _ONE_OF if said and key not in said}
        settings = replace(settings, **(dropped | values | added))
    return settings


def read_key(settings: Settings, environ: Mapping[str, str]) -> Secret | None:
    """The server's key: from the variable that was named, the key file, or the usual variable.

    A key file is a choice, so it goes before a variable that merely happens to be set.
    """
    named = settings.key_env != DEFAULT_KEY_ENV
    if named or settings.key_file is None:
        value = environ.get(settings.key_env, "").strip()
        if named and not value:
            # Somebody may have given the key itself: what looks unlike a name is not repeated.
            known = _VARIABLE.fullmatch(settings.key_env)
            shown = f"variable {settings.key_env}" if known else "variable named"
            raise ConfigError(f"the environment {shown} (--key-env) is not set")
        return Secret(value) if value else None
    path = Path(settings.key_file).expanduser()
    try:
        mode = path.stat().st_mode
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the key file {path} cannot be read: {exc}") from exc
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"the key file {path} is open to others; run `chmod 600 {path}`")
    return Secret(value) if value else None


def read_prices(settings: Settings) -> Prices | None:
    """The prices of the settings; None when there are none. Raises ConfigError."""
    prices = (settings.price_input, settings.price_cached_input, settings.price_output)
    if any(price is not None and not 0 <= price < math.inf for price in prices):
        raise ConfigError("a price must be a number from 0, per million tokens")
    match prices:
        case (None, None, None):
            return None
        case (float(given), cached, float(generated)):
            return Prices(given, given if cached is None else cached, generated)
        case _:
            raise ConfigError("a cost estimate needs both price_input and price_output")


def read_never_send(settings: Settings) -> tuple[re.Pattern[str], ...]:
    """The patterns of the settings and then those of their files, in order.

    Raises ConfigError naming the pattern, or the file and the line.
    """
    patterns = [_pattern(text, where=f"--never-send {text!r}") for text in settings.never_send]
    for name in settings.never_send_file:
        path = Path(name).expanduser()
        try:
            # A byte order mark would keep the first pattern from ever matching.
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as exc:
            reason = (exc.strerror if isinstance(exc, OSError) else None) or "it is not UTF-8 text"
            raise ConfigError(f"the never-send file {path} cannot be read: {reason}") from exc
        patterns += [
            # What a user hides in a file is not repeated.
            _pattern(line.strip(), where=f"line {number} of the never-send file {path}")
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
    return tuple(patterns)


def _pattern(text: str, *, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ConfigError(f"{where} is no regular expression: {exc}") from exc


def parse_share(text: str) -> float:
    """A budget as people write it: `7%` or `0.07`. Raises ConfigError."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ConfigError(f"{text!r} is no share from 0% to 100%; write 7% or 0.07")
    return value


def _names() -> list[str]:
    return [item.name for item in fields(Settings)]


def _from_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"the config file {path} cannot be read: {exc}") from exc
    return {key: _checked(key, value, where=f"config file {path}") for key, value in table.items()}


def _checked(key: str, value: Any, *, where: str) -> Any:
    if key not in _names():
        near = difflib.get_close_matches(key, _names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(_names())}"
        raise ConfigError(f"unknown key {key!r} in {where}{hint}")
    if key == "budget" and isinstance(value, str):
        return parse_share(value)
    kinds = _TYPES.get(key, (str,))
    # `True` is an int to Python, but not a number to a user.
    fits = bool in kinds if isinstance(value, bool) else isinstance(value, kinds)
    if not fits:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(f"{key} in {where} must be {wanted}, not {type(value).__name__}")
    if list in kinds:
        return (value,) if isinstance(value, str) else tuple(str(item) for item in value)
    return float(value) if float in kinds else value


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name in _names():
        variable = f"{ENV_PREFIX}{name.upper()}"
        if variable not in environ:
            variable = _FIELD_ENV.get(name, variable)
        if text := environ.get(variable, ""):
            found[name] = _parsed(name, text, where=f"the environment variable {variable}")
    return found


def _parsed(key: str, text: str, *, where: str) -> Any:
    if key == "budget":
        return parse_share(text)
    kinds = _TYPES.get(key, (str,))
    try:
        if bool in kinds:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if float in kinds:
            return float(text)
        if int in kinds:
            return int(text)
    except (ValueError, KeyError) as exc:
        wanted = "true or false" if bool in kinds else "a number"
        raise ConfigError(f"{where} must be {wanted}, not {text!r}") from exc
    return (text,) if list in kinds else text
