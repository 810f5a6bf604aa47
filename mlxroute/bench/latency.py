"""How fast answers are while the large model is waited for, in every mode, at set call times."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mlxroute.bench.delayed import DELAYS, DelayedServer
from mlxroute.bench.framework import interleaved
from mlxroute.engine import Experience, generate
from mlxroute.engine.governor import estimate
from mlxroute.engine.stats import gaps, percentile
from mlxroute.large import LargeModel
from mlxroute.routers import EntropyRouter
from mlxroute.small import SmallModel
from mlxroute.types import Mode, Progress, RunStats, Token, no_progress

_AHEAD: Final = 8
_TIMEOUT_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Answers of up to `tokens` at call times of `ratios` steps and at these escalation rates."""

    tokens: int
    ratios: Sequence[float]
    rates: Sequence[float]
    delay: str


@dataclass(frozen=True, slots=True)
class Side:
    """One way to spend the wait."""

    mode: Mode
    prefetch: int | None = 0
    ceiling: float | None = None


SIDES: Final = {
    "wait": Side(Mode.WAIT),
    "overlap": Side(Mode.OVERLAP),
    "hedge": Side(Mode.HEDGE),
    "wait+prefetch": Side(Mode.WAIT, prefetch=_AHEAD),
    "hedge+prefetch": Side(Mode.HEDGE, prefetch=_AHEAD),
    "hedge+prefetch, 1.5x calls": Side(Mode.HEDGE, prefetch=_AHEAD, ceiling=1.5),
    "auto": Side(Mode.AUTO, prefetch=None),
}


@dataclass(slots=True)
class _Answers:
    """The answers of one side, and what it learned over them."""

    experience: Experience = field(default_factory=Experience)
    stats: list[RunStats] = field(default_factory=list)
    tokens: list[list[Token]] = field(default_factory=list)


def bench_latency(
    small: SmallModel,
    large: LargeModel,
    server: DelayedServer,
    prompts: Sequence[str],
    grid: Grid,
    *,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """All sides over the grid.

    `large` talks to `server`. Every request is made once without delay before any is timed.
    """
    alone = [
        _answer(small, None, prompt, math.inf, Side(Mode.WAIT), grid.tokens) for prompt in prompts
    ]
    step_s = statistics.median(
        gap for each in alone for gap in gaps([token.time_s for token in each[1]])
    )
    entropies = sorted(token.signals.entropy_nats for _, each in alone for token in each)
    points = []
    total = len(grid.rates) * (1 + len(grid.ratios)) * len(prompts) * len(SIDES)
    done = itertools.count(1)

    def answering(name: str, answers: _Answers, threshold: float) -> Callable[[int], None]:
        side, seen = SIDES[name], answers.experience

        def answer(index: int) -> None:
            found = _answer(small, large, prompts[index], threshold, side, grid.tokens, seen)
            answers.stats.append(found[0])
            answers.tokens.append(found[1])
            progress("answers", next(done), total)

        return answer

    for rate in grid.rates:
        threshold = percentile(entropies, 1.0 - rate)
        for ratio in (0.0, *grid.ratios):
            server.delay, server.delay_s = DELAYS[grid.delay], ratio * step_s
            missed = server.missed
            sides = {name: _Answers() for name in SIDES}
            turns = {name: answering(name, answers, threshold) for name, answers in sides.items()}
            interleaved(turns, rounds=len(prompts), warm_ups=0)
            if ratio:
                point = {"rate": rate, "ratio": ratio, "call_s": round(server.delay_s, 4)}
                point |= {"threshold_nats": round(threshold, 4)}
                point |= {"passed_on": server.missed - missed}
                points.append(point | _figures(sides))
    server.delay_s = 0.0
    return {
        "small": small.name,
        "large": large.model_name,
        "prompts": len(prompts),
        "tokens": grid.tokens,
        "delay": grid.delay,
        "step_s": round(step_s, 5),
        "small_only": _side(_Answers(stats=[stats for stats, _ in alone]), None),
        "points": points,
    }


def _answer(
    small: SmallModel,
    large: LargeModel | None,
    prompt: str,
    threshold: float,
    side: Side,
    tokens: int,
    experience: Experience | None = None,
) -> tuple[RunStats, list[Token]]:
    small.rollback(len(small.cached_ids))
    answer = generate(
        small,
        large,
        prompt,
        router=EntropyRouter(threshold),
        max_tokens=tokens,
        timeout_s=_TIMEOUT_S,
        mode=side.mode,
        prefetch=side.prefetch,
        call_ceiling=side.ceiling,
        experience=experience,
    )
    found = list(answer)
    return answer.stats(), found


def _figures(sides: dict[str, _Answers]) -> dict[str, Any]:
    waited = sides["wait"]
    wanted = [stats.text for stats in waited.stats]
    return {
        **_pair(waited),
        "same_text": all([stats.text for stats in each.stats] == wanted for each in sides.values()),
        "sides": {name: _side(each, waited) for name, each in sides.items()},
        "predicted_tokens_per_s": _predicted(sides),
    }


def _pair(waited: _Answers) -> dict[str, Any]:
    """What the two models are like at the positions that were escalated."""
    asked = [
        (token.signals, token.escalation.large.token_ids)
        for each in waited.tokens
        for token in each
        if token.escalation is not None and token.escalation.large is not None
    ]
    count = sum(len(each) for each in waited.tokens)
    return {
        "escalated": len(asked),
        "realised_rate": round(len(asked) / count, 4),
        "agreement": _share([ids == (signals.token_id,) for signals, ids in asked]),
        "coverage_4": _share([ids[0] in signals.top_ids[:4] for signals, ids in asked]),
        "coverage_8": _share([ids[0] in signals.top_ids[:8] for signals, ids in asked]),
    }


def _share(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _side(answers: _Answers, waited: _Answers | None) -> dict[str, Any]:
    stats = answers.stats
    seconds, count = sum(each.total_s for each in stats), sum(each.tokens for each in stats)
    found = {
        "tokens_per_s": round(count / seconds, 4),
        "ttft_s": round(statistics.median(each.ttft_s for each in stats), 4),
        "itl_p50_s": round(statistics.median(each.itl_p50_s for each in stats), 5),
        "itl_p95_s": round(statistics.median(each.itl_p95_s for each in stats), 5),
        "stall_s": round(sum(each.stall_s for each in stats), 3),
        "calls_per_token": round(sum(each.calls for each in stats) / count, 4),
        "prefetch_generated": sum(each.prefetch_generated for each in stats),
        "prefetch_used": sum(each.prefetch_used for each in stats),
        "retracted": sum(each.retracted for each in stats),
        "redecoded": sum(each.redecoded for each in stats),
        "fallbacks": sum(each.fallbacks for each in stats),
    }
    if waited is not None:
        base_s = sum(each.total_s for each in waited.stats)
        calls = sum(each.calls for each in waited.stats)
        found |= {
            "over_wait": round(base_s / seconds, 3),
            "stall_over_wait": round(
                found["stall_s"] / max(1e-9, sum(each.stall_s for each in waited.stats)), 3
            ),
            "calls_over_wait": round(sum(each.calls for each in stats) / max(1, calls), 3),
        }
    return found


def _predicted(sides: dict[str, _Answers]) -> dict[str, float]:
    """Tokens a second by the formulas, from what `hedge` saw and what its batches cost."""
    seen = sides["hedge"].experience
    branches = seen.branches
    cost = 1.0 if branches is None else branches.batch_s / branches.step_s
    found = estimate(seen, cost=cost)
    times = {"wait": found.wait_s, "overlap": found.overlap_s, "hedge": found.hedge_s}
    return {name: round(1.0 / seconds, 4) for name, seconds in times.items() if seconds}
