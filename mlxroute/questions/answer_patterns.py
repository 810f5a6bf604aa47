"""Patterns of answers in text: a boxed answer and a number."""

from __future__ import annotations

import re

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
"""An answer in LaTeX's `\\boxed{...}`; group 1 is its content."""

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
"""A decimal number in running text, with commas between digits. A comma after it is included."""

_COMMAS_BEFORE_NUMBER = re.compile(r"^([-+]?),+(?=[\d.])")


def is_number(text: str) -> bool:
    """Return whether the whole text is a number.

    Unlike `NUMBER`, this rejects a comma at the end and accepts commas at the start.
    """
    text = _COMMAS_BEFORE_NUMBER.sub(r"\1", text.strip())
    return NUMBER.fullmatch(text) is not None and not text.endswith(",")


def parse_number(text: str) -> float | None:
    """Return the last number in a text; None if it has none."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
