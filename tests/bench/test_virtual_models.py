"""Models on a virtual clock: real tokens, set times, everything asked once."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mlxroute.backend.load import load
from mlxroute.bench.delayed_server import constant
from mlxroute.bench.virtual_models import OutputCache, VirtualClock, VirtualLarge, VirtualSmall
from mlxroute.engine import Answer, Options
from mlxroute.routers import EntropyRouter
from mlxroute.small import SmallModel
from mlxroute.types import BranchCost, Mode, RunStats
from tests.support.fakes import ScriptedLarge
from tests.support.tiny import make_tiny_model

_STEP_S, _BATCH_S, _CALL_S = 1.0, 1.5, 30.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    return SmallModel(model, tokenizer, name="tiny")


def threshold(small: SmallModel) -> float:
    """A tenth of the positions exceeds it."""
    ids = small.encode_prompt(small.render([{"role": "user", "content": "hi"}]))
    signals, _ = small.prefill(ids)
    found = []
    for _ in range(60):
        found.append(signals.entropy_nats)
        signals = small.step(signals.token_id)
    return sorted(found)[53]


def play(
    small: SmallModel, known: OutputCache, large: ScriptedLarge, mode: Mode, **options: Any
) -> tuple[list[int], RunStats, float]:
    clock = VirtualClock()
    answer = Answer(
        VirtualSmall(small, known, clock, BranchCost(4, _STEP_S, _BATCH_S, 1e-5)),
        VirtualLarge(
            large, known, clock, call_s=_CALL_S, token_s=0.5, streams=False, delay=constant
        ),
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(threshold(small)),
        options=Options(max_tokens=60, timeout_s=10_000.0, mode=mode, **options),
        clock=clock,
    )
    ids = [token.token_id for token in answer]
    return ids, answer.stats(), clock()


def test_every_mode_plays_the_same_answer_and_waiting_takes_the_sum_of_its_parts(
    small: SmallModel,
) -> None:
    known, large = OutputCache(), ScriptedLarge([(70,)])
    wanted, stats, waited_s = play(small, known, large, Mode.WAIT)
    assert stats.escalated > 2
    assert waited_s == pytest.approx(_STEP_S * (len(wanted) - 1) + _CALL_S * stats.calls)
    for mode in Mode:
        ids, _, seconds = play(small, known, large, mode, prefetch=0)
        assert ids == wanted
        assert seconds <= waited_s
    asked = [tuple(context.token_ids) for context in large.contexts]
    assert len(asked) == len(set(asked))


def test_a_server_that_contradicts_itself_still_plays_one_answer(small: SmallModel) -> None:
    known, large = OutputCache(), ScriptedLarge([(70,), (71,), (72,)])
    wanted, _, _ = play(small, known, large, Mode.WAIT)
    for mode in (Mode.WAIT, Mode.OVERLAP):
        ids, _, _ = play(small, known, large, mode, prefetch=3)
        assert ids == wanted


def test_a_played_answer_is_the_small_models_own_where_nothing_is_asked(small: SmallModel) -> None:
    ids, _, _ = play(small, OutputCache(), ScriptedLarge([(70,)]), Mode.WAIT)
    small.prefill(small.encode_prompt(small.render([{"role": "user", "content": "hi"}])))
    first = next(i for i, token in enumerate(ids) if token == 70)
    signals, _ = small.prefill(
        small.encode_prompt(small.render([{"role": "user", "content": "hi"}]))
    )
    for token in ids[:first]:
        assert signals.token_id == token
        signals = small.step(token)


def test_delays_are_drawn_anew_for_each_context_and_alike_each_time(small: SmallModel) -> None:
    drawn: list[float] = []

    def delay(dice: random.Random) -> float:
        drawn.append(dice.random())
        return drawn[-1]

    for _ in range(2):
        clock, known = VirtualClock(), OutputCache()
        large = VirtualLarge(
            ScriptedLarge([(70,)]),
            known,
            clock,
            call_s=1.0,
            token_s=0.0,
            streams=False,
            delay=delay,
        )
        answer = Answer(
            VirtualSmall(small, known, clock, BranchCost(4, 1.0, 1.5, 1e-5)),
            large,
            [{"role": "user", "content": "hi"}],
            router=EntropyRouter(threshold(small)),
            options=Options(max_tokens=40, timeout_s=10_000.0, mode=Mode.WAIT),
            clock=clock,
        )
        list(answer)
    half = len(drawn) // 2
    assert drawn[:half] == drawn[half:]
    assert len(set(drawn[:half])) == half > 1
