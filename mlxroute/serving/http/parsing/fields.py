"""The fields of a request: each is read once, with its type; the rest counts as ignored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mlxroute.config.settings import parse_share
from mlxroute.errors import ConfigError
from mlxroute.safe_text import printable_line
from mlxroute.serving.http.api_error import wrong

_MAX_IGNORED = 50


class Fields:
    """The fields of a JSON object. `null` counts as absent. Methods raise ApiError.

    Args:
        values: The JSON object.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._read: set[str] = set()

    def take(self, name: str) -> Any:
        """Return a field of any type, None if it is absent."""
        self._read.add(name)
        return self._values.get(name)

    def ignore(self, name: str) -> None:
        """Count a field as ignored although it was read."""
        self._read.discard(name)

    @property
    def ignored(self) -> list[str]:
        """The names of the fields that were not read."""
        names = sorted(self._values.keys() - self._read)
        return [printable_line(name, limit=60) for name in names[:_MAX_IGNORED]]

    def number(self, name: str) -> float | None:
        """Return a finite number."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, f"{name} must be a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise wrong(name, f"{name} must be a finite number")
        return number

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        """Return a whole number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, f"{name} must be a whole number")
        if not low <= value <= high:
            raise wrong(name, f"{name} must be from {low:,} to {high:,}")
        return value

    def flag(self, name: str) -> bool:
        """Return true or false; false if the field is absent."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise wrong(name, f"{name} must be true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        """Return a text."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, f"{name} must be a text")
        return None if value is None else clean_text(value)

    def texts(self, name: str, *, limit: int) -> tuple[str, ...]:
        """Return the texts of a list, or of one text; at most `limit`."""
        value = self.take(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise wrong(name, f"{name} must be a text or a list of texts")
        if len(values) > limit:
            raise wrong(name, f"{name} has more than {limit} texts")
        return tuple(clean_text(item) for item in values if item)

    def share(self, name: str) -> float | None:
        """Return a share, from 0 to 1 or as a text such as "7%"."""
        value = self.take(name)
        if value is None:
            return None
        try:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ConfigError("it is neither a number nor a text")
            return parse_share(value if isinstance(value, str) else repr(value))
        except (ConfigError, ValueError):
            raise wrong(name, f'{name} must be a share, 0.07 or "7%"') from None

    def score(self, name: str) -> float | None:
        """Return a number, or "inf" or "-inf", which JSON's numbers lack."""
        value = self._values.get(name)
        if isinstance(value, str):
            self._read.add(name)
            if value not in ("inf", "-inf"):
                raise wrong(name, f'{name} must be a number, "inf" or "-inf"')
            return float(value)
        return self.number(name)

    def choice(self, name: str, choices: Iterable[str]) -> str | None:
        """Return one of some texts."""
        value = self.take(name)
        if value is None:
            return None
        names = list(choices)
        if value not in names:
            raise wrong(name, f"{name} must be one of {', '.join(names)}")
        return str(value)

    def refuse(self, name: str, *, neutral: Iterable[Any], reason: str) -> None:
        """Raise unless a field is absent or has a value that changes nothing."""
        value = self.take(name)
        if value is None or any(_is_same(value, item) for item in neutral):
            return
        raise wrong(name, f"{name} is not supported here: {reason}", code="unsupported_value")


def _is_same(value: Any, other: Any) -> bool:
    # To Python True equals 1.
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def clean_text(text: str) -> str:
    """Return a text from JSON with U+FFFD for lone surrogates, which are not characters."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def clean_json(value: Any, *, not_finite: float | None = None) -> Any:
    """Return a JSON value with clean texts, and `not_finite` in place of NaN and infinities."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite
    if isinstance(value, list):
        return [clean_json(item, not_finite=not_finite) for item in value]
    if isinstance(value, dict):
        return {
            clean_text(key): clean_json(item, not_finite=not_finite) for key, item in value.items()
        }
    return value
