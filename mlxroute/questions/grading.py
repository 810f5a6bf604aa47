"""Marking answers: what was answered, strictly and leniently."""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass

from mlxroute.questions.question_files import AnswerKind, Question

_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
_SAID = re.compile(r"answer\s+is\b(.*)", re.IGNORECASE | re.DOTALL)
_LABEL = re.compile(r"\(\s*([A-Za-z])\s*\)")
_LEADING = re.compile(r"\s*([A-Za-z])\s*(?:[.):]|$)")


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether an answer is right in the form that was asked for, and in any; None: no answer."""

    strict: bool | None
    lenient: bool | None


def grade(question: Question, text: str) -> Grade:
    """Mark a text against the question's answer, which must be known."""
    assert question.answer is not None
    match question.kind:
        case AnswerKind.CHOICE:
            return _mark_choice(question, text)
        case AnswerKind.NUMBER:
            return _mark_number(question.answer, text)
        case AnswerKind.TEXT:
            return _mark_text(question.answer, text)


def extract_answer(question: Question, text: str) -> str:
    """What a text answers, in a form in which equal answers are equal; empty for no answer."""
    match question.kind:
        case AnswerKind.CHOICE:
            return _chosen(question, text)[1] or ""
        case AnswerKind.NUMBER:
            value = _final_number(text)
            return "" if value is None else f"{value:g}"
        case AnswerKind.TEXT:
            return _plain(text)


def _chosen(question: Question, text: str) -> tuple[str | None, str | None]:
    """The label in the form that was asked for, and in any."""
    said = _SAID.search(text)
    after = said[1] if said else ""
    strict = _label(question, _LABEL.search(after))
    lenient = strict or _named(question, after) or _label(question, _LABEL.search(text))
    lenient = lenient or _label(question, _LEADING.match(text)) or _named(question, text)
    return strict, lenient


def _mark_choice(question: Question, text: str) -> Grade:
    strict, lenient = _chosen(question, text)
    wanted = str(question.answer).upper()
    return Grade(
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


def _mark_number(wanted: str, text: str) -> Grade:
    boxed = _BOXED.findall(text)
    strict = boxed[0].strip() == wanted.strip() if boxed else None
    value = _final_number(text)
    lenient = None if value is None else math.isclose(value, _value(wanted), rel_tol=1e-9)
    return Grade(strict, lenient)


def _final_number(text: str) -> float | None:
    """The last number in the box, or in the text where there is none."""
    boxed = _BOXED.findall(text)
    numbers = _NUMBER.findall(boxed[0]) if boxed else _NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(text: str) -> float:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else math.nan


def _mark_text(wanted: str, text: str) -> Grade:
    if not text.strip():
        return Grade(None, None)
    plain, said = _plain(wanted), _plain(text)
    return Grade(text.strip() == wanted.strip(), f" {plain} " in f" {said} ")


def _plain(text: str) -> str:
    return " ".join(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())
