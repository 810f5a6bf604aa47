"""Labels of choices in answers: in the requested form, and in any form."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator

from mlxroute.questions.question_files import AnswerKind, Question

_AFTER_ANSWER_IS = re.compile(r"answer\s+is\b(.*)", re.IGNORECASE | re.DOTALL)
_LABEL_IN_BRACKETS = re.compile(r"\(\s*([A-Za-z]|\d+)\s*\)")
_IS_WRONG = re.compile(r"[\s*_]*\bis\s+(?:incorrect|wrong|not)\b", re.IGNORECASE)

# What rejects the label or the choice directly after it: "not (A)", "nor the bank (A)".
_NOT = re.compile(
    r"\b(?:not|nor|neither)\s+(?:(?:the|an?)\s+)?(?:(?:option|choice|letter|label)\s+)?\Z",
    re.IGNORECASE,
)
_MARKUP_AT_END = re.compile(r"[\s*_`\"'“”‘’«»(\[{–—-]+\Z")
# More than a choice and what is before it have; a longer search in each bracket would take long.
_MAX_BEFORE = 300

_CONCLUSION = re.compile(
    r"answer(?:[\s*_]+is\b|[\s*_]*:)|\\boxed(?=\s*\{)",
    re.IGNORECASE,
)
"""What comes before the answer itself."""

# Looser forms, in which a label counts before the text of a choice.
_LOOSE_CONCLUSION = re.compile(
    r"\b(?:option|choice|answer)[\s*_]+(?:is|(?:would|must|should)\s+be)\b(?:\s+\w+ly\b)?",
    re.IGNORECASE,
)
_CORRECT_LABEL = re.compile(
    r"(?<![^\W_])(?<![.,'’/&+#–-])([A-Za-z]|\d+)[*_`\"')\]}]*\s+is\s+(?:the\s+)?(?:correct|right)\b",
    re.IGNORECASE,
)

# What may stand between a conclusion and its label. A dollar sign before a digit is an amount.
_MARKUP = (
    r"(?:[\s:*_`\"'“”‘’«(\[{<]|\\[(\[]|\$(?!\d)|\\(?:text|math)[a-z]*"
    r"|(?:the\s+)?(?:option|choice|letter|label)\b)*"
)
_MARKUP_BEFORE_LABEL = re.compile(_MARKUP, re.IGNORECASE)
# A label stands alone: not in C++, 3.5, 1/2 or B's. "a" and "I" before a word are English words.
_LABEL = re.compile(r"([A-Za-z]|\d+)(?![^\W_]|[%°+#]|[.,:]\d|['’/&–-]\w)(?!(?<=[aiI])\s+[^\W\d_])")
# A label that a sentence gives as its whole answer. "a" and "i" may be words.
_WHOLE_LABEL = re.compile(
    r"([A-Zb-hj-z]|\d+)[*_`\"'”’)\]}>]*(?:[.,;:!](?!\w)|\s*(?:\n|$)|\s+(?i:because|since|(?:and\s+)?not)\b)"
)
_LABEL_AT_START = re.compile(
    r"\A" + _MARKUP + r"([A-Za-z]|\d+)[*_`\"']*\s*(?:[):\]}]|\.(?!\d)|$)", re.IGNORECASE
)
_ARTICLE = re.compile(r"(?:(?:an?|the)\s+)?", re.IGNORECASE)
# A prompt that lists its own choices may label them with any letters.
_ANY_LETTER = Question(
    "", "", AnswerKind.CHOICE, choices=tuple((letter, "") for letter in string.ascii_uppercase)
)


def find_requested_label(question: Question, text: str) -> str | None:
    """Return the label in the requested form: the first in brackets after "answer is".

    A label after "not" does not count. Where another label stands directly after "answer is", the
    text is not in the requested form.
    """
    conclusion = _AFTER_ANSWER_IS.search(text)
    if conclusion is None:
        return None
    after = conclusion[1]
    known = _known_matches(question, _LABEL_IN_BRACKETS.finditer(after))
    label = next((match[1].upper() for match in known if not _is_rejected(question, match)), None)
    markup = _MARKUP_BEFORE_LABEL.match(after)
    stated = _WHOLE_LABEL.match(after, markup.end() if markup else 0)
    if label and stated and _known_label(question, [stated]) not in (None, label):
        # A number may be the text of the choice, and not another label.
        return label if stated[1] in _choice_texts(question, label) else None
    return label


def find_label(question: Question, text: str) -> str | None:
    """Return the label that a text gives in any form; None if it gives none.

    What follows "answer is", "answer:" or `\\boxed` counts first: a label, else the text of a
    choice. Choices that are named before it are not the answer.
    """
    if requested := find_requested_label(question, text):
        return requested
    conclusions = [match.end() for match in _CONCLUSION.finditer(text)]
    stated = (_label_at(question, text, end) for end in conclusions)
    if label := next(filter(None, stated), None):
        return label
    if conclusions:
        after = text[conclusions[0] :]
        if label := (
            _accepted_label(question, _LABEL_IN_BRACKETS.finditer(after))
            or _correct_label(question, text)
            or _first_choice_in(question, after)
        ):
            return label
    in_brackets, at_start = _LABEL_IN_BRACKETS.finditer(text), _LABEL_AT_START.finditer(text)
    label = _accepted_label(question, in_brackets) or _accepted_label(question, at_start)
    if label or conclusions:
        return label
    return _correct_label(question, text) or _first_choice_in(question, text)


def find_letter(text: str) -> str | None:
    """Return the letter that a text concludes with, in upper case; None if it gives none."""
    stated = (_label_at(_ANY_LETTER, text, match.end()) for match in _CONCLUSION.finditer(text))
    return (
        next(filter(None, stated), None)
        or find_requested_label(_ANY_LETTER, text)
        or _correct_label(_ANY_LETTER, text)
        or _accepted_label(_ANY_LETTER, _LABEL_AT_START.finditer(text))
        # A letter in brackets may be part of a formula, so it counts last.
        or _accepted_label(_ANY_LETTER, _LABEL_IN_BRACKETS.finditer(text))
    )


def _accepted_label(question: Question, matches: Iterable[re.Match[str]]) -> str | None:
    """Return the first label of the matches that the text does not call wrong."""
    accepted = (
        match[1].upper()
        for match in _known_matches(question, matches)
        if not (_IS_WRONG.match(match.string, match.end()) or _is_rejected(question, match))
    )
    return next(accepted, None)


def _is_rejected(question: Question, match: re.Match[str]) -> bool:
    """Return whether a "not" stands directly before a known label, or before its choice."""
    before = match.string[max(0, match.start() - _MAX_BEFORE) : match.start()]
    without_markup = _MARKUP_AT_END.sub("", before)
    for text in _choice_texts(question, match[1].upper()):
        # The text of a choice may have a "not" of its own.
        if text and (choice := re.search(_words_pattern(text) + r"\Z", without_markup, re.I)):
            before = without_markup[: choice.start()]
    return _NOT.search(_MARKUP_AT_END.sub(" ", before)) is not None


def _correct_label(question: Question, text: str) -> str | None:
    """Return the label of the choice that a text calls correct, or concludes with loosely."""
    conclusions = _LOOSE_CONCLUSION.finditer(text)
    stated = (_label_at(question, text, match.end()) for match in conclusions)
    return next(filter(None, stated), None) or _known_label(question, _CORRECT_LABEL.finditer(text))


def _known_label(question: Question, matches: Iterable[re.Match[str]]) -> str | None:
    """Return the first text of the matches that is one of the question's labels."""
    return next((match[1].upper() for match in _known_matches(question, matches)), None)


def _known_matches(question: Question, matches: Iterable[re.Match[str]]) -> Iterator[re.Match[str]]:
    """Return the matches whose text is one of the question's labels."""
    labels = {label.upper() for label, _ in question.choices}
    return (match for match in matches if match[1].upper() in labels)


def _choice_texts(question: Question, label: str) -> list[str]:
    """Return the text of the choice with a label in upper case."""
    return [text.strip() for own, text in question.choices if own.upper() == label]


def _words_pattern(text: str) -> str:
    """Return a pattern of a choice's text, which takes any white space between words."""
    return r"\s+".join(map(re.escape, text.split()))


def _label_at(question: Question, text: str, begin: int) -> str | None:
    """Return the label, or the label of the choice, that stands directly after a conclusion.

    The longer of the two counts: "2 m" may be a choice beside the label 2, and "A river" the
    choice "river" beside the label A.
    """
    markup = _MARKUP_BEFORE_LABEL.match(text, begin)
    begin = markup.end() if markup else begin
    label = _known_label(question, filter(None, [_LABEL.match(text, begin)]))
    article = _ARTICLE.match(text, begin)
    starts = {begin, article.end() if article else begin}
    choices = [
        (match.end(), choice_label.upper())
        for choice_label, pattern in _choice_patterns(question)
        for start in starts
        if (match := pattern.match(text, start))
    ]
    end, choice = max(choices, default=(begin, None))
    return choice if label is None or end > begin + len(label) else label


def _first_choice_in(question: Question, text: str) -> str | None:
    """Return the label of the choice whose text comes first; the longest of those that tie."""
    occurrences = [
        (match.start(), -match.end(), label.upper())
        for label, pattern in _choice_patterns(question)
        if (match := pattern.search(text))
    ]
    return min(occurrences)[2] if occurrences else None


def _choice_patterns(question: Question) -> list[tuple[str, re.Pattern[str]]]:
    """Return each label with a pattern of its choice's text, in whole words and numbers."""
    return [
        (
            label,
            re.compile(
                r"(?<![^\W_])(?<!\d[.,])" + _words_pattern(text) + r"(?![^\W_]|[.,]\d)",
                re.IGNORECASE,
            ),
        )
        for label, text in question.choices
        if text.strip()
    ]
