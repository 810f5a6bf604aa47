"""The label that an answer gives: in any form, and never one that it only mentions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.questions.choice_labels import find_label, find_requested_label
from mlxroute.questions.question_files import AnswerKind, Question

_LABELS = "ABCDE"


def _question(*texts: str, labels: str = _LABELS) -> Question:
    choices = tuple(zip(labels, texts, strict=False))
    return Question("q", "?", AnswerKind.CHOICE, None, choices)


PLACES = _question("bank", "river", "library", "mall", "new office")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A bank is for money. The answer is: B", "B"),
        ("One would use a bank, so not that. The answer is **B**.", "B"),
        ("It is not a bank. The answer is B, since water flows.", "B"),
        ("The answer is option B.", "B"),
        ("The answer is the letter 'b'.", "B"),
        ("\\boxed{B}", "B"),
        ("The bank is wrong, so $\\boxed{\\text{B}}$.", "B"),
        ("**Answer:** B", "B"),
        ("Final answer: [B] river", "B"),
        ("The correct answer is:\n\nB. river", "B"),
        ("The answer is _B_", "B"),
        ("The answer is <B>", "B"),
        ("Answer: not a mall but the other one (B).", "B"),
        ("The answer is not obvious. The answer is B.", "B"),
        ("The answer is B. Question: and at night? The answer is C.", "B"),
        ("**B**", "B"),
        ("**B.** The bank is for money.", "B"),
    ],
)
def test_the_label_after_a_conclusion_counts(text: str, label: str) -> None:
    assert find_label(PLACES, text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The answer is a river.", "B"),
        ("The answer is A river.", "B"),
        ("The answer is A bank.", "A"),
        ("The answer is A because of the river.", "A"),
        ("The answer is a.", "A"),
        ("The answer is a) bank", "A"),
        ("The answer is a place with books, a library.", "C"),
        ("The answer is the new\noffice.", "E"),
        ("The answer is *_mall_*.", "D"),
        ("A bank is no help. The answer is a bridge.", None),
        ("The answer is B-flat.", None),
        ("The answer is C++.", None),
        ("The answer is B's.", None),
        ("The answer is Z.", None),
        ("A bank is a place. I cannot say what the answer is.", None),
    ],
)
def test_a_letter_that_is_part_of_a_sentence_is_no_label(text: str, label: str | None) -> None:
    assert find_label(PLACES, text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Option B is correct", "B"),
        ("A bank holds money, so option **B** is correct.", "B"),
        ("B is the correct answer", "B"),
        ("b) is right", "B"),
        ("The correct answer would be B", "B"),
        ("The correct option is B", "B"),
        ("The right choice must be the river.", "B"),
        ("the answer is definitely B.", "B"),
        ("The answer is clearly B, not a bank.", "B"),
        ("(A) is incorrect. (B) is correct.", "B"),
        ("Option A is wrong. Option B is correct.", "B"),
        ("Surely (A) is not it, but (B) is.", "B"),
        ("B. Others say that D is correct.", "B"),
        ("The answer is definitely not B.", None),
        ("The correct option is not B.", None),
        ("B is not correct.", None),
        ("(B) is wrong.", None),
        ("C++ is correct.", None),
        ("AB is correct.", None),
        ("3.5 is right and B-flat is right.", None),
    ],
)
def test_a_label_that_is_called_correct_counts(text: str, label: str | None) -> None:
    assert find_label(PLACES, text) == label


@pytest.mark.parametrize(
    ("text", "requested", "label"),
    [
        ("The answer is **B**. Option (A) is incorrect because banks are dry.", None, "B"),
        ("The answer is B, not (A).", None, "B"),
        ("The answer is river, not bank (A).", None, "B"),
        ("The answer is not (A), it is (B).", "B", "B"),
        ("The answer is neither (A) nor (C) but (B).", "B", "B"),
        ("The answer is not obvious, so the river (B).", "B", "B"),
        ("The answer is A type of river (B).", "B", "B"),
        ("The answer is bank (B).", "B", "B"),
        ("So not (A), (B).", None, "B"),
        ("The answer is not the bank — it is the river (B).", "B", "B"),
        ("The answer is where people do not need a library card (B).", "B", "B"),
        ("The answer is a place that is not dry (B).", "B", "B"),
        ("Since fish are not in a bank they must be in (B)", None, "B"),
        ("The answer is not only the river (B).", "B", "B"),
        ("The answer is a.k.a. river (B)", "B", "B"),
        ("The answer is a, hmm, river (B)", "B", "B"),
    ],
)
def test_a_label_that_is_rejected_is_not_the_answer(
    text: str, requested: str | None, label: str
) -> None:
    assert find_requested_label(PLACES, text) == requested
    assert find_label(PLACES, text) == label


def test_a_choice_may_have_a_not_of_its_own() -> None:
    signs = _question("stop", "do not disturb")
    for text in ("do not disturb", "Do not disturb", '"do not disturb"', "**do not  disturb** -"):
        assert find_requested_label(signs, f"The answer is {text} (B).") == "B"
    assert find_requested_label(signs, "The answer is not do not disturb (B).") is None


def test_a_number_may_be_a_choice_and_not_another_label() -> None:
    even = _question("2", "4", "6", "8", labels="1234")
    assert find_requested_label(even, "The answer is 4, (2).") == "2"
    assert find_requested_label(even, "The answer is 3, not (2).") is None


@pytest.mark.parametrize(
    ("text", "label"),
    [("(x)", None), ("(A) ", "A"), ("not (A) ", None), ("not the bank (A), ", "A")],
)
def test_long_texts_are_read_in_time(text: str, label: str | None) -> None:
    # Quadratic searches would take minutes here.
    assert find_label(PLACES, "The answer is " + text * 20_000) == label


def test_i_is_no_label_before_a_word() -> None:
    nine = _question(*(f"place{n}" for n in range(9)), labels="ABCDEFGHI")
    assert find_label(nine, "The answer is I think place2") == "C"
    assert find_label(nine, "The answer is I.") == "I"


def test_choices_are_whole_words() -> None:
    animals = _question("car", "horse")
    assert find_label(animals, "The answer is scary horse.") == "B"
    assert find_label(animals, "A scarf, then a horse") == "B"
    assert find_label(animals, "scars") is None


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The answer is 2.", "2"),
        ("The answer is 2 because it is cold.", "2"),
        ("The answer is 3.5", None),
        ("The answer is 1,000.", None),
        ("The answer is 1/2.", None),
        ("The answer is 2%.", None),
        ("The answer is $2.", None),
        ("The answer is 12.", None),
        ("The answer is 2 m.", "3"),
        ("So it is 40.25 in all.", "4"),
        ("So it is 40 in all.", "5"),
        ("So it is 40.5 in all.", None),
    ],
)
def test_digits_within_a_number_are_no_label(text: str, label: str | None) -> None:
    question = _question("steam", "ice", "2 m", "40.25", "40", labels="12345")
    assert find_label(question, text) == label


@given(
    st.text(alphabet=st.characters(exclude_characters="\\"), max_size=40).filter(
        lambda text: "answer" not in text.lower()
    ),
    st.sampled_from(["answer is", "Answer:", "answer is:", "**Answer**:"]),
    st.sampled_from([" ", " **", ' "', " [", " \\boxed{", " option ", "\n\n", " $"]),
    st.sampled_from(_LABELS),
    st.sampled_from(["", ".", ",", "**", '"', "]", "}", "$", "\n", ": mall", ". mall"]),
)
def test_a_stated_label_counts_whatever_comes_before_it(
    before: str, conclusion: str, opening: str, label: str, closing: str
) -> None:
    text = f"{before} {conclusion}{opening}{label}{closing}"
    assert find_label(PLACES, text) == label


@given(st.text(), st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_and_any_choices_can_be_read(text: str, choices: list[str]) -> None:
    question = _question(*choices)
    for words in (text, f"The answer is {text}", f"The answer is ({text}"):
        label = find_label(question, words)
        assert label is None or label in _LABELS
        assert find_requested_label(question, words) in (None, label)


def test_a_choice_without_text_is_no_answer() -> None:
    assert find_label(_question("", " "), "I do not know") is None
