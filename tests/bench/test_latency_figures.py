"""The figures of `bench latency`: causes of differing answers, and `auto` against the best mode."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxroute.bench.divergence import Divergence, find_divergence
from mlxroute.bench.latency_figures import point_figures
from mlxroute.bench.latency_sides import SIDES, SideAnswers
from mlxroute.types import (
    BranchCost,
    Escalation,
    Judgement,
    LargeToken,
    Source,
    Token,
)
from tests.support.scripted_answer import NO_STATS
from tests.support.scripted_models import signals


def written(token_id: int) -> Token:
    return Token(
        index=0,
        token_id=token_id,
        text=chr(token_id),
        source=Source.SMALL,
        score=0.0,
        threshold=1.0,
        judgement=Judgement.KEEP,
        signals=signals(token_id),
        escalation=None,
        checked=True,
        unchecked_reason=None,
        time_s=0.0,
    )


def escalated(token_id: int, *, margin_nats: float | None) -> Token:
    top = () if margin_nats is None else ((chr(token_id), -0.7), ("?", -0.7 - margin_nats))
    large = LargeToken((token_id,), chr(token_id), False, -0.7, top, None, None, 1, 0, 1.0)
    return replace(
        written(token_id), source=Source.LARGE, escalation=Escalation(0, large, None, 1.0)
    )


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ([written(65), escalated(66, margin_nats=3.0)], Divergence.NONE),
        ([written(65), escalated(67, margin_nats=0.05), written(70)], Divergence.SERVER),
        # A clear preference for another token means another context.
        ([written(65), escalated(67, margin_nats=2.0)], Divergence.ENGINE),
        ([written(65), escalated(67, margin_nats=None)], Divergence.ENGINE),
        ([written(65), written(67)], Divergence.ENGINE),
        ([written(65), written(66)], Divergence.ENGINE),
        ([written(65)], Divergence.ENGINE),
    ],
)
def test_only_a_near_tie_is_caused_by_the_server(answer: list[Token], cause: Divergence) -> None:
    wait_answer = [written(65), escalated(66, margin_nats=3.0)]
    assert find_divergence(answer, wait_answer) is cause


def test_auto_is_compared_with_the_fastest_mode_under_its_call_ceiling() -> None:
    bound = "hedge+prefetch, 1.5x calls"
    seconds = {"wait": 10.0, "hedge": 2.0, "wait+prefetch": 5.0, bound: 1.0, "auto": 2.5}
    calls = {"hedge": 40, "auto": 30, "wait+prefetch": 5, bound: 16}
    sides = {
        name: SideAnswers(
            stats=[
                replace(
                    NO_STATS,
                    tokens=20,
                    total_s=seconds.get(name, 8.0),
                    stall_s=1.0,
                    calls=calls.get(name, 10),
                )
            ],
            tokens=[[escalated(65, margin_nats=1.0)]],
        )
        for name in SIDES
    }
    report = point_figures(sides, cost=BranchCost(4, 1.0, 1.5, 1e-5), call_s=10.0)
    assert report["same_text"]
    assert report["auto_over_best"] == {"auto": 0.8, "auto, 1.5x calls": 0.625}
