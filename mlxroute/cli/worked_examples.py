"""Questions of files as commands ask them: with worked examples before each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlxroute.cli.folders import expand_optional, find_bench_file
from mlxroute.cli.large_setup import check_sendable
from mlxroute.errors import ContextTooLong, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.config import Settings
    from mlxroute.questions.question_files import Question
    from mlxroute.small import SmallModel

DEFAULT_SHOTS = 4
# Right answers with so many words are mostly sentences.
_SENTENCE_WORDS = 5


def read_examples(
    file: Path | None, count: int | None, questions: list[Question]
) -> list[Question]:
    """Return the worked examples of a file, by default the built-in ones for such questions.

    Prints a note if the user wants a `count` and there are none. Raises UsageError if one of them
    is among the questions, whose answer it would give away.
    """
    from mlxroute.cli.terminal import make_consoles, print_note
    from mlxroute.questions.prompt_form import choose_examples_file
    from mlxroute.questions.question_files import read_worked_examples

    if file is None and (name := choose_examples_file(questions)) is not None:
        file = find_bench_file("questions", name)
    if file is None and count:
        print_note(
            make_consoles()[1],
            f"--shots {count} has no effect: there are no built-in worked examples for these"
            " questions; name some with --examples",
        )
    examples = read_worked_examples(file, DEFAULT_SHOTS if count is None else count)
    asked = {question.wording for question in questions}
    for example in examples:
        if example.wording in asked:
            raise UsageError(
                f"{file}: the worked example {example.name} is also one of the questions; choose"
                " examples from other questions with --examples, or none with --shots 0"
            )
    return examples


def note_sentences(questions: list[Question], err: Console) -> None:
    """Print a note if most right answers are sentences, which few texts repeat word for word."""
    from mlxroute.cli.terminal import print_note
    from mlxroute.questions.question_files import AnswerKind

    texts = [item.answer for item in questions if item.kind is AnswerKind.TEXT and item.answer]
    sentences = sum(len(answer.split()) >= _SENTENCE_WORDS for answer in texts)
    if 2 * sentences > len(texts):
        print_note(
            err,
            f"{sentences} of {len(texts)} right answers have {_SENTENCE_WORDS} words or more; a"
            " model's text is right only if it has the row's `answer` word for word, so shorten it"
            " to words that every right text has, or leave it out",
        )


def check_questions_sendable(
    settings: Settings, questions: list[Question], examples: list[Question], command: str
) -> None:
    """Raise UsageError, which names the question, if a never-send pattern matches one."""
    from mlxroute.questions.question_files import question_messages

    conversations = [(item.name, question_messages(item, examples)) for item in questions]
    check_sendable(settings, conversations, command)


def check_questions_fit(
    small: SmallModel, questions: list[Question], examples: list[Question]
) -> None:
    """Raise ContextTooLong, which names the question, if one does not fit in the context."""
    from mlxroute.engine.transcript import render_prompt
    from mlxroute.questions.question_files import question_messages

    for question in questions:
        try:
            render_prompt(small, question_messages(question, examples))
        except ContextTooLong as exc:
            raise ContextTooLong(f"question {question.name}: {exc}") from exc


def trained_questions(settings: Settings) -> frozenset[str]:
    """Return the fingerprints of the questions that the settings' adapter was trained with."""
    from mlxroute.backend.adapter_folder import read_trained_questions

    adapter = expand_optional(settings.adapter)
    return frozenset() if adapter is None else read_trained_questions(adapter)


def count_trained(settings: Settings, questions: list[Question]) -> int:
    """Return how many of the questions the adapter of the settings was trained with."""
    trained = trained_questions(settings)
    return sum(question.fingerprint in trained for question in questions)


def warn_of_trained_questions(settings: Settings, questions: list[Question], err: Console) -> None:
    """Print a warning if the adapter of the settings was trained with some of the questions."""
    from mlxroute.cli.terminal import WARNING_STYLE, print_note

    count = count_trained(settings, questions)
    if count:
        print_note(
            err,
            f"warning: the adapter was trained with {count} of these {len(questions)} questions, so"
            " its answers to them are better than to others; use other questions",
            style=WARNING_STYLE,
        )
