"""A tuned small model's own answers, written in batches, and the share of them that is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mlxroute.engine import generate
from mlxroute.errors import UsageError
from mlxroute.routers import never_escalate
from mlxroute.small import SmallModel
from mlxroute.training.judged_questions import JudgedQuestion
from mlxroute.training.labels import decode_answer
from mlxroute.types import Message, Progress, no_progress

_LABEL: Final = "small model's answers"
# Rows of a batch.
_BATCH_ROWS: Final = 24


def measure_accuracy(
    small: SmallModel,
    questions: Sequence[JudgedQuestion],
    *,
    max_tokens: int,
    progress: Progress = no_progress,
) -> float:
    """Return the share of questions that the small model answers right, alone and greedily."""
    conversations = [item.conversation for item in questions]
    written = write_answers(small, conversations, max_tokens=max_tokens, progress=progress)
    right = sum(
        item.is_right(decode_answer(small, token_ids))
        for item, token_ids in zip(questions, written, strict=True)
    )
    return right / len(questions)


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
    router = never_escalate()
    answer = generate(small, None, conversation, router=router, max_tokens=max_tokens)
    ids = [token.token_id for token in answer]
    return [token_id for token_id in ids if token_id not in small.vocabulary.eos_ids]
