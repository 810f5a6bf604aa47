"""Grading of answers, strictly by the requested form and leniently by content."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from mlxroute.questions.answer_patterns import (
    AFTER_NO_WORD,
    MINUS,
    find_boxed_number,
    find_boxes,
    is_close,
    parse_boxed_number,
    parse_number,
)
from mlxroute.questions.choice_labels import find_label, find_letter, find_requested_label
from mlxroute.questions.code_grading import extract_program, passes
from mlxroute.questions.question_files import AnswerKind, Question

_SEPARATOR_OF_THOUSANDS: Final = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# In 3.5, 9:30 and 1/2, in C++ and F#, and in -5.
_PART_OF_WORD: Final = re.compile(
    rf"(?<=\d)[.,:/](?=\d)|(?<=[^\W\d_])[+#]+|{AFTER_NO_WORD}-(?=\.?\d)"
)
_LETTER: Final = re.compile("[a-z]")


@dataclass(frozen=True, slots=True)
class Grade:
    """Whether an answer is correct: in the requested form, and in any form.

    Each is None if the text gives no answer in such a form.
    """

    strict: bool | None
    lenient: bool | None


def grade(question: Question, text: str) -> Grade:
    """Grade a text against the question's answer, which must not be None."""
    assert question.answer is not None
    match question.kind:
        case AnswerKind.CHOICE:
            return _grade_choice(question, text)
        case AnswerKind.NUMBER:
            return _grade_number(question, text)
        case AnswerKind.TEXT:
            return _grade_text(question.answer, text)
        case AnswerKind.CODE:
            return _grade_code(question, text)


def extract_answer(question: Question, text: str) -> str:
    """Return the answer that a text gives, normalised so that equal answers are equal strings.

    The result is a label, a number, plain words, or whether the code passes its tests, by the
    question's kind; empty for no answer.
    """
    match question.kind:
        case AnswerKind.CHOICE:
            return find_label(question, text) or ""
        case AnswerKind.NUMBER:
            value = _final_number(text)
            return "" if value is None else _number_text(value)
        case AnswerKind.TEXT:
            return normalise_words(text)
        case AnswerKind.CODE:
            passed = _grade_code(question, text).lenient
            return "" if passed is None else "passed" if passed else "failed"


def is_outcome_known(question: Question, text: str) -> bool:
    """Return whether more text after this one could not change its answer and grades.

    That is so after the label of a choice, or a boxed number, in the requested form.
    """
    match question.kind:
        case AnswerKind.CHOICE:
            return find_requested_label(question, text) is not None
        case AnswerKind.NUMBER:
            return find_boxed_number(text) is not None
        case _:
            return False


def _grade_choice(question: Question, text: str) -> Grade:
    strict, lenient = find_requested_label(question, text), find_label(question, text)
    correct = str(question.answer).upper()
    return Grade(
        None if strict is None else strict == correct,
        None if lenient is None else lenient == correct,
    )


def _grade_number(question: Question, text: str) -> Grade:
    correct = str(question.answer)
    # Without an instruction no box was asked for.
    written = text if text.strip() else None
    if question.instruction:
        written = find_boxed_number(text) or next(find_boxes(text), None)
    strict = None if written is None else written.strip() == correct.strip()
    value = _final_number(text)
    if value is None:
        return Grade(strict, None)
    correct_value = parse_boxed_number(correct)
    return Grade(strict, correct_value is not None and is_close(value, correct_value))


def _final_number(text: str) -> Decimal | None:
    """Return the number in the first box that holds a digit, else the last number in the text."""
    box = find_boxed_number(text)
    return parse_number(text) if box is None else parse_boxed_number(box)


def _number_text(value: Decimal) -> str:
    number = float(value)
    return f"{number:.15g}" if math.isfinite(number) else f"{value:.15g}"


def _grade_code(question: Question, text: str) -> Grade:
    assert question.function is not None
    strict = extract_program(question.function, text, strict=True)
    lenient = strict or extract_program(question.function, text, strict=False)
    return Grade(
        None if strict is None else passes(question.function, strict),
        None if lenient is None else passes(question.function, lenient),
    )


def _grade_text(correct: str, text: str) -> Grade:
    if not text.strip():
        return Grade(None, None)
    strict, correct_words = text.strip() == correct.strip(), normalise_words(correct)
    if _LETTER.fullmatch(correct_words):
        # A letter is a label of choices in the prompt, and many texts have the word "a".
        letter = find_letter(text)
        lenient = None if letter is None else letter == correct_words.upper()
        return Grade(strict, strict or lenient)
    return Grade(strict, f" {correct_words} " in f" {normalise_words(text)} ")


def normalise_words(text: str) -> str:
    """Return the words in lower case, without punctuation, separated by single spaces.

    Signs within numbers, and + and # after a letter, are part of the word. A text of punctuation
    alone is returned as it is.
    """
    text = _SEPARATOR_OF_THOUSANDS.sub("", text.casefold().replace(MINUS, "-"))
    kept = {index for match in _PART_OF_WORD.finditer(text) for index in range(*match.span())}
    words = "".join(
        " " if unicodedata.category(character)[0] in "PS" and index not in kept else character
        for index, character in enumerate(text)
    )
    return " ".join(words.split()) or text.strip()
