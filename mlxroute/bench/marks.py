"""Marking answers: what was answered, strictly and leniently, and what the figures are worth."""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass
from typing import Final

from mlxroute.questions import Kind, Question

# Of a two-sided 95 % interval.
_Z: Final = 1.959963984540054
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
_SAID = re.compile(r"answer\s+is\b(.*)", re.IGNORECASE | re.DOTALL)
_LABEL = re.compile(r"\(\s*([A-Za-z])\s*\)")
_LEADING = re.compile(r"\s*([A-Za-z])\s*(?:[.):]|$)")


@dataclass(frozen=True, slots=True)
class Mark:
    """Whether an answer is right in the form that was asked for, and in any; None: no answer."""

    strict: bool | None
    lenient: bool | None


def mark(question: Question, text: str) -> Mark:
    """Mark a text against the question's answer, which must be known."""
    assert question.answer is not None
    match question.kind:
        case Kind.CHOICE:
            return _mark_choice(question, text)
        case Kind.NUMBER:
            return _mark_number(question.answer, text)
        case Kind.TEXT:
            return _mark_text(question.answer, text)


def _mark_choice(question: Question, text: str) -> Mark:
    said = _SAID.search(text)
    after = said[1] if said else ""
    strict = _label(question, _LABEL.search(after))
    lenient = strict or _named(question, after) or _label(question, _LABEL.search(text))
    lenient = lenient or _label(question, _LEADING.match(text)) or _named(question, text)
    wanted = str(question.answer).upper()
    return Mark(
        None if strict is None else strict == wanted, None if lenient is None else lenient == wanted
    )


def _label(question: Question, found: re.Match[str] | None) -> str | None:
    labels = [label.upper() for label, _ in question.choices]
    return found[1].upper() if found and found[1].upper() in labels else None


def _named(question: Question, text: str) -> str | None:
    """The choice that is named first; of those that begin there, the longest."""
    lowered = text.lower()
    places = [
        (at, -len(choice), label)
        for label, choice in question.choices
        if (at := lowered.find(choice.lower())) >= 0
    ]
    return min(places)[2].upper() if places else None


def _mark_number(wanted: str, text: str) -> Mark:
    boxed = _BOXED.findall(text)
    strict = boxed[0].strip() == wanted.strip() if boxed else None
    numbers = _NUMBER.findall(boxed[0]) if boxed else _NUMBER.findall(text)
    lenient = None
    if numbers:
        lenient = math.isclose(_value(numbers[-1]), _value(wanted), rel_tol=1e-9)
    return Mark(strict, lenient)


def _value(text: str) -> float:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else math.nan


def _mark_text(wanted: str, text: str) -> Mark:
    if not text.strip():
        return Mark(None, None)
    plain, said = _plain(wanted), _plain(text)
    return Mark(text.strip() == wanted.strip(), f" {plain} " in f" {said} ")


def _plain(text: str) -> str:
    return " ".join(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, _Z * _Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    half /= 1 + z2 / count
    return middle - half, middle + half


def mcnemar(only_one: int, only_other: int) -> float:
    """Exact two-sided p that two sides differ on the same questions (McNemar, 1947).

    The counts are of questions that one side alone got right.
    """
    count, least = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(count, k) for k in range(least + 1)) / (1 << count)
    return min(1.0, 2 * tail)
