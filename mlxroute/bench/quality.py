"""How good answers are: the small model alone, the large one alone, and routed within budgets."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mlxroute.bench.marks import mark, mcnemar, wilson
from mlxroute.engine import generate
from mlxroute.engine.options import MOST_PREFETCHED
from mlxroute.engine.roles import NamedLarge
from mlxroute.questions import Question, with_examples
from mlxroute.ranks import Ranks
from mlxroute.routers import Router, make
from mlxroute.small import SmallModel
from mlxroute.types import Mode, Progress, Source, no_progress

_TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Side:
    """Who answers: one model alone (no router), or both within a budget."""

    name: str
    router: str | None = None
    budget: float = 0.0

    @property
    def is_large(self) -> bool:
        return self.name == LARGE.name


SMALL: Final = Side("small")
LARGE: Final = Side("large")


@dataclass(frozen=True, slots=True)
class Row:
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
        self._rows: dict[str, Row] = {}
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                # What a run that was killed was just writing.
                path.write_text(whole, encoding="utf-8")
            for line in whole.splitlines():
                item = json.loads(line)
                item["row"]["scores"] = tuple(item["row"]["scores"])
                self._rows[item["key"]] = Row(**item["row"])

    def find(self, key: str) -> Row | None:
        """The answer kept under a key."""
        return self._rows.get(key)

    def add(self, key: str, row: Row) -> None:
        """Keep an answer."""
        self._rows[key] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "row": asdict(row)}) + "\n")


def sides_of(routers: Iterable[str], budgets: Iterable[float]) -> list[Side]:
    """Both models alone, and every router within every budget."""
    routed = [Side(f"{r} {100 * b:g}%", r, b) for r in routers for b in budgets]
    return [SMALL, LARGE, *routed]


def bench_quality(  # noqa: PLR0913 - what a run is made of
    small: SmallModel,
    large: NamedLarge,
    questions: Sequence[Question],
    *,
    sides: Sequence[Side],
    examples: Sequence[Question],
    ranks: Ranks,
    tokens: int,
    results: Results,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """All sides on all questions, from `results` where they are there.

    A budget goes on from question to question, as in a chat.
    """
    done = itertools.count(1)
    rows: dict[str, list[Row]] = {}
    for side in sides:
        router = _router(side, ranks)
        rows[side.name] = []
        for question in questions:
            prompt = with_examples(question, examples)
            quantiles = ranks[side.router] if side.router else ()
            key = _key(small.name, large.model_name, side, quantiles, prompt, tokens, router)
            row = results.find(key)
            if row is None:
                row = _answered(small, large, side, question, prompt, router, tokens)
                results.add(key, row)
            else:
                for score in row.scores:
                    router.pace = router.pace.after(score)
            rows[side.name].append(row)
            progress("answers", next(done), len(sides) * len(questions))
    return {
        "small": small.name,
        "large": large.model_name,
        "questions": len(questions),
        "examples": len(examples),
        "tokens": tokens,
        "sides": {side.name: _figures(side, rows) for side in sides},
    }


def _router(side: Side, ranks: Ranks) -> Router:
    if side.router is None:
        return make("entropy", threshold=-math.inf if side.is_large else math.inf)
    return make(side.router, budget=side.budget, quantiles=ranks[side.router])


def _key(*parts: Any) -> str:
    """A name for an answer: what it depends on, the state of its budget included."""
    *plain, router = parts
    text = json.dumps([str(part) for part in plain] + [repr(router.pace)])
    return hashlib.sha256(text.encode()).hexdigest()


def _answered(
    small: SmallModel,
    large: NamedLarge,
    side: Side,
    question: Question,
    prompt: str,
    router: Router,
    tokens: int,
) -> Row:
    answer = generate(
        small,
        None if side is SMALL else large,
        prompt,
        router=router,
        max_tokens=tokens,
        timeout_s=_TIMEOUT_S,
        strict=True,
        mode=Mode.WAIT,
        # The large model alone need not be asked for every token.
        prefetch=MOST_PREFETCHED if side.is_large else 0,
    )
    # A large token of several ids is one position.
    scores = [token.score for token in answer if token.source is Source.SMALL or token.escalation]
    stats = answer.stats()
    marked = mark(question, stats.text)
    return Row(
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
        seconds=round(stats.total_s, 3),
        scores=tuple(scores),
    )


def _figures(side: Side, rows: dict[str, list[Row]]) -> dict[str, Any]:
    mine, count = rows[side.name], len(rows[side.name])
    tokens = sum(row.tokens for row in mine)
    escalated = sum(row.escalated for row in mine)
    return {
        "router": side.router,
        "budget": side.budget if side.router else None,
        "strict": _accuracy([row.strict for row in mine], [row.strict for row in rows["small"]]),
        "lenient": _accuracy([row.lenient for row in mine], [row.lenient for row in rows["small"]]),
        "escalation_rate": round(escalated / tokens, 5) if tokens else 0.0,
        "agreement": round(sum(row.agreed for row in mine) / escalated, 4) if escalated else None,
        "tokens": tokens,
        "calls": sum(row.calls for row in mine),
        "uploaded_tokens": sum(row.uploaded_tokens for row in mine),
        "seconds_median": round(statistics.median(row.seconds for row in mine), 3) if count else 0,
    }


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
        "p_against_small": round(
            mcnemar(pairs.count((True, False)), pairs.count((False, True))), 6
        ),
    }
