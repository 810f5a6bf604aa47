"""What counts as a number: in running text, as a whole answer, and in a box of LaTeX."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxroute.questions.answer_patterns import (
    NUMBER,
    find_boxed_number,
    find_boxes,
    is_boxed_number,
    is_close,
    is_number,
    parse_boxed_number,
    parse_number,
)

_LATEX = st.lists(
    st.sampled_from(
        [
            *("\\boxed{", "{", "}", "\\{", "\\}", "\\\\", "\\", "\\text{", "\\frac", "\\sqrt"),
            *("1", "000", ".", ",", "{,}", "\\,", " ", "-", "+", "=", "^", "/", "$", "%", "x"),
        ]
    ),
    max_size=24,
).map("".join)


@pytest.mark.parametrize(
    "text", ["7", "-7", "−7", "1,800", "1,800.50", "1,00,000", " .5 ", ",5", "-,5"]
)
def test_a_whole_answer_is_a_number(text: str) -> None:
    assert is_number(text)


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "5.", "1 2", "$5", ",-5", "seven", "0,5", "2,3,5", "1,2345", "0,500"]
)
def test_a_whole_answer_is_not_a_number(text: str) -> None:
    assert not is_number(text)


def test_a_number_in_running_text_includes_a_comma_after_it_but_none_before() -> None:
    assert NUMBER.findall("at 1,800, or ,5") == ["1,800,", "5"]
    assert parse_number("at 1,800, or so") == 1800
    assert parse_number("at \\(1{,}800\\) or so") == 1800
    assert parse_number("none") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is −5.", -5),
        ("x=-5", -5),
        ("(-5)", -5),
        ("$-5", -5),
        ("_-5_", -5),
        ("Our team won 3-2", 2),
        ("Our team won 3−2", 2),
        ("after 2-3 days", 3),
        ("COVID-19", 19),
        ("f(2)-7", 7),
        ("3+4", 4),
        ("-.5", Decimal("-0.5")),
        ("Her balance is -$5.", -5),
        ("x = –5", -5),
        ("5–10 days", 10),
        ("30 - $5", 5),
    ],
)
def test_a_sign_does_not_follow_a_word_or_number(text: str, number: Decimal | int) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("\\boxed{7} and \\boxed{8}", ["7", "8"]),
        ("\\boxed{1{,}000}", ["1{,}000"]),
        ("\\boxed{\\frac{1}{2}}", ["\\frac{1}{2}"]),
        ("\\boxed{\\{1\\}}", ["\\{1\\}"]),
        ("\\\\boxed{7}", ["7"]),
        ("} { \\boxed{7}", ["7"]),
        ("\\boxed{2 so \\boxed{7}", ["7"]),
        ("\\boxed{2 \\boxed{7} 3}", ["7"]),
        ("\\boxed{\\boxed{7}} \\boxed{{8}}", ["7", "{8}"]),
        ("\\boxed{7", []),
        ("\\boxed{7\\}", []),
        ("boxed{7}", []),
    ],
)
def test_the_braces_of_a_box_are_balanced(text: str, contents: list[str]) -> None:
    assert list(find_boxes(text)) == contents


@pytest.mark.parametrize(
    ("content", "number"),
    [
        ("1{,}000", "1000"),
        ("1\\,000", "1000"),
        ("1,\\!000", "1000"),
        ("1 000 000", "1000000"),
        ("1~000.50", "1000.5"),
        ("1000\\text{ dollars in 3 days}", "1000"),
        ("1000 (10 days)", "1000"),
        ("5\\text{ m}^2", "5"),
        ("5\\ \\mathrm{m/s^{2}}", "5"),
        ("90^\\circ", "90"),
        ("\\text{Day 3: }45", "45"),
        ("\\text{1000 dollars}", "1000"),
        ("\\mathbf{12}", "12"),
        ("-$50", "-50"),
        ("-\\$50", "-50"),
        ("$-50$", "-50"),
        ("- 50", "-50"),
        ("−50", "-50"),
        ("–50", "-50"),
        ("3\\text{ out of }4", "3"),
        ("12\\text{ cm} \\text{ (or }120\\text{ mm)}", "12"),
        ("1000,000", "1000000"),
        ("5 of 10", "5"),
        ("12,", "12"),
        ("10\\%", "10"),
        ("x_1 = 5", "5"),
        ("x = - 5 \\text{ m}", "-5"),
        ("2 + 3 = 5", "5"),
        ("1000 = 10^3", "1000"),
        ("12 apples", "12"),
        ("1000 per 3 days", "1000"),
    ],
)
def test_the_number_in_a_box_is_read(content: str, number: str) -> None:
    assert parse_boxed_number(content) == Decimal(number)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "x",
        "x^2",
        "\\frac{1}{2}",
        "100^2",
        "2\\pi",
        "\\sqrt{16}",
        "1/2",
        "3 \\times 10",
        "3 + 4",
        "10, 12",
        "10 to 12",
        "10 \\text{ or } 12",
        "5,7",
    ],
)
def test_a_formula_or_list_in_a_box_is_not_read_as_one_of_its_numbers(content: str) -> None:
    assert parse_boxed_number(content) is None
    assert not is_boxed_number(content)


@pytest.mark.parametrize("content", ["12", "1{,}000", "\\$5", "5\\text{ cm}", "10\\%", "-1 000"])
def test_a_box_that_holds_just_a_number(content: str) -> None:
    assert is_boxed_number(content)


@pytest.mark.parametrize("content", ["x = 5", "5x", "5 apples", "(3, 4)", "\\text{(A)}", "1, 2"])
def test_a_box_that_holds_more_than_a_number(content: str) -> None:
    assert not is_boxed_number(content)


@given(
    st.integers(min_value=-(10**15), max_value=10**15),
    st.sampled_from([",", "{,}", "\\,", " ", ",\\!", "\u202f"]),
    st.sampled_from(["{}", "\\${}", "{}\\text{{ of 7}}", "x = {}", "{} (7 days)", "{} m", "${}$"]),
)
def test_separators_and_units_do_not_change_a_number(value: int, separator: str, form: str) -> None:
    content = form.format(f"{value:,}".replace(",", separator))
    (box,) = find_boxes(f"so \\boxed{{{content}}} it is")
    assert box == content
    assert parse_boxed_number(box) == value


@given(_LATEX)
def test_a_number_is_read_from_any_formula_or_refused(text: str) -> None:
    for content in (text, *find_boxes(text)):
        value = parse_boxed_number(content)
        assert value is None or value.is_finite()
        if is_boxed_number(content):
            assert value is not None


@given(_LATEX, _LATEX)
def test_the_first_box_with_a_digit_stays_the_first(text: str, more: str) -> None:
    box = find_boxed_number(text)
    if box is not None:
        assert find_boxed_number(text + more) == box


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    for content in (text, f"1{text}", *find_boxes(f"\\boxed{{{text}}}")):
        for value in (parse_number(content), parse_boxed_number(content)):
            assert value is None or value.is_finite()


def test_numbers_of_any_length_are_compared() -> None:
    long, other = Decimal("1" * 400), Decimal("2" * 400)
    assert is_close(long, long + 1)
    assert not is_close(long, other)
    assert not is_close(long, -long)
    assert is_close(Decimal("0.1") + Decimal("0.2"), Decimal("0.3"))
    assert is_close(Decimal(1), Decimal("1.0000000001"))
    assert not is_close(Decimal(1), Decimal("1.00000001"))
    assert is_close(Decimal(0), Decimal("-0.0"))
