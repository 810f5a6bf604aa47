"""Files of questions: JSON Lines, one object a row.

Understood are rows with a `prompt` and maybe an `answer`; those of CommonsenseQA, with `question`,
`choices` and maybe an `answerKey`; and those of GSM8K, with a `problem` and maybe a `solution`.
`id` is optional, and so is `cot`, an answer in full that serves as a worked example.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mlxroute.errors import UsageError
from mlxroute.types import Message

# A form with placeholders is one that small models copy.
_CHOICE_FORM = (
    "Explain in one sentence, then end with: Therefore, the answer is <choice> (<label>)."
)
_NUMBER_FORM = "Solve the problem step by step and give the final answer as \\boxed{number}."
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")
# Left in worked answers by a calculator; no model writes them.
_CALCULATION = re.compile(r"<<[^<>]*>>")


class AnswerKind(StrEnum):
    """What an answer is compared as."""

    CHOICE = "choice"
    NUMBER = "number"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Question:
    """A user message; `name` says which row it is.

    `form` asks for answers in a form that can be read. `answer` is the right one, of `choices` the
    label; None where the file has none. `worked` is an answer in full.
    """

    name: str
    prompt: str
    kind: AnswerKind = AnswerKind.TEXT
    answer: str | None = None
    choices: tuple[tuple[str, str], ...] = ()
    worked: str | None = None
    form: str = ""

    @property
    def fingerprint(self) -> str:
        """Tells the question from others without telling it."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


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


def sample_questions(questions: Sequence[Question], count: int) -> list[Question]:
    """As many as wanted, or all there are, in the same shuffled order each time."""
    return random.Random(0).sample(questions, len(questions))[:count]


def read_worked_examples(path: Path | None, count: int) -> list[Question]:
    """The first rows of a file that have an answer in full; none without a file.

    Raises UsageError where there are fewer.
    """
    if path is None:
        return []
    found = [each for each in read_questions(path) if each.worked is not None][:count]
    if len(found) < count:
        raise UsageError(f"{path}: {len(found)} rows have a `cot`, and {count} are wanted")
    return found


def question_messages(question: Question, examples: Sequence[Question] = ()) -> list[Message]:
    """The question as a user's message, behind worked examples as earlier turns.

    Without examples it says which form is asked for.
    """
    turns: list[Message] = []
    for each in examples:
        turns.append({"role": "user", "content": each.prompt})
        turns.append({"role": "assistant", "content": each.worked or ""})
    asked = question.prompt
    if question.form and not examples:
        asked = f"{asked}\n\n{question.form}"
    return [*turns, {"role": "user", "content": asked}]


def _question(line: str, *, where: str) -> Question:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as exc:
        raise UsageError(f"{where}: no JSON ({exc.msg} at column {exc.colno})") from exc
    if not isinstance(row, dict):
        raise UsageError(f'{where}: a row is one JSON object, as in {{"prompt": "..."}}')
    name, worked = str(row.get("id", where)), None
    if "cot" in row:
        worked = _CALCULATION.sub("", _text(row, "cot", where))
    if "choices" in row:
        choices = _choices(row, where)
        listed = "\n".join(f"{label}. {text}" for label, text in choices)
        prompt = f"{_text(row, 'question', where)}\n{listed}"
        answer = _optional(row, "answerKey", where)
        if answer is not None and answer not in [label for label, _ in choices]:
            raise UsageError(f"{where}: `answerKey` {answer!r} is none of the labels")
        return Question(name, prompt, AnswerKind.CHOICE, answer, choices, worked, _CHOICE_FORM)
    if "problem" in row:
        solution = _optional(row, "solution", where)
        boxed = _BOXED.findall(solution or "")
        prompt = _text(row, "problem", where)
        return Question(
            name, prompt, AnswerKind.NUMBER, boxed[-1] if boxed else None, (), worked, _NUMBER_FORM
        )
    answer = _optional(row, "answer", where) or _optional(row, "answerKey", where)
    numeric = answer is not None and _NUMBER.fullmatch(answer.strip())
    kind = AnswerKind.NUMBER if numeric else AnswerKind.TEXT
    return Question(name, _text(row, "prompt", where), kind, answer, (), worked)


def _choices(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    try:
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        pairs = tuple((str(a), str(b)) for a, b in zip(labels, texts, strict=True))
    except (KeyError, TypeError, ValueError) as exc:
        raise UsageError(f"{where}: `choices` needs a `label` and a `text` of one length") from exc
    return pairs


def _optional(row: dict[str, Any], key: str, where: str) -> str | None:
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return None if value is None else _text(row, key, where)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: `{key}` must be a text that is not empty")
    return value
