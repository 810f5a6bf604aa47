"""Questions of files as commands ask them: with worked examples before each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.folders import find_bench_file
from mlxroute.cli.large_setup import check_sendable

if TYPE_CHECKING:
    from mlxroute.config import Settings
    from mlxroute.questions.question_files import Question


def read_examples(file: Path | None, count: int, questions: list[Question]) -> list[Question]:
    """Return the worked examples of a file, by default the built-in ones for such questions."""
    from mlxroute.questions.prompt_form import choose_examples_file
    from mlxroute.questions.question_files import read_worked_examples

    if file is None and (name := choose_examples_file(questions)) is not None:
        file = find_bench_file("questions", name)
    return read_worked_examples(file, count)


def check_questions_sendable(
    settings: Settings, questions: list[Question], examples: list[Question], command: str
) -> None:
    """Raise UsageError, with its name, for a question that a never-send pattern matches."""
    from mlxroute.questions.question_files import question_messages

    conversations = {item.name: question_messages(item, examples) for item in questions}
    check_sendable(settings, conversations, command)
