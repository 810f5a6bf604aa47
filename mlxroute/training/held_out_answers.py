"""Judging a tuned small model by its own answers to questions that it was not tuned on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.engine import generate
from mlxroute.errors import UsageError
from mlxroute.questions.grading import extract_answer, grade
from mlxroute.questions.question_files import Question
from mlxroute.routers import make_router
from mlxroute.small import SmallModel
from mlxroute.training.labels import decode_answer
from mlxroute.types import Message

# Rows of a batch.
_BATCH_ROWS: Final = 24


@dataclass(frozen=True, slots=True)
class HeldOutAnswer:
    """A question, the conversation that asks it, and the text of the large model's answer."""

    question: Question
    conversation: Sequence[Message]
    large_text: str


def judged_by_gold(answers: Sequence[HeldOutAnswer]) -> bool:
    """Return whether all questions have a right answer to compare with."""
    return all(answer.question.answer is not None for answer in answers)


def measure_accuracy(
    small: SmallModel, answers: Sequence[HeldOutAnswer], *, max_tokens: int
) -> float:
    """Return the share of questions that the small model answers right, alone and greedily.

    Right is the file's answer if all questions have one, else the outcome of the large model's.
    """
    by_gold = judged_by_gold(answers)
    # The KV cache may hold what the model computed with earlier weights.
    small = small.with_own_cache()
    right = 0
    for begin in range(0, len(answers), _BATCH_ROWS):
        group = answers[begin : begin + _BATCH_ROWS]
        for answer, text in zip(group, _write_texts(small, group, max_tokens), strict=True):
            question = answer.question
            if by_gold:
                right += grade(question, text).lenient is True
            else:
                outcome = extract_answer(question, answer.large_text)
                right += extract_answer(question, text) == outcome
    return right / len(answers)


def standard_error(share: float, count: int) -> float:
    """Return the standard error of a share that was measured on `count` questions.

    One right and one wrong answer more keep it above 0 for shares of 0 and 1.
    """
    share = (share * count + 1) / (count + 2)
    return math.sqrt(share * (1 - share) / count)


def write_answers(
    small: SmallModel, conversations: Sequence[Sequence[Message]], *, max_tokens: int
) -> list[list[int]]:
    """Return the small model's greedy answers, written as one batch, without end tokens.

    Raises UsageError for an architecture whose KV cache cannot be batched.
    """
    starts = []
    limits = []
    for conversation in conversations:
        signals, copy = small.prefill_copy(small.encode_conversation(conversation).ids)
        starts.append((copy, signals.token_id))
        limits.append(0 if signals.token_id in small.vocabulary.eos_ids else max_tokens - 1)
    tails = small.continue_greedily(starts, max_tokens=limits)
    return [
        [] if first in small.vocabulary.eos_ids else [first, *tail]
        for (_, first), tail in zip(starts, tails, strict=True)
    ]


def _write_texts(small: SmallModel, answers: Sequence[HeldOutAnswer], max_tokens: int) -> list[str]:
    conversations = [answer.conversation for answer in answers]
    try:
        written = write_answers(small, conversations, max_tokens=max_tokens)
    except UsageError:
        router = make_router("entropy", threshold=math.inf)
        answers_alone = (
            generate(small, None, conversation, router=router, max_tokens=max_tokens)
            for conversation in conversations
        )
        return ["".join(token.text for token in answer) for answer in answers_alone]
    return [decode_answer(small, token_ids) for token_ids in written]
