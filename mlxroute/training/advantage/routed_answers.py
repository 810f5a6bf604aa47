"""Answers that both models write together, several at a time, and how many of them are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.engine import generate
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.routers import Router, make_router
from mlxroute.sequences import chunks
from mlxroute.serving.concurrent_answers import ConcurrentAnswers, SharedSmallClient
from mlxroute.small import SmallModel
from mlxroute.training.judged_questions import JudgedQuestion
from mlxroute.types import Message, Mode, Progress

CHATS: Final = 8
"""Number of answers that are written at a time."""


@dataclass(frozen=True, slots=True)
class BudgetedRouter:
    """A router within a budget, in its first state.

    Args:
        name: Name of the score.
        budget: Maximum share of escalated tokens, from 0 to 1.
        quantiles: Scores at evenly spaced ranks, from which the budget starts.
        head: A fingerprint of the head whose score it is; empty (default) for other scores.
    """

    name: str
    budget: float
    quantiles: tuple[float, ...]
    head: str = ""

    @classmethod
    def entropy(cls, ranks: ScoreRanks, budget: float) -> BudgetedRouter:
        """Return the router by entropy; `ranks` are the small model's calibrated scores."""
        return cls("entropy", budget, ranks["entropy"])

    def start(self) -> Router:
        """Return a router in its first state."""
        return make_router(self.name, budget=self.budget, quantiles=self.quantiles)


@dataclass(frozen=True, slots=True)
class RoutedAnswer:
    """An answer of both models.

    Args:
        token_ids: Its tokens, without the end token.
        is_whole: Whether an end token followed.
        text: Its text.
        large_tokens: Number of escalated positions.
    """

    token_ids: tuple[int, ...]
    is_whole: bool
    text: str
    large_tokens: int


def write_routed_answers(
    small: SmallModel,
    large: RecordingLarge,
    conversations: Sequence[Sequence[Message]],
    routers: Sequence[Router],
    *,
    max_tokens: int,
) -> list[RoutedAnswer]:
    """Return answers to the conversations, all written at once, each with a router of its own.

    Raises LargeError if the large model fails.
    """
    jobs = [
        (conversation, partial(_write, large, conversation, router, max_tokens))
        for conversation, router in zip(conversations, routers, strict=True)
    ]
    return ConcurrentAnswers(small, on_abort=large.close).run(jobs)


def _write(
    large: RecordingLarge,
    conversation: Sequence[Message],
    router: Router,
    max_tokens: int,
    small: SharedSmallClient,
) -> RoutedAnswer:
    answer = generate(
        small,
        large.new_view(blocked=small.blocked),
        conversation,
        router=router,
        max_tokens=max_tokens,
        timeout_s=large.timeout_s,
        strict=True,
        mode=Mode.WAIT,
        prefetch=0,
    )
    token_ids = [token.token_id for token in answer]
    is_whole = bool(token_ids) and token_ids[-1] in small.vocabulary.eos_ids
    stats = answer.stats()
    return RoutedAnswer(
        tuple(token_ids[:-1] if is_whole else token_ids), is_whole, stats.text, stats.escalated
    )


@dataclass(frozen=True, slots=True)
class RoutedFigures:
    """Which answers of a router are right, and what they cost.

    Args:
        is_right: Whether each answer is right.
        tokens: Number of their tokens.
        large_tokens: Number of escalated positions.
    """

    is_right: tuple[bool, ...]
    tokens: int
    large_tokens: int

    @property
    def right(self) -> int:
        """The number of right answers."""
        return sum(self.is_right)


def measure_routed_accuracy(
    small: SmallModel,
    large: RecordingLarge,
    questions: Sequence[JudgedQuestion],
    router: BudgetedRouter,
    *,
    max_tokens: int,
    label: str,
    progress: Progress,
) -> RoutedFigures:
    """Return the figures of a router's answers to the questions.

    Eight questions are answered at a time, each in a chat of its own; within a chat, the budget
    carries over to the next question, as in `bench quality`. `label` names the router in
    `progress`. Raises LargeError if the large model fails.
    """
    routers = [router.start() for _ in range(CHATS)]
    answers: list[RoutedAnswer] = []
    progress(label, 0, len(questions))
    for group in chunks(questions, CHATS):
        answers += write_routed_answers(
            small,
            large,
            [item.conversation for item in group],
            routers[: len(group)],
            max_tokens=max_tokens,
        )
        progress(label, len(answers), len(questions))
    return RoutedFigures(
        tuple(item.is_right(answer.text) for item, answer in zip(questions, answers, strict=True)),
        sum(len(answer.token_ids) + answer.is_whole for answer in answers),
        sum(answer.large_tokens for answer in answers),
    )
