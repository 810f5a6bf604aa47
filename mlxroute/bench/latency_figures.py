"""The figures in the report of `bench latency`: speeds, stalls, calls, and those of the pair."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mlxroute.bench.divergence import Divergence, find_divergence
from mlxroute.bench.latency_sides import SIDES, SideAnswers
from mlxroute.engine import Experience
from mlxroute.engine.experience import MovingAverage
from mlxroute.engine.governor import expected_mode_times
from mlxroute.types import BranchCost, Mode


def point_figures(
    sides: Mapping[str, SideAnswers], *, cost: BranchCost, call_s: float
) -> dict[str, Any]:
    """Return the report of one point: figures of the pair, of each side, and predicted speeds."""
    wait = sides["wait"]
    pair = _pair_figures(wait)
    divergences = [
        find_divergence(tokens, wait_tokens)
        for answers in sides.values()
        for tokens, wait_tokens in zip(answers.tokens, wait.tokens, strict=True)
    ]
    by_side = {name: side_figures(answers, wait) for name, answers in sides.items()}
    return {
        **pair,
        "same_text": Divergence.ENGINE not in divergences,
        "server_differed": divergences.count(Divergence.SERVER),
        "sides": by_side,
        "auto_over_best": _auto_over_best(by_side),
        "predicted_tokens_per_s": _predict_speeds(pair, cost, call_s),
    }


def _auto_over_best(by_side: Mapping[str, Any]) -> dict[str, float]:
    """Return the speed of `auto` over that of the fastest fixed mode, by call ceiling.

    A fixed mode counts if it made no more calls than the ceiling allows, whether it had one or not.
    """
    ratios = {}
    for name, side in SIDES.items():
        if side.mode is Mode.AUTO:
            max_calls = math.inf if side.call_ceiling is None else side.call_ceiling
            best = max(
                by_side[other_name]["tokens_per_s"]
                for other_name, other in SIDES.items()
                if other.mode is not Mode.AUTO
                and other.call_ceiling in (None, side.call_ceiling)
                and by_side[other_name]["calls_over_wait"] <= max_calls
            )
            ratios[name] = round(by_side[name]["tokens_per_s"] / best, 3)
    return ratios


def _pair_figures(wait: SideAnswers) -> dict[str, Any]:
    """Return the figures of the pair: escalation rate, agreement and coverage.

    `coverage_k` is the share where the large model's token is among the small one's k likeliest.
    """
    escalated = [
        (token.signals, token.escalation.large.token_ids)
        for tokens in wait.tokens
        for token in tokens
        if token.escalation is not None and token.escalation.large is not None
    ]
    count = sum(len(tokens) for tokens in wait.tokens)
    return {
        "escalated": len(escalated),
        "realised_rate": round(len(escalated) / count, 4),
        "agreement": _share([ids == (signals.token_id,) for signals, ids in escalated]),
        "coverage_4": _share([ids[0] in signals.top_ids[:4] for signals, ids in escalated]),
        "coverage_8": _share([ids[0] in signals.top_ids[:8] for signals, ids in escalated]),
    }


def _share(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def side_figures(answers: SideAnswers, wait: SideAnswers | None) -> dict[str, Any]:
    """Return one side's times, tokens and calls; with `wait`, also compared with its answers."""
    runs = answers.stats
    seconds, count = sum(run.total_s for run in runs), sum(run.tokens for run in runs)
    figures = {
        "tokens_per_s": round(answers.tokens_per_s, 4),
        "ttft_s": round(statistics.median(run.ttft_s for run in runs), 4),
        "itl_p50_s": round(statistics.median(run.itl_p50_s for run in runs), 5),
        "itl_p95_s": round(statistics.median(run.itl_p95_s for run in runs), 5),
        "stall_s": round(sum(run.stall_s for run in runs), 3),
        "calls_per_token": round(sum(run.calls for run in runs) / count, 4),
        "prefetch_generated": sum(run.prefetch_generated for run in runs),
        "prefetch_used": sum(run.prefetch_used for run in runs),
        "retracted": sum(run.retracted for run in runs),
        "redecoded": sum(run.redecoded for run in runs),
        "fallbacks": sum(run.fallbacks for run in runs),
    }
    if wait is not None:
        wait_s = sum(run.total_s for run in wait.stats)
        wait_stall_s = sum(run.stall_s for run in wait.stats)
        wait_calls = sum(run.calls for run in wait.stats)
        figures |= {
            "over_wait": round(wait_s / seconds, 3),
            "stall_over_wait": round(figures["stall_s"] / max(1e-9, wait_stall_s), 3),
            "calls_over_wait": round(sum(run.calls for run in runs) / max(1, wait_calls), 3),
        }
    return figures


def _predict_speeds(pair: Mapping[str, Any], cost: BranchCost, call_s: float) -> dict[str, float]:
    """Return tokens per second of each mode, predicted by the governor's formulas.

    The inputs are the measured figures of the pair, the step and the call. There is no prediction
    without an escalation, nor without batches, which the formulas assume.
    """
    if not pair["escalated"] or cost.rows == 1:
        return {}
    experience = Experience(
        step_s=MovingAverage(cost.step_s),
        call_s=MovingAverage(call_s),
        escalation_rate=MovingAverage(pair["realised_rate"]),
        agreement=MovingAverage(pair["agreement"]),
        coverage=MovingAverage(pair["coverage_4"]),
    )
    predicted = expected_mode_times(experience, branch_cost=cost.batch_s / cost.step_s)
    times = {"wait": predicted.wait_s, "overlap": predicted.overlap_s, "hedge": predicted.hedge_s}
    return {name: round(1.0 / seconds, 4) for name, seconds in times.items()}
