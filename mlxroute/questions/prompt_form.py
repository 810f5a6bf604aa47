"""The form in which questions are asked: after worked examples, or with an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mlxroute.questions.question_files import AnswerKind, Question

_EXAMPLES_FILES: Final = {
    AnswerKind.CHOICE: "choice_examples.jsonl",
    AnswerKind.NUMBER: "number_examples.jsonl",
}


def choose_examples_file(questions: Sequence[Question]) -> str | None:
    """Return the name of the built-in worked examples for these questions; None for none.

    There are some for questions with choices and for problems with a boxed number, because models
    follow the form of an example more often than an instruction. All questions must be of one kind.
    """
    kinds = {question.kind if question.instruction else None for question in questions}
    kind = kinds.pop()
    return None if kinds or kind is None else _EXAMPLES_FILES.get(kind)


def describe_form(questions: Sequence[Question], examples: Sequence[Question]) -> str:
    """Return in words how the questions are asked."""
    instructions = dict.fromkeys(question.instruction for question in questions)
    form = " / ".join(
        f"instruction: {text}" if text else "the prompt alone" for text in instructions
    )
    if examples:
        form += (
            f"; after {len(examples)} worked examples as earlier turns, such as:"
            f" {examples[0].worked_answer}"
        )
    return form
