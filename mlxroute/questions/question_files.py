r"""Question files: JSON Lines, one question per row, which ends at `\n`.

A row has one of four forms:
- `prompt`, and optionally `answer` or `answerKey`;
- `question` and `choices`, and optionally `answerKey`, as in CommonsenseQA;
- `problem`, and optionally `solution` with a boxed number, as in GSM8K, or a number as `answer`;
- `prompt`, `entry_point` and `test`, the start of a function to complete, as in HumanEval.
`id` is optional, and so is `cot`, a complete answer that can serve as a worked example.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import random
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any

from mlxroute.errors import UsageError
from mlxroute.questions.answer_patterns import find_boxes, is_boxed_number, is_number
from mlxroute.types import Message
from mlxroute.untrusted_text import MalformedText, TextFile, parse_json

# An instruction, because small models copy a template (`[Explanation]. ...`) literally.
_CHOICE_INSTRUCTION = (
    "Explain in one sentence, then end with: Therefore, the answer is <choice> (<label>)."
)
_CODE_INSTRUCTION = "Answer with the whole function in one Python code block."
_NUMBER_INSTRUCTION = "Solve the problem step by step and give the final answer as \\boxed{number}."
# GSM8K's worked answers carry calculator marks such as <<2*3=6>>, which no model writes.
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
# GSM8K's published answers give the number after it.
_GSM8K_MARK = "####"
# What answers are searched for.
_LABEL = re.compile(r"[A-Za-z]|\d+")
_NAMES_CHECK = re.compile(r"\bcheck\b")
_MAX_FILE_BYTES = 256 * 2**20
# One in five is held out, and a head or an adapter learns from the others.
MIN_TRAINING_QUESTIONS = 10


class AnswerKind(StrEnum):
    """How answers to a question are compared."""

    CHOICE = "choice"
    NUMBER = "number"
    TEXT = "text"
    CODE = "code"


@dataclass(frozen=True, slots=True)
class FunctionTask:
    """A Python function to complete.

    Args:
        name: The name of the function.
        start: The program up to the body of the function: imports, helpers, signature, docstring.
        test: A program that defines `check(function)`, which raises if the function is wrong.
    """

    name: str
    start: str
    test: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question for a model, with its correct answer if the file has one.

    Args:
        name: The row's `id`; without one, its file and row number.
        prompt: Text of the user message.
        kind: How answers are compared. TEXT by default.
        answer: The correct answer, for CHOICE its label. None (default) if it is not known.
        choices: (label, text) pairs of a CHOICE question. Empty by default.
        worked_answer: A complete answer, with its reasoning. None (default) if there is none.
        instruction: Text that asks for an answer in a form that can be parsed. Empty by default.
        function: What a CODE question asks for. None (default) for other kinds.
    """

    name: str
    prompt: str
    kind: AnswerKind = AnswerKind.TEXT
    answer: str | None = None
    choices: tuple[tuple[str, str], ...] = ()
    worked_answer: str | None = None
    instruction: str = ""
    function: FunctionTask | None = None

    @property
    def fingerprint(self) -> str:
        """A hash that identifies the prompt without revealing it: 16 hexadecimal digits."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]

    @property
    def wording(self) -> str:
        """The prompt with single spaces: the same for prompts that differ in white space only."""
        return " ".join(self.prompt.split())


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file in order, ignoring blank lines.

    Raises UsageError, naming the file and the row, if one cannot be used or the file has none.
    """
    file = TextFile(path, "the question file", max_bytes=_MAX_FILE_BYTES)
    questions = [
        _parse_row(text, where=f"{path}, row {number}")
        for number, text in file.rows()
        if text.strip()
    ]
    if not questions:
        raise UsageError(f"the question file {path} has no questions")
    return questions


def sample_questions(questions: Sequence[Question], count: int) -> list[Question]:
    """Return a random sample of at most `count` questions; a prompt that occurs again is left out.

    The shuffle has a fixed seed, so a smaller sample is the start of a larger one.
    """
    return _drop_repeated(random.Random(0).sample(questions, len(questions)))[:count]


def _drop_repeated(questions: Sequence[Question]) -> list[Question]:
    unique: dict[str, Question] = {}
    for question in questions:
        unique.setdefault(question.wording, question)
    return list(unique.values())


def sample_files(files: Sequence[Path], count: int, *, at_least: int = 1) -> list[Question]:
    """Return a random sample of at most `count` questions of each file, in the files' order.

    A prompt that occurs again, in the same file or another one, is left out, also if its white
    space differs. Raises UsageError as `read_questions`, and for fewer than `at_least` (1)
    questions in all.
    """
    samples = [sample_questions(read_questions(file), count) for file in files]
    sampled = _drop_repeated([question for sample in samples for question in sample])
    if len(sampled) < at_least:
        names = ", ".join(map(str, files))
        raise UsageError(
            f"at least {at_least} different questions are needed, and {names} gave {len(sampled)};"
            " give more files, or take more questions of each",
            parameter="questions",
        )
    return sampled


def read_worked_examples(path: Path | None, count: int) -> list[Question]:
    """Return the first `count` questions of a file that have a worked answer.

    Return none if `path` is None. Raises UsageError if the file has fewer.
    """
    if path is None:
        return []
    questions = read_questions(path)
    examples = [question for question in questions if question.worked_answer is not None][:count]
    if len(examples) < count:
        raise UsageError(
            f"{path} has too few rows with a `cot`: {len(examples)} of the {count} needed"
        )
    return examples


def hash_examples(examples: Sequence[Question]) -> str:
    """Return the SHA-256 of what worked examples say, in hexadecimal."""
    texts = [[item.prompt, item.worked_answer] for item in examples]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def question_messages(question: Question, examples: Sequence[Question] = ()) -> list[Message]:
    """Return the chat messages that ask a question.

    Worked examples become earlier turns, after the question's instruction as system message.
    Without any, the instruction follows the prompt.
    """
    messages: list[Message] = []
    if question.instruction and examples:
        messages.append({"role": "system", "content": question.instruction})
    for example in examples:
        messages.append({"role": "user", "content": example.prompt})
        messages.append({"role": "assistant", "content": example.worked_answer or ""})
    prompt = question.prompt
    if question.instruction and not examples:
        prompt = f"{prompt}\n\n{question.instruction}"
    return [*messages, {"role": "user", "content": prompt}]


def _parse_row(line: str, *, where: str) -> Question:
    try:
        row = parse_json(line)
    except MalformedText as exc:
        raise UsageError(f"{where}: {exc}") from exc
    if not isinstance(row, dict):
        raise UsageError(f'{where}: a row must be a JSON object, such as {{"prompt": "..."}}')
    # Tables written as JSON Lines have null for a column that a row lacks.
    row = {key: value for key, value in row.items() if value is not None}
    row_id = _optional_text(row, "id", where) or _optional_text(row, "task_id", where)
    name, worked_answer = row_id or where, None
    if "cot" in row:
        worked_answer = _CALCULATOR_MARK.sub("", _required_text(row, "cot", where))
    if "choices" in row:
        return _choice_question(row, name, worked_answer, where)
    if "problem" in row:
        return Question(
            name,
            _required_text(row, "problem", where),
            AnswerKind.NUMBER,
            _boxed_answer(row, where) or _number_answer(row, where),
            worked_answer=worked_answer,
            instruction=_NUMBER_INSTRUCTION,
        )
    if "entry_point" in row:
        return _code_question(row, name, worked_answer, where)
    if "prompt" not in row:
        raise UsageError(f"{where}: {_missing_prompt(row)}")
    answer = _optional_text(row, "answer", where) or _optional_text(row, "answerKey", where)
    kind = AnswerKind.NUMBER if answer is not None and is_number(answer) else AnswerKind.TEXT
    prompt = _required_text(row, "prompt", where)
    return Question(name, prompt, kind, answer, worked_answer=worked_answer)


def _missing_prompt(row: dict[str, Any]) -> str:
    """Return what is wrong with a row of no known form."""
    if "question" in row and _GSM8K_MARK in str(row.get("answer")):
        return (
            "this is GSM8K as published; convert the file with"
            " `python bench/question_sets.py gsm8k NEW --source FILE`"
        )
    return "a row needs `prompt`, `problem`, or `question` and `choices`"


def _boxed_answer(row: dict[str, Any], where: str) -> str | None:
    """Return the content of the last box of a row's solution; None without a box."""
    boxes = list(find_boxes(_optional_text(row, "solution", where) or ""))
    if not boxes:
        return None
    if not is_boxed_number(boxes[-1]):
        raise UsageError(
            f"{where}: `solution` must box a number, such as \\boxed{{12}}, and not {boxes[-1]!r}"
        )
    return boxes[-1]


def _number_answer(row: dict[str, Any], where: str) -> str | None:
    """Return the `answer` of a row, which must be a number; None without one."""
    answer = _optional_text(row, "answer", where)
    if answer is not None and not is_number(answer):
        raise UsageError(f"{where}: `answer` to a `problem` must be a number, and not {answer!r}")
    return answer


def _choice_question(
    row: dict[str, Any], name: str, worked_answer: str | None, where: str
) -> Question:
    choices = _choices(row, where)
    listing = "\n".join(f"{label}. {text}" for label, text in choices)
    prompt = f"{_required_text(row, 'question', where)}\n{listing}"
    answer = _optional_text(row, "answerKey", where)
    labels = [label for label, _ in choices]
    if answer is not None and answer not in labels:
        raise UsageError(
            f"{where}: `answerKey` {answer!r} is not one of the labels {', '.join(labels)}"
        )
    return Question(
        name, prompt, AnswerKind.CHOICE, answer, choices, worked_answer, _CHOICE_INSTRUCTION
    )


def _code_question(
    row: dict[str, Any], name: str, worked_answer: str | None, where: str
) -> Question:
    start = _required_text(row, "prompt", where)
    function = FunctionTask(
        _required_text(row, "entry_point", where), start, _required_text(row, "test", where)
    )
    if f"def {function.name}(" not in start:
        raise UsageError(f"{where}: `prompt` must hold the start of `def {function.name}(`")
    _require_test(function.test, where)
    prompt = f"Complete this function:\n```python\n{start.strip()}\n```"
    return Question(
        name,
        prompt,
        AnswerKind.CODE,
        function.test,
        worked_answer=worked_answer,
        instruction=_CODE_INSTRUCTION,
        function=function,
    )


def _require_test(test: str, where: str) -> None:
    """Raise UsageError for tests with which no answer could be right."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(test)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        reason = f"{exc.msg}, line {exc.lineno}" if isinstance(exc, SyntaxError) else str(exc)
        raise UsageError(f"{where}: `test` is not a Python program ({reason})") from exc
    if not _NAMES_CHECK.search(test):
        raise UsageError(f"{where}: `test` must define `check`, which is called with the function")


def _choices(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """Return the (label, text) pairs of a row."""
    choices = row["choices"] if isinstance(row["choices"], dict) else {}
    label_list, text_list = choices.get("label"), choices.get("text")
    if not (isinstance(label_list, list) and isinstance(text_list, list)) or not label_list:
        raise UsageError(f"{where}: `choices` needs a `label` list and a `text` list, not empty")
    labels, texts = [_text_of(item) for item in label_list], [_text_of(item) for item in text_list]
    if len(labels) != len(texts):
        raise UsageError(f"{where}: `choices` needs as many items in `label` as in `text`")
    pairs = tuple((a, b) for a, b in zip(labels, texts, strict=True) if a and b)
    if len(pairs) < len(labels):
        raise UsageError(
            f"{where}: `choices` needs non-empty strings or finite numbers in `label` and `text`"
        )
    if odd := next((label for label, _ in pairs if not _LABEL.fullmatch(label)), None):
        raise UsageError(f"{where}: a `label` must be a letter or a whole number, and not {odd!r}")
    # Answers name labels in either case.
    if len({label.upper() for label, _ in pairs}) < len(pairs):
        raise UsageError(f"{where}: `choices` needs a different `label` for each choice")
    return pairs


def _optional_text(row: dict[str, Any], key: str, where: str) -> str | None:
    """Return a text or number of the row as text; None if the key is absent or null."""
    value = row.get(key)
    if value is None:
        return None
    text = _text_of(value)
    if text is None:
        raise UsageError(f"{where}: `{key}` must be a non-empty string or a finite number")
    return text


def _text_of(value: object) -> str | None:
    """Return a non-empty text as it is and a finite number as text; None for any other value."""
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # An integer is finite, and may be too long for a float.
    if isinstance(value, int):
        return str(value)
    # Not 1e-05, which no number in an answer looks like.
    return format(Decimal(repr(value)), "f") if math.isfinite(value) else None


def _required_text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: `{key}` must be a non-empty string")
    return value
