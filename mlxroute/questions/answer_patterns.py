"""Numbers in answers: in running text, and boxed in LaTeX."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal

AFTER_NO_WORD = r"(?<![^\W_])(?<![.)])"
"""Where a sign belongs to the number after it, and is not the hyphen of 3-2."""

_UNSIGNED = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
NUMBER = re.compile(rf"(?:{AFTER_NO_WORD}[-+])?{_UNSIGNED}")
"""A decimal number in running text, with commas between digits. A comma after it is included."""

MINUS = "−"
"""The minus sign of typeset text."""

# A sign before an amount of money, and a dash that is a sign: -$5 and –5.
_SIGN_OF_AMOUNT = re.compile(rf"({AFTER_NO_WORD}[-+])\\?[$€£](?=[\d.])")
_DASH_AS_SIGN = re.compile(rf"{AFTER_NO_WORD}–(?=\\?[$€£]?\d)")

_COMMAS_BEFORE_NUMBER = re.compile(r"^([-+]?),+(?=[\d.])")
# Groups of three digits; before the last one also of two, as in 1,00,000.
_WHOLE_NUMBER = re.compile(r"[-+]?(?:[1-9]\d{0,2}(?:,\d{2,3})*,\d{3}(?:\.\d+)?|[\d.]+)")
_DIGIT = re.compile(r"\d")

# A box opens, an escaped character, or a brace.
_BRACES = re.compile(r"\\+boxed\{|\\.|[{}]", re.DOTALL)
_LATEX_SEPARATOR = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!])(?=\d{3}(?!\d))")
_SPACED_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:\s\d{3})+(?!\d)")
# Text in a formula, with its exponent, as in 5\text{ m}^2.
_WORDS = re.compile(
    r"\\(?:(?:text|math)[a-z]*|[hm]box)\s*\{((?:[^{}]|\{[^{}]*\})*)\}(?:\s*\^(?:\d|\{\d\}))?"
)
_NO_CONTENT = re.compile(
    r"\\?[$%]|°|\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\[()\[\]!]|\\(?:left|right|displaystyle)(?![a-zA-Z])"
)
_SPACE = re.compile(r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])")
_RELATION = re.compile(r"=|≈|\\approx(?![a-zA-Z])")
# The first number, unless it is part of a term, such as x^2, \frac{1}{2}, 2\pi or 3 + 4.
_LONE_NUMBER = re.compile(
    rf"[^\d\\^_{{}}]*?((?>[-+]?{_UNSIGNED}))(?!\s*(?:[\^_\\]|[-+*/×÷]\s*[\d.(\\{{]))"
)

# Another answer after a number, as in "10, 12".
_OTHER_NUMBER = re.compile(rf"\s*(?:[,;]|(?:or|and|to)\b)\s*[-+]?{_UNSIGNED}")
_THOUSANDS = re.compile(r"[-+]?\d+(?:,\d{3})+(?:\.\d+)?")
_BETWEEN_NUMBERS = ("or", "and", "to")

# Exact enough to compare numbers of any length, and it raises nothing.
_ARITHMETIC = Context(prec=30, Emin=MIN_EMIN, Emax=MAX_EMAX, traps=[])
_TOLERANCE = Decimal("1e-9")


def is_number(text: str) -> bool:
    """Return whether the whole text is a number.

    Unlike `NUMBER`, this accepts commas at the start, and others between groups of digits only.
    """
    text = _COMMAS_BEFORE_NUMBER.sub(r"\1", text.strip().replace(MINUS, "-"))
    return NUMBER.fullmatch(text) is not None and _WHOLE_NUMBER.fullmatch(text) is not None


def parse_number(text: str) -> Decimal | None:
    """Return the last number in a text; None if it has none."""
    numbers = NUMBER.findall(_LATEX_SEPARATOR.sub("", _plain_signs(text)))
    return _decimal(numbers[-1]) if numbers else None


def find_boxes(text: str) -> Iterator[str]:
    r"""Yield the contents of all `\boxed{...}` with balanced braces, in their order.

    Of boxes within each other, the inner one is yielded.
    """
    depth, box_depth, start = 0, 0, 0
    for match in _BRACES.finditer(text):
        if match[0] == "}":
            if depth and depth == box_depth:
                yield text[start : match.start()]
                box_depth = 0
            depth = max(0, depth - 1)
        elif match[0].endswith("{") and match[0] != r"\{":
            depth += 1
            if match[0] != "{":
                box_depth, start = depth, match.end()


def find_boxed_number(text: str) -> str | None:
    """Return the content of the first box that holds a digit; None if there is none."""
    return next((content for content in find_boxes(text) if _DIGIT.search(content)), None)


def is_boxed_number(content: str) -> bool:
    """Return whether a box holds a number and nothing else, except for LaTeX and its text."""
    return is_number(_plain(content))


def parse_boxed_number(content: str) -> Decimal | None:
    """Return the number in the content of a box; None if it has none or a formula.

    That is the number after the last relation, without separators of thousands and without what
    comes after it, such as a unit. Several numbers, as in "10 or 12", are no answer.
    """
    for term in reversed(_RELATION.split(_plain(content))):
        if match := _LONE_NUMBER.match(_join_sign(term)):
            number = match[1].rstrip(",")
            is_list = _OTHER_NUMBER.match(match.string, match.start(1) + len(number))
            is_one = is_number(number) or _THOUSANDS.fullmatch(number)
            return _decimal(number) if is_one and not is_list else None
    return None


def is_close(first: Decimal, second: Decimal) -> bool:
    """Return whether two numbers are equal but for rounding."""
    largest = max(first.copy_abs(), second.copy_abs())
    difference = _ARITHMETIC.subtract(first, second).copy_abs()
    return difference <= _ARITHMETIC.multiply(largest, _TOLERANCE)


def _plain_signs(text: str) -> str:
    """Return a text with the signs of its numbers directly before them."""
    text = _DASH_AS_SIGN.sub("-", text.replace(MINUS, "-"))
    return _SIGN_OF_AMOUNT.sub(r"\1", text)


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _plain(content: str) -> str:
    """Return the content of a box without LaTeX that does not change its number."""
    without_words = _WORDS.sub(_without_word, content)
    if not _DIGIT.search(without_words):
        without_words = _WORDS.sub(r" \1 ", content)
    text = _NO_CONTENT.sub("", _LATEX_SEPARATOR.sub("", without_words))
    text = _plain_signs(_SPACE.sub(" ", text))
    return _join_sign(_SPACED_GROUPS.sub(lambda match: "".join(match[0].split()), text))


def _without_word(match: re.Match[str]) -> str:
    """Return a space, and a word that may stand between two numbers."""
    word = match[1].strip()
    return f" {word} " if word in _BETWEEN_NUMBERS else " "


def _join_sign(text: str) -> str:
    """Return a text without space at its ends and after a sign at its start."""
    text = text.strip()
    return text[0] + text[1:].lstrip() if text[:1] in ("-", "+") else text
