"""Questions with the answers that texts are judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlxroute.errors import UsageError
from mlxroute.questions.grading import extract_answer, grade, is_outcome_known
from mlxroute.questions.question_files import AnswerKind, Question, question_messages
from mlxroute.recorded.large_answers import LargeAnswer, write_large_answers
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.small import SmallModel
from mlxroute.training.labels import decode_answer
from mlxroute.training.tuning_types import WorkedAnswer
from mlxroute.types import Message


@dataclass(frozen=True, slots=True)
class JudgedQuestion:
    """A question, the conversation that asks it, and what is right.

    Args:
        question: The question.
        conversation: The messages that ask it.
        large_outcome: The outcome of the large model's own answer, if that is right; None (default)
            where the row's answer is.
    """

    question: Question
    conversation: Sequence[Message]
    large_outcome: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether anything is right; without an outcome of the large model nothing is."""
        return self.large_outcome != ""

    @property
    def reference(self) -> str:
        """What is right, as text: the row's answer or the outcome of the large model's."""
        return str(self.question.answer if self.large_outcome is None else self.large_outcome)

    def is_right(self, text: str) -> bool:
        """Return whether an answer's text is right."""
        if self.large_outcome is None:
            return grade(self.question, text).lenient is True
        return extract_answer(self.question, text) == self.large_outcome


def judge_questions(
    small: SmallModel,
    large: RecordingLarge,
    questions: Sequence[Question],
    *,
    examples: Sequence[Question],
    max_tokens: int,
    at_once: int,
    on_answers: Callable[[Sequence[LargeAnswer]], None] = lambda answers: None,
) -> list[JudgedQuestion]:
    """Return the questions with what is right; the large model answers those without an answer.

    Those to which its text gives no final answer either are left out. `examples` are worked
    examples that precede each question. `on_answers`, which does nothing by default, is called with
    the large model's answers. Raises LargeError if the large model fails.
    """
    judged = {
        number: JudgedQuestion(question, question_messages(question, examples))
        for number, question in enumerate(questions)
    }
    open_numbers = [number for number, item in judged.items() if item.question.answer is None]
    answers = write_large_answers(
        small,
        large,
        [judged[number].conversation for number in open_numbers],
        max_tokens=max_tokens,
        at_once=at_once,
        on_answer=lambda: None,
    )
    on_answers(answers)
    for number, answer in zip(open_numbers, answers, strict=True):
        item = judged[number]
        outcome = _find_outcome(small, item.question, answer)
        judged[number] = JudgedQuestion(item.question, item.conversation, outcome)
    return [item for item in judged.values() if item.is_known]


def judge_answers(
    small: SmallModel, answers: Sequence[WorkedAnswer], *, by_rows: bool
) -> list[JudgedQuestion]:
    """Return the questions of answers with what is right: by their rows, or the answers' outcomes.

    Those without a final outcome are left out. Raises UsageError if there are no others.
    """
    if by_rows:
        return [JudgedQuestion(item.question, item.conversation) for item in answers]
    judged = [
        JudgedQuestion(
            item.question, item.conversation, _find_outcome(small, item.question, item.answer)
        )
        for item in answers
    ]
    known = [item for item in judged if item.is_known]
    if not known:
        raise UsageError(
            f"the large model's texts give no final answer to the {len(answers)} held-out"
            " questions, so the small model cannot be judged; give right answers, or let answers be"
            " longer",
            parameter="tokens",
        )
    return known


def _find_outcome(small: SmallModel, question: Question, answer: LargeAnswer) -> str:
    """Return the outcome of the large model's answer; empty if it has none that is final."""
    text = decode_answer(small, answer.token_ids)
    outcome = extract_answer(question, text)
    # Words are compared as a whole, and the small model's answer is cut off at the same length.
    if question.kind is AnswerKind.TEXT or answer.is_whole(small.vocabulary.eos_ids):
        return outcome
    return outcome if is_outcome_known(question, text) else ""
