"""Bounds on the values and formats of a chat template, which is untrusted code."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any, Final

from mlxroute.errors import MlxRouteError

MAX_CHARACTERS: Final = 1 << 25
"""Characters of one value."""
_MAX_ITEMS: Final = 1 << 20
# Python's hash of a tuple recurses without a limit.
_MAX_DEPTH: Final = 200
_MAX_BITS: Final = 4096
# Maximum number of digits in a format such as `%100d`.
_WIDE_FORMAT: Final = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\d{0,6}\.)?(?:\*|\d{6})|\{[^{}]*\d{6}")
_SIZED: Final = (str, bytes, range)
_EMPTY: Final[dict[str, str]] = {}
HOLDERS: Final[tuple[type[Any], ...]] = (
    *(dict, list, tuple, set),
    *(type(_EMPTY.keys()), type(_EMPTY.values()), type(_EMPTY.items())),
)
"""The types of values that hold others."""


class TemplateFailure(MlxRouteError):
    """Raised when a template cannot be rendered; the message says why, without the model's name."""


class TemplateTooCostly(TemplateFailure):
    """Raised when a template takes too long or writes too much."""


def value_size(value: object) -> int:
    """Return the characters or items that a value holds, those of its items included.

    An item counts as often as it occurs. Raises TemplateTooCostly before that takes long.
    """
    if isinstance(value, str) and len(value) <= MAX_CHARACTERS:
        return len(value) + 1
    total = count = depth = 0
    level: list[Any] = [value]
    while level:
        count += len(level)
        below: list[Any] = []
        for item in level:
            if isinstance(item, _SIZED):
                total += len(item)
            elif isinstance(item, int):
                total += item.bit_length()
            elif isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, HOLDERS):
                below += item
            if count + len(below) > _MAX_ITEMS or total > MAX_CHARACTERS:
                raise TemplateTooCostly("it builds a value that is too large")
        if depth > _MAX_DEPTH:
            raise TemplateTooCostly("it builds a value that is nested too deeply")
        level, depth = below, depth + 1
    return total + count


def check_bits(bits: int) -> None:
    """Raise TemplateTooCostly for a number of too many bits."""
    if bits > _MAX_BITS:
        raise TemplateTooCostly("it uses a number that is too large")


def check_format(text: object) -> None:
    """Raise TemplateFailure for a format that is not a text, or that may write too much.

    The latter names a large width, or takes it from a number.
    """
    if not isinstance(text, str):
        raise TemplateFailure("it formats what is not a text")
    if _WIDE_FORMAT.search(text):
        raise TemplateTooCostly("it uses a format that is too wide")


def check_fields(text: str) -> None:
    """Raise TemplateTooCostly for a format of `str.format` with the width in an argument."""
    if any("{" in (form or "") for _, _, form, _ in Formatter().parse(text)):
        raise TemplateTooCostly("it uses a format that is too wide")
