"""Models on a virtual clock: real tokens, set times, no call repeated."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mlxroute.backend.load import load
from mlxroute.bench.delayed_server import constant
from mlxroute.bench.virtual_models import OutputCache, VirtualClock, VirtualLarge, VirtualSmall
from mlxroute.engine import Answer, Options
from mlxroute.routers import EntropyRouter
from mlxroute.small import SmallModel
from mlxroute.types import BranchCost, Mode, RunStats, Sampling, no_progress
from tests.support.scripted_models import ScriptedLarge
from tests.support.tiny import KINDS, WINDOW, make_tiny_model

_STEP_S, _BATCH_S, _CALL_S = 1.0, 1.5, 30.0
_TOKENS = 18


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model, tokenizer = load(make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny"))
    return SmallModel(model, tokenizer, name="tiny")


@cache
def threshold(small: SmallModel) -> float:
    """An entropy that a sixth of the positions exceeds."""
    ids = list(small.encode_conversation([{"role": "user", "content": "hi"}]).ids)
    signals, _ = small.prefill(ids)
    entropies = []
    for _ in range(_TOKENS):
        entropies.append(signals.entropy_nats)
        signals = small.step(signals.token_id)
    return sorted(entropies)[-4]


def play(
    small: SmallModel, outputs: OutputCache, large: ScriptedLarge, mode: Mode, **options: Any
) -> tuple[list[int], RunStats, float]:
    clock = VirtualClock()
    answer = Answer(
        VirtualSmall(small, outputs, clock, BranchCost(4, _STEP_S, _BATCH_S, 1e-5)),
        VirtualLarge(
            large, outputs, clock, call_s=_CALL_S, token_s=0.5, streams=False, delay=constant
        ),
        [{"role": "user", "content": "hi"}],
        router=EntropyRouter(threshold(small)),
        options=Options(max_tokens=_TOKENS, timeout_s=10_000.0, mode=mode, **options),
        clock=clock,
    )
    ids = [token.token_id for token in answer]
    return ids, answer.stats(), clock()


def test_every_mode_writes_the_same_answer_and_wait_takes_the_sum_of_steps_and_calls(
    small: SmallModel,
) -> None:
    outputs, large = OutputCache(), ScriptedLarge([(70,)])
    expected, stats, waited_s = play(small, outputs, large, Mode.WAIT)
    assert stats.escalated > 2
    assert waited_s == pytest.approx(_STEP_S * (len(expected) - 1) + _CALL_S * stats.calls)
    for mode in Mode:
        ids, _, seconds = play(small, outputs, large, mode, prefetch=0)
        assert ids == expected
        assert seconds <= waited_s
    calls = [tuple(context.token_ids) for context in large.contexts]
    assert len(calls) == len(set(calls))


def test_a_server_that_contradicts_itself_still_gives_one_answer(small: SmallModel) -> None:
    outputs, large = OutputCache(), ScriptedLarge([(70,), (71,), (72,)])
    expected, _, _ = play(small, outputs, large, Mode.WAIT)
    for mode in (Mode.WAIT, Mode.OVERLAP):
        ids, _, _ = play(small, outputs, large, mode, prefetch=3)
        assert ids == expected


def test_rows_of_a_batch_go_on_from_what_was_computed_before(small: SmallModel) -> None:
    outputs, prompt = OutputCache(), list(range(5, 15))

    def start() -> VirtualSmall:
        virtual = VirtualSmall(small, outputs, VirtualClock(), BranchCost(4, 1.0, 1.5, 1e-5))
        virtual.prefill(prompt, sampling=Sampling(), progress=no_progress)
        virtual.branch([0, 0], [20, 21])
        return virtual

    first, second = start(), start()
    rows = [first.branch([1, 0], [30, 31]), second.branch([0, 1, 0], [40, 41, 42])]
    rows.append(second.branch([2, 1], [50, 51]))
    tails: list[list[tuple[int, ...]]] = [
        [(21, 30), (20, 31)],
        [(20, 40), (21, 41), (20, 42)],
        [(20, 42, 50), (21, 41, 51)],
    ]
    for batch, batch_tails in zip(rows, tails, strict=True):
        for signals, tail in zip(batch, batch_tails, strict=True):
            alone, _ = small.prefill([*prompt, *tail])
            assert signals.top_ids == alone.top_ids
            assert signals.entropy_nats == pytest.approx(alone.entropy_nats, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_can_be_rolled_back_as_far_as_the_real_one_of_its_length(
    kind: str, tmp_path: Path
) -> None:
    path = make_tiny_model(tmp_path / kind, model_type=kind, extra=KINDS[kind])
    model = SmallModel(*load(path), name=kind)
    model.prefill(list(range(5, 5 + 2 * WINDOW)))
    # Another text is in the real cache.
    virtual = VirtualSmall(model, OutputCache(), VirtualClock(), BranchCost(4, 1.0, 1.5, 1e-5))
    for length in (10, WINDOW):
        alone = model.with_own_cache()
        prompt = list(range(5, 5 + length))
        alone.prefill(prompt)
        virtual.prefill(prompt, sampling=Sampling(), progress=no_progress)
        for count in (1, WINDOW // 2, WINDOW):
            assert virtual.can_rollback(count) == alone.can_rollback(count)
        assert (virtual.max_rows > 1) == (alone.max_rows > 1)


def test_tokens_without_escalation_are_the_small_models_own(small: SmallModel) -> None:
    ids, _, _ = play(small, OutputCache(), ScriptedLarge([(70,)]), Mode.WAIT)
    small.prefill(list(small.encode_conversation([{"role": "user", "content": "hi"}]).ids))
    first = next(i for i, token in enumerate(ids) if token == 70)
    signals, _ = small.prefill(
        list(small.encode_conversation([{"role": "user", "content": "hi"}]).ids)
    )
    for token in ids[:first]:
        assert signals.token_id == token
        signals = small.step(token)


def test_delays_depend_on_the_context_alone(small: SmallModel) -> None:
    drawn: list[float] = []

    def delay(rng: random.Random) -> float:
        drawn.append(rng.random())
        return drawn[-1]

    for _ in range(2):
        clock, outputs = VirtualClock(), OutputCache()
        large = VirtualLarge(
            ScriptedLarge([(70,)]),
            outputs,
            clock,
            call_s=1.0,
            token_s=0.0,
            streams=False,
            delay=delay,
        )
        answer = Answer(
            VirtualSmall(small, outputs, clock, BranchCost(4, 1.0, 1.5, 1e-5)),
            large,
            [{"role": "user", "content": "hi"}],
            router=EntropyRouter(threshold(small)),
            options=Options(max_tokens=_TOKENS, timeout_s=10_000.0, mode=Mode.WAIT),
            clock=clock,
        )
        list(answer)
    half = len(drawn) // 2
    assert drawn[:half] == drawn[half:]
    assert len(set(drawn[:half])) == half > 1
