"""Grading of answers, and the statistics of grades."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.bench.significance import difference_interval, mean_interval, wilson_interval
from mlxroute.questions.grading import Grade, extract_answer, grade, is_outcome_known
from mlxroute.questions.question_files import AnswerKind, Question
from mlxroute.statistics import mcnemar_p

_CHOICES = (("A", "bank"), ("B", "river bank"), ("C", "library"), ("D", "mall"), ("E", "office"))
CHOICE = Question("q", "Where?", AnswerKind.CHOICE, "B", _CHOICES)
NUMBER = Question("q", "How many?", AnswerKind.NUMBER, "1,800", instruction="Box it.")
TEXT = Question("q", "Who?", AnswerKind.TEXT, "Ada Lovelace")


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("It flows. Therefore, the answer is river bank (B).", True, True),
        ("Therefore, the answer is river bank (b).", True, True),
        ("(A) is wrong. Therefore, the answer is (B)", True, True),
        ("Therefore, the answer is bank (A), not (B).", False, False),
        # "bank" is a choice too, but "river bank" begins earlier.
        ("Therefore, the answer is river bank.", None, True),
        ("Therefore, the answer is library.", None, False),
        ("Not the bank. Therefore, the answer is B.", None, True),
        ("Therefore, the answer is river bank (1945) (B).", True, True),
        ("B. river bank", None, True),
        ("I would go to the mall", None, False),
        ("I do not know", None, None),
        ("", None, None),
    ],
)
def test_a_choice_is_read_from_any_form_of_answer(
    text: str, strict: bool | None, lenient: bool | None
) -> None:
    assert grade(CHOICE, text) == Grade(strict, lenient)


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("Therefore, the answer is ice (2).", True, True),
        ("It is not steam. Therefore, the answer is 2.", None, True),
        ("The answer is (1).", False, False),
        ("The answer is (12).", None, None),
        ("Therefore, the answer is 2.5 m.", None, False),
    ],
)
def test_labels_may_be_numbers(text: str, strict: bool | None, lenient: bool | None) -> None:
    choices = (("1", "steam"), ("2", "ice"), ("3", "2.5 m"))
    question = Question("q", "?", AnswerKind.CHOICE, "2", choices)
    assert grade(question, text) == Grade(strict, lenient)


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("so \\boxed{1,800}", True, True),
        ("so \\boxed{1800}", False, True),
        ("so \\boxed{$1800.00}", False, True),
        ("so \\boxed{18}, not 1800", False, False),
        ("That makes 2 times 900 = 1800 dollars", None, True),
        ("That makes 2 times 900", None, False),
        ("\\boxed{}", False, None),
        ("many", None, None),
        # The instruction repeated, LaTeX, and units.
        ("as \\boxed{number}: \\boxed{1,800}", True, True),
        ("as \\boxed{number}: 1800", False, True),
        ("so \\boxed{1{,}800}", False, True),
        ("so \\boxed{1800\\text{ dollars}} or 3 per day", False, True),
        ("so \\boxed{1800 (10 days)}", False, True),
        ("so \\boxed{-$1800}", False, False),
        ("so \\boxed{1800^2} and not 1800", False, None),
    ],
)
def test_a_number_is_read_from_the_box_or_the_end_of_the_text(
    text: str, strict: bool | None, lenient: bool | None
) -> None:
    assert grade(NUMBER, text) == Grade(strict, lenient)


def test_a_number_that_no_box_was_asked_for_is_the_whole_text() -> None:
    question = Question("q", "2 + 2 is?", AnswerKind.NUMBER, "4")
    assert grade(question, " 4\n") == Grade(True, True)
    assert grade(question, "It is 4") == Grade(False, True)
    assert grade(question, " ") == Grade(None, None)


def test_numbers_of_hundreds_of_digits_are_compared() -> None:
    question = Question("q", "?", AnswerKind.NUMBER, "1" * 400, instruction="Box it.")
    other = "2" * 400
    assert grade(question, f"\\boxed{{{'1' * 400}}}") == Grade(True, True)
    assert grade(question, f"\\boxed{{{other}}}") == Grade(False, False)
    assert extract_answer(question, f"so {other}") != extract_answer(question, f"so {'1' * 400}")


def test_a_text_answer_may_be_part_of_a_sentence() -> None:
    assert grade(TEXT, "Ada Lovelace") == Grade(True, True)
    assert grade(TEXT, "It was ada lovelace, of course.") == Grade(False, True)
    assert grade(TEXT, "Adam Lovelace") == Grade(False, False)
    assert grade(TEXT, " ") == Grade(None, None)


@pytest.mark.parametrize(
    ("correct", "text", "lenient"),
    [
        ("35 km", "It is 3.5 km.", False),
        ("3.5 km", "It is 3.5 km.", True),
        ("35 km", "It is 3,5 km.", False),
        ("1800 km", "It is 1,800 km.", True),
        ("12 cup", "1/2 cup", False),
        ("930 am", "at 9:30 am", False),
        ("5 °C", "It is -5 °C.", False),
        ("-5 °C", "It is −5 °C.", True),
        ("1939-45", "It was (1939–45).", True),
        ("C", "It is C++.", None),
        ("C++", "It is C++.", True),
        ("F#", "**F#**, of course", True),
        ("Jupiter", "The answer is “Jupiter”.", True),
        ("Jupiter", "Jupiter—the largest", True),
        ("Newton's law", "Newton’s law…", True),
        ("well-known", "well known", True),
        ("<", "<", True),
        ("<", ">", False),
    ],
)
def test_punctuation_separates_words_unless_it_is_part_of_one(
    correct: str, text: str, lenient: bool | None
) -> None:
    assert grade(Question("q", "?", AnswerKind.TEXT, correct), text).lenient is lenient


@pytest.mark.parametrize(
    ("correct", "text", "lenient"),
    [
        ("A", "The answer is B: an ant is a large insect.", False),
        ("B", "The answer is C, not A or B.", False),
        ("A", "A whale is larger than an ant.", None),
        ("A", "The answer is a whale.", None),
        ("A", "A) whale", True),
        ("A", "a", True),
        ("(A)", "It is large. Therefore, the answer is whale (A).", True),
        ("B.", "**B**", True),
        ("C", "The correct option is C.", True),
        ("B", "The answer is B, since f(x) = 0 there.", True),
        ("B", "Remove the item(s) first. The correct option is B.", True),
        ("B", "Remove the item(s) first. The answer is whale (B).", True),
        ("B", "I would say (B).", True),
    ],
)
def test_an_answer_of_one_letter_is_what_the_text_gives_as_its_answer(
    correct: str, text: str, lenient: bool | None
) -> None:
    assert grade(Question("q", "A) whale B) ant C) cat", answer=correct), text).lenient is lenient


@pytest.mark.parametrize("count", [42, 47, 59, 78])
def test_intervals_stay_within_what_is_possible(count: int) -> None:
    for low, high in (wilson_interval(0, count), wilson_interval(count, count)):
        assert 0.0 <= low < high <= 1.0
        assert math.copysign(1.0, low) == 1.0
    assert difference_interval(count, 0, count)[1] == 1.0
    assert difference_interval(0, count, count)[0] == -1.0
    assert mean_interval([1.0, 1.0, 1.0, 1.0, 0.5], low=0.0, high=1.0)[1] == 1.0


def test_intervals_and_p_values_equal_published_ones() -> None:
    # Newcombe (1998), example of 81 of 263; exact binomial tails.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert mcnemar_p(10, 0) == pytest.approx(2 / 1024)
    assert mcnemar_p(5, 5) == 1.0
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(1, 7) == mcnemar_p(7, 1) == pytest.approx(2 * 9 / 256)


@pytest.mark.parametrize(
    ("kind", "texts", "same"),
    [
        (AnswerKind.CHOICE, ("So the answer is tea (A).", "The answer is (A)"), True),
        (AnswerKind.CHOICE, ("the answer is tea", "the answer is milk"), False),
        (AnswerKind.NUMBER, ("It is \\boxed{18.00}", "so 18"), True),
        (AnswerKind.NUMBER, ("no idea", "so 0"), False),
        (AnswerKind.NUMBER, ("so 1234567", "so 1234568"), False),
        (AnswerKind.TEXT, ("Ice floats!", "ice  floats"), True),
        (AnswerKind.TEXT, ("ice floats", "ice sinks"), False),
        (AnswerKind.TEXT, ("<", ">"), False),
    ],
)
def test_equal_answers_are_extracted_as_equal_strings(
    kind: AnswerKind, texts: tuple[str, str], same: bool
) -> None:
    question = Question("q", "?", kind, None, (("A", "tea"), ("B", "milk")))
    first, second = (extract_answer(question, text) for text in texts)
    assert (first == second) is same


_PARTS = st.sampled_from(
    [
        *("Birds fly.", " the answer is", " bank", " (B)", " (a)", " (F)", "."),
        *("\\boxed{7}", "\\boxed{", "12", "}", "{", "\\boxed{number}", "{,}", "000", "^2"),
    ]
)


@given(st.lists(_PARTS, max_size=8), st.lists(_PARTS, max_size=4))
def test_later_text_does_not_change_a_known_outcome(parts: list[str], more: list[str]) -> None:
    text, longer = "".join(parts), "".join([*parts, *more])
    for question in (CHOICE, NUMBER):
        if is_outcome_known(question, text):
            assert extract_answer(question, longer) == extract_answer(question, text)
            assert grade(question, longer) == grade(question, text)


def test_an_outcome_is_known_after_the_requested_form() -> None:
    assert is_outcome_known(CHOICE, "Birds fly. Therefore, the answer is bank (B") is False
    assert is_outcome_known(CHOICE, "Birds fly. Therefore, the answer is bank (B)")
    assert not is_outcome_known(CHOICE, "bank (B)")
    assert not is_outcome_known(NUMBER, "so it is \\boxed{7")
    assert is_outcome_known(NUMBER, "so it is \\boxed{7}")
    assert is_outcome_known(NUMBER, "so it is \\boxed{7\\text{ days}}")
    assert not is_outcome_known(NUMBER, "I write \\boxed{number}:")
    assert not is_outcome_known(Question("t", "?", answer="yes"), "yes")
