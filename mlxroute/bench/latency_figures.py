"""What `bench latency` says of the answers of one point: speeds, stalls, calls, the pair."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from mlxroute.bench.divergence import Divergence, find_divergence
from mlxroute.bench.latency_sides import SIDES, Answers
from mlxroute.engine import Experience
from mlxroute.engine.experience import MovingAverage
from mlxroute.engine.governor import mode_times
from mlxroute.types import BranchCost, Mode


def figures(sides: dict[str, Answers], *, cost: BranchCost, call_s: float) -> dict[str, Any]:
    """The report of one point: each side's figures, the pair's, and what the formulas say."""
    waited = sides["wait"]
    pair = _pair(waited)
    by = [
        find_divergence(mine, tokens)
        for each in sides.values()
        for mine, tokens in zip(each.tokens, waited.tokens, strict=True)
    ]
    found = {name: side_figures(each, waited) for name, each in sides.items()}
    return {
        **pair,
        "same_text": Divergence.BY_US not in by,
        "server_differed": by.count(Divergence.BY_SERVER),
        "sides": found,
        "auto_over_best": _auto_over_best(found),
        "predicted_tokens_per_s": _predicted(pair, cost, call_s),
    }


def _auto_over_best(found: dict[str, Any]) -> dict[str, float]:
    """Tokens/s of `auto` over those of the fastest set mode, under the same ceiling on calls.

    A mode that needs no more calls than that counts, whether it was bound or not.
    """
    over = {}
    for name, side in SIDES.items():
        if side.mode is Mode.AUTO:
            allowed = math.inf if side.ceiling is None else side.ceiling
            best = max(
                found[each]["tokens_per_s"]
                for each, other in SIDES.items()
                if other.mode is not Mode.AUTO
                and other.ceiling in (None, side.ceiling)
                and found[each]["calls_over_wait"] <= allowed
            )
            over[name] = round(found[name]["tokens_per_s"] / best, 3)
    return over


def _pair(waited: Answers) -> dict[str, Any]:
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


def side_figures(answers: Answers, waited: Answers | None) -> dict[str, Any]:
    """One side's times in seconds, tokens and calls; with those of `wait` also over them."""
    stats = answers.stats
    seconds, count = sum(each.total_s for each in stats), sum(each.tokens for each in stats)
    found = {
        "tokens_per_s": round(answers.tokens_per_s, 4),
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


def _predicted(pair: dict[str, Any], cost: BranchCost, call_s: float) -> dict[str, float]:
    """Tokens a second by the formulas, from the figures of the pair, of a step and of a call."""
    if not pair["escalated"]:
        return {}
    seen = Experience(
        step_s=MovingAverage(cost.step_s),
        call_s=MovingAverage(call_s),
        escalation_rate=MovingAverage(pair["realised_rate"]),
        agreement=MovingAverage(pair["agreement"]),
        coverage=MovingAverage(pair["coverage_4"]),
    )
    found = mode_times(seen, branch_cost=cost.batch_s / cost.step_s)
    times = {"wait": found.wait_s, "overlap": found.overlap_s, "hedge": found.hedge_s}
    return {name: round(1.0 / seconds, 4) for name, seconds in times.items()}
