"""Questions with known answers for servers that go on by example, one for each kind of place."""

from __future__ import annotations

from typing import Final

from mlxroute.large.negotiation.probe_questions import ProbeQuestion

_DAYS: Final = "Number the days of the week, one on each line, without further words."
_CAPITALS: Final = "Make a Markdown table of the capitals of France, Italy and Spain."

CONTINUATIONS: Final[tuple[tuple[str, ProbeQuestion], ...]] = (
    (
        "inside a word",
        ProbeQuestion(
            "The sky is blue because air scatters blue light more than red light. This is called"
            " Rayleigh scat",
            "tering",
            "Why is the sky blue?",
        ),
    ),
    (
        "inside a word of a list",
        ProbeQuestion(
            "Monday, Tuesday, Wednesday, Thurs",
            "day",
            "List the seven days of the week, separated by commas.",
        ),
    ),
    (
        "after a word",
        ProbeQuestion("The capital of France is", " Paris", "What is the capital of France?"),
    ),
    (
        "after a space",
        ProbeQuestion("The capital of Japan is ", "Tokyo", "What is the capital of Japan?"),
    ),
    (
        "after a comma",
        ProbeQuestion(
            "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,", " 12", "Count from 1 to 30, separated by commas."
        ),
    ),
    (
        "after a list number",
        ProbeQuestion("1. Monday\n2. Tuesday\n3. Wednesday\n4.", " Thursday", _DAYS),
    ),
    (
        "after a line break",
        ProbeQuestion("1. Monday\n2. Tuesday\n3. Wednesday\n4. Thursday\n", "5", _DAYS),
    ),
    (
        "in a line of code",
        ProbeQuestion(
            "```python\ndef add(a, b):\n    return a",
            " + b",
            "Write a Python function that adds two numbers.",
        ),
    ),
    (
        "before an indented line",
        ProbeQuestion(
            "```python\nfor number in range(10):\n    if number % 2 == 0:\n",
            " " * 8 + "print",
            "Write a Python loop that prints the even numbers below 10.",
        ),
    ),
    (
        "in a table",
        ProbeQuestion(
            "| Country | Capital |\n|---|---|\n| France | Paris |\n| Italy |", " Rome", _CAPITALS
        ),
    ),
    (
        "without spaces",
        ProbeQuestion("日本の首都は東", "京", "日本の首都はどこですか。"),
    ),
)
"""Each kind of place, and a text that ends there."""

FINISHED: Final = ProbeQuestion(
    "The capital of Norway is Oslo.",
    "",
    "What is the capital of Norway? Answer in one short sentence.",
)
"""An answer that is complete."""
