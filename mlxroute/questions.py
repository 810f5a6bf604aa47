"""Files of questions: JSON Lines, one object a row.

Understood are rows with a `prompt`; those of CommonsenseQA, with `question`, `choices` and maybe an
`answerKey`; and those of GSM8K, with a `problem` and maybe a `solution`. `id` is optional.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxroute.errors import UsageError

_CHOICE_FORM = (
    "Please format your response in the following way:\n"
    "[Explanation]. Therefore, the answer is answer (label)."
)
_NUMBER_FORM = "Solve the problem step by step and give the final answer as \\boxed{number}."


@dataclass(frozen=True, slots=True)
class Question:
    """A user message; `name` says which row it is."""

    name: str
    prompt: str


def read_questions(path: Path) -> list[Question]:
    """All questions of a file, in order; blank lines do not count.

    Raises UsageError naming the file, and the row where one is not as it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as exc:
        raise UsageError(f"the questions {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise UsageError(f"the questions {path} are not UTF-8 text") from exc
    found = [
        _question(line, where=f"{path}, row {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise UsageError(f"the questions {path}: there are none")
    return found


def sampled(questions: Sequence[Question], count: int) -> list[Question]:
    """As many as wanted, or all there are, by the same chance each time."""
    return random.Random(0).sample(questions, min(count, len(questions)))


def _question(line: str, *, where: str) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as exc:
        raise UsageError(f"{where}: no JSON ({exc.msg} at column {exc.colno})") from exc
    if not isinstance(row, dict):
        raise UsageError(f'{where}: a row is one JSON object, as in {{"prompt": "..."}}')
    return Question(str(row.get("id", where)), _prompt(row, where=where))


def _prompt(row: dict[str, Any], *, where: str) -> str:
    if "choices" in row and "prompt" not in row:
        return f"{_text(row, 'question', where)}\n{_choices(row, where)}\n\n{_CHOICE_FORM}"
    if "problem" in row:
        return f"{_text(row, 'problem', where)}\n\n{_NUMBER_FORM}"
    return _text(row, "prompt", where)


def _choices(row: dict[str, Any], where: str) -> str:
    try:
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        pairs = list(zip(labels, texts, strict=True))
    except (KeyError, TypeError, ValueError) as exc:
        raise UsageError(f"{where}: `choices` needs a `label` and a `text` of one length") from exc
    return "\n".join(f"{label}. {text}" for label, text in pairs)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: `{key}` must be a text that is not empty")
    return value
