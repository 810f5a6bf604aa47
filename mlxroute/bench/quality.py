"""The accuracy of answers: by each model alone, and routed within budgets."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from mlxroute.bench.significance import mcnemar_p, wilson_interval
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.engine import generate
from mlxroute.engine.protocols import SmallProtocol
from mlxroute.questions.grading import grade
from mlxroute.questions.question_files import Question, question_messages
from mlxroute.recorded.large_answers import PlaceholderSmall
from mlxroute.recorded.replies import Replies
from mlxroute.recorded.row_file import append_records, read_records
from mlxroute.routers import Budget, Router, make_router
from mlxroute.serving.concurrent_answers import ConcurrentAnswers
from mlxroute.small import SmallModel
from mlxroute.types import Message, Mode, Progress, Source, no_progress
from mlxroute.types.limits import MAX_PREFETCH

BUDGETS: Final = (0.01, 0.03, 0.05, 0.07, 0.10, 0.15, 0.30)
# Names of the upper bounds that `oracles` adds to a report.
ORACLES: Final = ("disagreements", "critical_first")
_TIMEOUT_S: Final = 600.0
_TIMED_STEPS: Final = 5


@dataclass(frozen=True, slots=True)
class QualitySide:
    """One model alone (no `router`), or both with a router and a budget."""

    name: str
    router: str | None = None
    budget: float = 0.0

    @property
    def is_large(self) -> bool:
        """Whether the large model answers alone."""
        return self.name == LARGE.name


SMALL: Final = QualitySide("small")
LARGE: Final = QualitySide("large")


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One graded answer; the `scores` of its positions restore the budget's state after it."""

    question: str
    text: str
    strict: bool | None
    lenient: bool | None
    tokens: int
    escalated: int
    agreed: int
    unchecked: int
    calls: int
    uploaded_tokens: int
    seconds: float
    scores: tuple[float, ...]


class QualityResults:
    """A file of graded answers, from which an interrupted run continues."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = dict(read_records(path, _keyed_row))

    def find(self, key: str) -> QualityRow | None:
        """Return the answer saved under a key; None if there is none."""
        return self._rows.get(key)

    def add(self, key: str, row: QualityRow) -> None:
        """Save an answer."""
        self._rows[key] = row
        append_records(self._path, [{"key": key, "row": _row_to_json(row)}])


def _row_to_json(row: QualityRow) -> dict[str, Any]:
    """Return a row as in the file; the keys are part of the file format."""
    return {
        "question": row.question,
        "text": row.text,
        "strict": row.strict,
        "lenient": row.lenient,
        "tokens": row.tokens,
        "escalated": row.escalated,
        "agreed": row.agreed,
        "unchecked": row.unchecked,
        "calls": row.calls,
        "uploaded_tokens": row.uploaded_tokens,
        "seconds": row.seconds,
        "scores": row.scores,
    }


def _keyed_row(item: Any) -> tuple[str, QualityRow]:
    return str(item["key"]), _row_from_json(item["row"])


def _row_from_json(item: Mapping[str, Any]) -> QualityRow:
    return QualityRow(
        question=item["question"],
        text=item["text"],
        strict=item["strict"],
        lenient=item["lenient"],
        tokens=item["tokens"],
        escalated=item["escalated"],
        agreed=item["agreed"],
        unchecked=item["unchecked"],
        calls=item["calls"],
        uploaded_tokens=item["uploaded_tokens"],
        seconds=item["seconds"],
        scores=tuple(item["scores"]),
    )


def measure_step_s(small: SmallModel, question: Question) -> float:
    """Return the median seconds of a few decode steps after a question."""
    signals, _ = small.prefill(small.encode_conversation(question_messages(question)).ids)
    times_s = []
    for _ in range(_TIMED_STEPS):
        began_s = time.perf_counter()
        signals = small.step(signals.token_id)
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)


def make_sides(routers: Iterable[str], budgets: Iterable[float]) -> list[QualitySide]:
    """Return both models alone, and each router with each budget."""
    routed = [
        QualitySide(f"{router} {100 * budget:g}%", router, budget)
        for router in routers
        for budget in budgets
    ]
    return [SMALL, LARGE, *routed]


def bench_quality(  # noqa: PLR0913 - all of these are settings of one run
    small: SmallModel,
    replies: Replies,
    questions: Sequence[Question],
    *,
    sides: Sequence[QualitySide],
    examples: Sequence[Question],
    ranks: ScoreRanks,
    max_tokens: int,
    step_s: float,
    results: QualityResults,
    chats: int = 1,
    accept_within: float = 0.0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return the report of all sides on all questions; answers in `results` are not repeated.

    `chats` questions are answered at a time, by all sides, in one batch. Question i belongs to chat
    i modulo `chats`; within a chat, a budget carries over to the next question. The reported
    seconds are computed, as if each answer were written alone: `step_s` for each token plus the
    time of its calls, without the prompt.
    """
    bench = _QualityBench(
        small, replies, examples, ranks, max_tokens, step_s, results, accept_within
    )
    rows = bench.answer_all(questions, sides, chats, progress)
    return {
        "small": small.name,
        "large": replies.model_name,
        "questions": len(questions),
        "examples": len(examples),
        "tokens": max_tokens,
        "chats": chats,
        "accept_within": accept_within,
        "step_s": round(step_s, 5),
        "sides": {
            side.name: _side_figures(side, rows, chats, max_tokens=max_tokens) for side in sides
        },
    }


@dataclass(frozen=True, slots=True)
class _Task:
    """One question for one side; `key` is the key of the answer in the results."""

    side: QualitySide
    question: Question
    conversation: list[Message]
    router: Router
    key: str


@dataclass(frozen=True, slots=True)
class _QualityBench:
    """The settings that all answers of a run share."""

    small: SmallModel
    replies: Replies
    examples: Sequence[Question]
    ranks: ScoreRanks
    max_tokens: int
    step_s: float
    results: QualityResults
    accept_within: float

    def answer_all(
        self,
        questions: Sequence[Question],
        sides: Sequence[QualitySide],
        chats: int,
        progress: Progress,
    ) -> dict[str, list[QualityRow]]:
        """Let every side answer every question; return the answers by side, in question order."""
        routers = {(side, chat): self.new_router(side) for side in sides for chat in range(chats)}
        rows: dict[str, list[QualityRow]] = {side.name: [] for side in sides}
        progress("questions", 0, len(questions))
        for begin in range(0, len(questions), chats):
            group = questions[begin : begin + chats]
            tasks = [
                self.new_task(side, question, routers[side, chat])
                for chat, question in enumerate(group)
                for side in sides
            ]
            for task, row in zip(tasks, self.answer(tasks), strict=True):
                rows[task.side.name].append(row)
            progress("questions", begin + len(group), len(questions))
        return rows

    def new_router(self, side: QualitySide) -> Router:
        """Return a side's router in its state before the first question."""
        if side.router is None:
            return make_router("entropy", threshold=-math.inf if side.is_large else math.inf)
        return make_router(side.router, budget=side.budget, quantiles=self.ranks[side.router])

    def new_task(self, side: QualitySide, question: Question, router: Router) -> _Task:
        """Return the task of answering a question with the router in its present state."""
        conversation = question_messages(question, self.examples)
        key = self._key(side, conversation, router)
        return _Task(side, question, conversation, router, key)

    def answer(self, tasks: Sequence[_Task]) -> list[QualityRow]:
        """Return the answers, saved or new, and bring the routers to their states after them."""
        jobs = [
            (task.conversation, partial(self._write_answer, task))
            for task in tasks
            if self.results.find(task.key) is None
        ]
        answers = ConcurrentAnswers(self.small, on_abort=self.replies.close)
        new_rows = iter(answers.run(jobs) if jobs else [])
        rows = []
        for task in tasks:
            row = self.results.find(task.key)
            if row is None:
                row = next(new_rows)
                self.results.add(task.key, row)
            else:
                for score in row.scores:
                    _, task.router.state = task.router.state.decide(score)
            rows.append(row)
        return rows

    def _key(self, side: QualitySide, conversation: Sequence[Message], router: Router) -> str:
        """Return the key of an answer: a hash of all that it depends on."""
        models = [self.small.name, self.replies.model_name]
        ranks = self.ranks[side.router] if side.router else ()
        # The answer of one model alone does not depend on its router's state.
        state = _budget_text(router) if side.router else ""
        parts: list[object] = [
            *models,
            side.router,
            side.is_large,
            self.max_tokens,
            ranks,
            conversation,
            state,
        ]
        if side.router and self.accept_within:
            parts.append(self.accept_within)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _write_answer(self, task: _Task, small: SmallProtocol) -> QualityRow:
        """Write and grade one answer."""
        side = task.side
        large = self.replies.new_view()
        answer = generate(
            PlaceholderSmall(self.small) if side.is_large else small,
            None if side is SMALL else large,
            task.conversation,
            router=task.router,
            max_tokens=self.max_tokens,
            timeout_s=_TIMEOUT_S,
            strict=True,
            mode=Mode.WAIT,
            # All positions are escalated, so a call returns many tokens that are used.
            prefetch=MAX_PREFETCH if side.is_large else 0,
            accept_within=self.accept_within if side.router else 0.0,
        )
        tokens = list(answer)
        # A token of the large model with several ids is one position.
        scores = [
            token.score for token in tokens if token.source is Source.SMALL or token.escalation
        ]
        stats = answer.stats()
        grades = grade(task.question, stats.text)
        small_tokens = 0 if side.is_large else stats.tokens
        return QualityRow(
            question=task.question.name,
            text=stats.text,
            strict=grades.strict,
            lenient=grades.lenient,
            tokens=stats.tokens,
            escalated=stats.escalated,
            agreed=stats.agreed,
            unchecked=stats.unchecked,
            calls=stats.calls,
            uploaded_tokens=stats.uploaded_tokens,
            seconds=round(large.calls_s + small_tokens * self.step_s, 3),
            scores=() if side.is_large else tuple(scores),
        )


def _budget_text(router: Router) -> str:
    """Return a budget's state as text; the keys of saved answers depend on its exact form."""
    state = router.state
    assert isinstance(state, Budget)
    return (
        f"Budget(rate={state.rate!r}, resolution={state.resolution!r}, rank={state.rank!r},"
        f" purse={state.bucket!r}, recent={state.recent!r}, ordered={state.ordered!r},"
        f" seen={state.positions!r})"
    )


def _side_figures(
    side: QualitySide, rows: Mapping[str, Sequence[QualityRow]], chats: int, *, max_tokens: int
) -> dict[str, Any]:
    """Return the report of one side."""
    own_rows, small_rows = rows[side.name], rows[SMALL.name]
    tokens = sum(row.tokens for row in own_rows)
    escalated = sum(row.escalated for row in own_rows)
    agreed = sum(row.agreed for row in own_rows)
    seconds = [row.seconds for row in own_rows]
    return {
        "router": side.router,
        "budget": side.budget if side.router else None,
        "strict": _accuracy([r.strict for r in own_rows], [r.strict for r in small_rows]),
        "lenient": _accuracy([r.lenient for r in own_rows], [r.lenient for r in small_rows]),
        "escalation_rate": round(escalated / tokens, 5) if tokens else 0.0,
        "agreement": round(agreed / escalated, 4) if escalated and side.router else None,
        "most_over_budget": _max_excess(own_rows, side.budget, chats) if side.router else None,
        "tokens": tokens,
        "reached_limit": sum(row.tokens >= max_tokens for row in own_rows),
        "calls": sum(row.calls for row in own_rows),
        "uploaded_tokens": sum(row.uploaded_tokens for row in own_rows),
        "seconds_median": round(statistics.median(seconds), 3) if seconds else 0,
    }


def _max_excess(rows: Sequence[QualityRow], budget: float, chats: int) -> float:
    """Return the greatest excess of escalations over the budget in consecutive answers of a chat.

    This is a maximum-subarray sum (Kadane's algorithm). The token bucket bounds it by its burst.
    """
    largest = 0.0
    for chat in range(chats):
        excess = 0.0
        for row in rows[chat::chats]:
            excess = max(0.0, excess) + row.escalated - budget * row.tokens
            largest = max(largest, excess)
    return round(largest, 3)


def _accuracy(marks: Sequence[bool | None], small_marks: Sequence[bool | None]) -> dict[str, Any]:
    """Return the share of right answers and its comparison with the small model alone.

    A text without an answer (None) counts as wrong and is counted in `no_answer`.
    """
    right, count = sum(mark is True for mark in marks), len(marks)
    small_right = sum(mark is True for mark in small_marks)
    low, high = wilson_interval(right, count)
    pairs = [(own is True, small is True) for own, small in zip(marks, small_marks, strict=True)]
    p_value = mcnemar_p(pairs.count((True, False)), pairs.count((False, True)))
    return {
        "accuracy": round(right / count, 4),
        "interval": [round(low, 4), round(high, 4)],
        "no_answer": sum(mark is None for mark in marks),
        "over_small": round(right / small_right, 3) if small_right else None,
        "p_against_small": float(f"{p_value:.3g}"),
    }
