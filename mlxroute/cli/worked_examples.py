"""The worked examples that precede the questions of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.folders import find_bench_file

if TYPE_CHECKING:
    from mlxroute.questions.question_files import Question


def read_examples(file: Path | None, count: int, questions: list[Question]) -> list[Question]:
    """Return the worked examples of a file, by default the built-in ones for such questions."""
    from mlxroute.questions.prompt_form import choose_examples_file
    from mlxroute.questions.question_files import read_worked_examples

    if file is None and (name := choose_examples_file(questions)) is not None:
        file = find_bench_file("questions", name)
    return read_worked_examples(file, count)
