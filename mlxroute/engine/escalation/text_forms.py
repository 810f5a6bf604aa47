"""Forms of Unicode text in which a reader sees the same, and patterns rewritten for them."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

# Characters that show nothing: zero-width ones, marks of direction, soft hyphens, variation
# selectors, fillers, tags, and control characters but tab and line breaks.
_INVISIBLE: Final = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
# Quotation marks and hyphens that programs put in place of those on the keyboard.
_TYPOGRAPHIC: Final = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02b9\u02bc\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212", "-"),
    }
)
_IGNORES_CASE: Final = re.compile(r"\(\?[a-zA-Z]*i")
# Parts of a pattern whose letters are not text: escapes, and the beginnings of groups.
_SYNTAX: Final = re.compile(r"\\(?:[xuU][0-9a-fA-F]+|N\{[^}]*\}|.)|\(\?[a-zA-Z]*[-:)]?", re.DOTALL)

# Escapes of single characters; `re` itself has read them without an error.
_ESCAPE: Final = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|N\{([^}]*)\}|.)", re.DOTALL
)


def text_forms(text: str) -> list[str]:
    """Return the forms of a text that differ: as it is, and normalised without invisible text.

    The normal forms are NFC, and NFKC, which makes full-width letters ordinary ones; with NFKC,
    typographic quotation marks and hyphens become those of a keyboard.
    """
    composed = visible = _INVISIBLE.sub("", text)
    if not visible.isascii():
        composed = unicodedata.normalize("NFC", visible)
        visible = _INVISIBLE.sub("", _compatible_form(visible))
    return list(dict.fromkeys([text, composed, visible]))


def fold_text(text: str) -> str:
    """Return a text in the form in which upper and lower case are equal."""
    visible = _INVISIBLE.sub("", _compatible_form(text))
    return unicodedata.normalize("NFKC", visible.casefold())


def _compatible_form(text: str) -> str:
    """Return NFKC, with the quotation marks and hyphens of a keyboard."""
    # NFKC makes three characters of a triple prime, and two of a double one.
    return unicodedata.normalize("NFKC", text.translate(_TYPOGRAPHIC)).translate(_TYPOGRAPHIC)


def pattern_forms(pattern: str) -> list[str]:
    """Return a pattern and, if they differ, the patterns for normalised texts."""
    spelled = _INVISIBLE.sub("", _ESCAPE.sub(_spell_escape, pattern))
    if spelled.isascii():
        return list(dict.fromkeys([pattern, spelled]))
    composed = unicodedata.normalize("NFC", spelled)
    plain = unicodedata.normalize("NFC", "".join(map(_plain_form, spelled)))
    return list(dict.fromkeys([pattern, composed, plain]))


def ignores_case(pattern: re.Pattern[str]) -> bool:
    """Return whether a pattern, or a part of it, ignores upper and lower case."""
    return bool(pattern.flags & re.IGNORECASE or _IGNORES_CASE.search(pattern.pattern))


def fold_pattern(pattern: str) -> str:
    """Return a pattern for texts of `fold_text`."""
    parts, done = [], 0
    for match in _SYNTAX.finditer(pattern):
        parts += [fold_text(pattern[done : match.start()]), match[0]]
        done = match.end()
    return "".join(parts) + fold_text(pattern[done:])


def _spell_escape(escape: re.Match[str]) -> str:
    """Return the character of an escape if it is not ASCII; all others as they are."""
    code = escape[1] or escape[2] or escape[3]
    char = chr(int(code, 16)) if code else ""
    if escape[4]:
        char = unicodedata.lookup(escape[4])
    return escape[0] if char.isascii() else char


def _plain_form(char: str) -> str:
    """Return the compatible form of a character, escaped where it would be syntax."""
    plain = _compatible_form(char)
    return re.escape(plain) if plain != char and plain.isascii() else plain
