"""Dataclasses to JSON and back, by their field types.

A field is a key. A key that is not a field is ignored. Infinities and NaN, which JSON lacks, are
the strings "inf", "-inf" and "nan"; bytes are lists of numbers.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from mlxroute.errors import UsageError

_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
# The bound of seeds, which are the largest integers in a document.
_MAX_INTEGER = 2**64
_Record = TypeVar("_Record")


def to_json(value: Any) -> Any:
    """Return the JSON value of a dataclass, or of a value of one of its fields.

    A field that is None and whose default is None is left out.
    """
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, bytes | tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int):
        return value
    items = ((item, getattr(value, item.name)) for item in fields(value))
    return {
        item.name: to_json(content)
        for item, content in items
        if content is not None or item.default is not None
    }


def from_json(kind: type[_Record], value: Any) -> _Record:
    """Return a dataclass of a JSON value.

    Raises UsageError, which names the key, for a missing key or a value of another type.
    """
    return cast(_Record, _read(kind, value, ""))


@cache
def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _read(kind: Any, value: Any, where: str) -> Any:
    """Return a JSON value as a `kind`; `where` is its place in the document."""
    if isinstance(kind, UnionType):
        return _read_optional(kind, value, where)
    origin = get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, "a list")
        return tuple(
            _read(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object")
        return {_read(str, key, where): _read(str, item, where) for key, item in value.items()}
    if hasattr(kind, "__dataclass_fields__"):
        return _read_record(kind, value, where)
    if issubclass(kind, Enum):
        return _read_choice(kind, value, where)
    return _read_plain(kind, value, where)


def _read_optional(kind: UnionType, value: Any, where: str) -> Any:
    (content,) = (member for member in get_args(kind) if member is not NoneType)
    return None if value is None else _read(content, value, where)


def _read_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, "an object")
    content = {}
    for item in fields(kind):
        place = f"{where}.{item.name}" if where else item.name
        if item.name in value:
            content[item.name] = _read(_field_types(kind)[item.name], value[item.name], place)
        elif item.default is MISSING:
            raise UsageError(f"{place} is missing")
    return kind(**content)


def _read_choice(kind: type[Enum], value: Any, where: str) -> Enum:
    for member in kind:
        if value == member.value:
            return member
    raise _wrong(where, f"one of {', '.join(str(member.value) for member in kind)}")


def _read_plain(kind: type, value: Any, where: str) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _wrong(where, "true or false")
    if kind is int:
        if _is_integer(value) and abs(value) < _MAX_INTEGER:
            return value
        raise _wrong(where, "an integer")
    if kind is float:
        return _read_number(value, where)
    if kind is bytes:
        if isinstance(value, list) and all(_is_integer(i) and 0 <= i < 256 for i in value):
            return bytes(value)
        raise _wrong(where, "a list of bytes")
    if is_text(value):
        return value
    raise _wrong(where, "text")


def _read_number(value: Any, where: str) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    # A larger integer than this has no float.
    if isinstance(value, float) or (_is_integer(value) and abs(value) < _MAX_INTEGER):
        return float(value)
    raise _wrong(where, "a number")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_text(value: object) -> bool:
    """Return whether a JSON value is a string that UTF-8 can encode (no lone surrogates)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(where: str, kind: str) -> UsageError:
    return UsageError(f"{where or 'the document'} is not {kind}")
