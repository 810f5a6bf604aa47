"""How good answers are: the small model alone, the large one alone, and routed within budgets."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from mlxroute.bench.concurrent_answers import ConcurrentAnswers
from mlxroute.bench.significance import mcnemar, wilson
from mlxroute.catalog.score_ranks import ScoreRanks
from mlxroute.engine import generate
from mlxroute.engine.options import MAX_PREFETCH
from mlxroute.engine.protocols import SmallProtocol
from mlxroute.questions.grading import grade
from mlxroute.questions.question_files import Question, question_messages
from mlxroute.recorded.json_lines import read_json_lines
from mlxroute.recorded.large_answers import PlaceholderSmall
from mlxroute.routers import Router, make_router
from mlxroute.small import SmallModel
from mlxroute.training import Replies
from mlxroute.types import Message, Mode, Progress, Source, no_progress

BUDGETS: Final = (0.01, 0.03, 0.05, 0.07, 0.10, 0.15, 0.30)
_TIMEOUT_S: Final = 600.0
_STEPS: Final = 5


@dataclass(frozen=True, slots=True)
class QualitySide:
    """Who answers: one model alone (no router), or both within a budget."""

    name: str
    router: str | None = None
    budget: float = 0.0

    @property
    def is_large(self) -> bool:
        return self.name == LARGE.name


SMALL: Final = QualitySide("small")
LARGE: Final = QualitySide("large")


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One answer; `scores` are those of its positions, so that a budget can go on from it."""

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


class Results:
    """Answers that were given, in a file: what is there is not asked again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, QualityRow] = {}
        for item in read_json_lines(path):
            item["row"]["scores"] = tuple(item["row"]["scores"])
            self._rows[item["key"]] = QualityRow(**item["row"])

    def find(self, key: str) -> QualityRow | None:
        """The answer kept under a key."""
        return self._rows.get(key)

    def add(self, key: str, row: QualityRow) -> None:
        """Keep an answer."""
        self._rows[key] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "row": asdict(row)}) + "\n")


def step_seconds(small: SmallModel, question: Question) -> float:
    """What a step of the small model alone takes, by a few behind a question."""
    signals, _ = small.prefill(small.encode_prompt(small.render(question_messages(question))))
    times_s = []
    for _ in range(_STEPS):
        began_s = time.perf_counter()
        signals = small.step(signals.token_id)
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)


def sides_of(routers: Iterable[str], budgets: Iterable[float]) -> list[QualitySide]:
    """Both models alone, and every router within every budget."""
    routed = [QualitySide(f"{r} {100 * b:g}%", r, b) for r in routers for b in budgets]
    return [SMALL, LARGE, *routed]


def bench_quality(  # noqa: PLR0913 - what a run is made of
    small: SmallModel,
    replies: Replies,
    questions: Sequence[Question],
    *,
    sides: Sequence[QualitySide],
    examples: Sequence[Question],
    ranks: ScoreRanks,
    tokens: int,
    step_s: float,
    results: Results,
    chats: int = 1,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """All sides on all questions, from `results` where they are there.

    `chats` questions are answered at a time, by all sides, as rows of one batch; question i is of
    chat i modulo `chats`, and in a chat a budget goes on from question to question. Seconds are
    those of an answer alone: its tokens at `step_s`, and the calls as long as they took; prompts
    are not counted.
    """
    run = _Run(small, replies, examples, ranks, tokens, step_s, results)
    routers = {(side, chat): run.router(side) for side in sides for chat in range(chats)}
    rows: dict[str, list[QualityRow]] = {side.name: [] for side in sides}
    progress("questions", 0, len(questions))
    for begin in range(0, len(questions), chats):
        group = questions[begin : begin + chats]
        run.answer(
            [
                (side, question, routers[side, chat])
                for chat, question in enumerate(group)
                for side in sides
            ],
            rows,
        )
        progress("questions", begin + len(group), len(questions))
    return {
        "small": small.name,
        "large": replies.model_name,
        "questions": len(questions),
        "examples": len(examples),
        "tokens": tokens,
        "chats": chats,
        "step_s": round(step_s, 5),
        "sides": {side.name: _figures(side, rows, chats, longest=tokens) for side in sides},
    }


@dataclass(frozen=True, slots=True)
class _Run:
    """What all answers have in common."""

    small: SmallModel
    replies: Replies
    examples: Sequence[Question]
    ranks: ScoreRanks
    tokens: int
    step_s: float
    results: Results

    def router(self, side: QualitySide) -> Router:
        """A side's router before the first question."""
        if side.router is None:
            return make_router("entropy", threshold=-math.inf if side.is_large else math.inf)
        return make_router(side.router, budget=side.budget, quantiles=self.ranks[side.router])

    def answer(
        self,
        wanted: Sequence[tuple[QualitySide, Question, Router]],
        rows: dict[str, list[QualityRow]],
    ) -> None:
        """Add the wanted answers to `rows`; the routers go on from them."""
        turns = [question_messages(question, self.examples) for _, question, _ in wanted]
        keys = [
            self._key(side, each, router)
            for (side, _, router), each in zip(wanted, turns, strict=True)
        ]
        jobs = [
            (each, partial(self._answer, *one, each))
            for one, key, each in zip(wanted, keys, turns, strict=True)
            if self.results.find(key) is None
        ]
        found = iter(
            ConcurrentAnswers(self.small, stop=self.replies.close).answers(jobs) if jobs else []
        )
        for (side, _, router), key in zip(wanted, keys, strict=True):
            row = self.results.find(key)
            if row is None:
                row = next(found)
                self.results.add(key, row)
            else:
                for score in row.scores:
                    _, router.state = router.state.decide(score)
            rows[side.name].append(row)

    def _key(self, side: QualitySide, turns: Sequence[Message], router: Router) -> str:
        """A name for an answer: what it depends on, the state of its budget included."""
        ranks = self.ranks[side.router] if side.router else ()
        parts = [self.small.name, self.replies.model_name, side.router, side.is_large, self.tokens]
        # One model alone answers whatever came before.
        pace = repr(router.state) if side.router else ""
        text = json.dumps([*parts, ranks, turns, pace])
        return hashlib.sha256(text.encode()).hexdigest()

    def _answer(
        self,
        side: QualitySide,
        question: Question,
        router: Router,
        turns: Sequence[Message],
        small: SmallProtocol,
    ) -> QualityRow:
        seat = self.replies.seat()
        answer = generate(
            # The large model's own answer takes no step of the small one.
            PlaceholderSmall(self.small) if side.is_large else small,
            None if side is SMALL else seat,
            turns,
            router=router,
            max_tokens=self.tokens,
            timeout_s=_TIMEOUT_S,
            strict=True,
            mode=Mode.WAIT,
            # The large model alone need not be asked for every token.
            prefetch=MAX_PREFETCH if side.is_large else 0,
        )
        written = list(answer)
        # A large token of several ids is one position.
        scores = [t.score for t in written if t.source is Source.SMALL or t.escalation]
        stats = answer.stats()
        marked = grade(question, stats.text)
        return QualityRow(
            question=question.name,
            text=stats.text,
            strict=marked.strict,
            lenient=marked.lenient,
            tokens=stats.tokens,
            escalated=stats.escalated,
            agreed=stats.agreed,
            unchecked=stats.unchecked,
            calls=stats.calls,
            uploaded_tokens=stats.uploaded_tokens,
            seconds=round(seat.calls_s + (0 if side.is_large else stats.tokens) * self.step_s, 3),
            scores=() if side.is_large else tuple(scores),
        )


def _figures(
    side: QualitySide, rows: dict[str, list[QualityRow]], chats: int, *, longest: int
) -> dict[str, Any]:
    mine, count = rows[side.name], len(rows[side.name])
    tokens = sum(row.tokens for row in mine)
    escalated = sum(row.escalated for row in mine)
    agreed = sum(row.agreed for row in mine)
    return {
        "router": side.router,
        "budget": side.budget if side.router else None,
        "strict": _accuracy([row.strict for row in mine], [row.strict for row in rows["small"]]),
        "lenient": _accuracy([row.lenient for row in mine], [row.lenient for row in rows["small"]]),
        "escalation_rate": round(escalated / tokens, 5) if tokens else 0.0,
        "agreement": round(agreed / escalated, 4) if escalated and side.router else None,
        "most_over_budget": _most_over(mine, side.budget, chats) if side.router else None,
        "tokens": tokens,
        "reached_limit": sum(row.tokens >= longest for row in mine),
        "calls": sum(row.calls for row in mine),
        "uploaded_tokens": sum(row.uploaded_tokens for row in mine),
        "seconds_median": round(statistics.median(row.seconds for row in mine), 3) if count else 0,
    }


def _most_over(rows: Sequence[QualityRow], budget: float, chats: int) -> float:
    """By how many escalations any run of answers of a chat exceeds its share; a burst at most."""
    most = 0.0
    for chat in range(chats):
        over = 0.0
        for row in rows[chat::chats]:
            over = max(0.0, over) + row.escalated - budget * row.tokens
            most = max(most, over)
    return round(most, 3)


def _accuracy(marks: Sequence[bool | None], alone: Sequence[bool | None]) -> dict[str, Any]:
    """The share of right answers; no answer counts as wrong and is told apart."""
    right, count = sum(each is True for each in marks), len(marks)
    base = sum(each is True for each in alone)
    low, high = wilson(right, count)
    pairs = [(a is True, b is True) for a, b in zip(marks, alone, strict=True)]
    return {
        "accuracy": round(right / count, 4),
        "interval": [round(low, 4), round(high, 4)],
        "no_answer": sum(each is None for each in marks),
        "over_small": round(right / base, 3) if base else None,
        "p_against_small": float(
            f"{mcnemar(pairs.count((True, False)), pairs.count((False, True))):.3g}"
        ),
    }
