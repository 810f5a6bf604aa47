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
from mlxroute.types import Message, Progress, no_progress

_LABEL: Final = "small model's answers"
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
    small: SmallModel,
    answers: Sequence[HeldOutAnswer],
    *,
    max_tokens: int,
    progress: Progress = no_progress,
) -> float:
    """Return the share of questions that the small model answers right, alone and greedily.

    Right is the file's answer if all questions have one, else the outcome of the large model's.
    """
    by_gold = judged_by_gold(answers)
    right = 0
    conversations = [answer.conversation for answer in answers]
    written = write_answers(small, conversations, max_tokens=max_tokens, progress=progress)
    for answer, token_ids in zip(answers, written, strict=True):
        text, question = decode_answer(small, token_ids), answer.question
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
    small: SmallModel,
    conversations: Sequence[Sequence[Message]],
    *,
    max_tokens: int,
    progress: Progress = no_progress,
) -> list[list[int]]:
    """Return the small model's greedy answers, written in batches, without end tokens."""
    # The KV cache may hold what the model computed with earlier weights.
    small = small.with_own_cache()
    written: list[list[int]] = []
    for begin in range(0, len(conversations), _BATCH_ROWS):
        progress(_LABEL, begin, len(conversations))
        group = conversations[begin : begin + _BATCH_ROWS]
        try:
            written += _write_batch(small, group, max_tokens)
        except UsageError:
            # The architecture's KV cache cannot be batched.
            written += [_write_alone(small, conversation, max_tokens) for conversation in group]
    progress(_LABEL, len(written), len(conversations))
    return written


def _write_batch(
    small: SmallModel, conversations: Sequence[Sequence[Message]], max_tokens: int
) -> list[list[int]]:
    eos_ids = small.vocabulary.eos_ids
    starts = []
    for conversation in conversations:
        signals, copy = small.prefill_copy(small.encode_conversation(conversation).ids)
        starts.append((copy, signals.token_id))
    limits = [0 if first in eos_ids else max_tokens - 1 for _, first in starts]
    tails = small.continue_greedily(starts, max_tokens=limits)
    return [
        [] if first in eos_ids else [first, *tail]
        for (_, first), tail in zip(starts, tails, strict=True)
    ]


def _write_alone(small: SmallModel, conversation: Sequence[Message], max_tokens: int) -> list[int]:
    router = make_router("entropy", threshold=math.inf)
    answer = generate(small, None, conversation, router=router, max_tokens=max_tokens)
    ids = [token.token_id for token in answer]
    return [token_id for token_id in ids if token_id not in small.vocabulary.eos_ids]
