"""Routers decide from signals alone, and a budget is never exceeded."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxroute.errors import UsageError
from mlxroute.routers import BURST, SCORES, Budget, EntropyRouter, Threshold, make_router
from mlxroute.types import Judgement, Signals
from tests.support.scripted_models import signals

_UNIFORM = (0.0, 1.0)
# Scores of the small model's own uncertainty: not a learned one, nor the control.
UNCERTAINTIES = set(SCORES) - {"head", "random"}
# Broken logits score NaN, and infinities are no score of a sound row.
_SCORES = st.lists(st.floats(0, 5) | st.just(math.nan), min_size=1, max_size=300)


def budget(rate: float, quantiles: tuple[float, ...] = _UNIFORM) -> Budget:
    return Budget.of(rate, quantiles, resolution=0.02)


def judged(state: Threshold | Budget, scores: Iterable[float]) -> list[Judgement]:
    judgements = []
    for score in scores:
        judgement, state = state.decide(score)
        judgements.append(judgement)
    return judgements


def escalated(judgements: Iterable[Judgement]) -> list[int]:
    return [int(judgement is Judgement.ESCALATE) for judgement in judgements]


# A threshold


@given(st.floats(min_value=0, max_value=12), st.floats(min_value=-1, max_value=12))
def test_entropy_router_escalates_strictly_above_its_threshold(
    entropy: float, threshold: float
) -> None:
    router = EntropyRouter(threshold)
    got = router.state.decide(router.score(signals(1, entropy), 0))[0]
    assert (got is Judgement.ESCALATE) == (entropy > threshold)


@given(st.floats(allow_nan=True))
def test_infinite_thresholds_never_and_always_escalate(score: float) -> None:
    assert Threshold(math.inf).decide(score)[0] is Judgement.KEEP
    if score != -math.inf:
        assert Threshold(-math.inf).decide(score)[0] is Judgement.ESCALATE


def test_a_score_that_is_not_a_number_goes_to_the_large_model() -> None:
    assert Threshold(2.5).decide(math.nan)[0] is Judgement.ESCALATE
    assert budget(0.07).decide(math.nan)[0] is Judgement.ESCALATE


def test_a_budget_bounds_scores_that_are_all_not_a_number() -> None:
    judgements = judged(budget(0.07), [math.nan] * 1000)
    assert sum(escalated(judgements)) == pytest.approx(0.07 * 1000 + BURST, abs=1)
    assert Judgement.KEEP not in judgements
    assert set(judged(budget(0.0), [math.nan] * 9)) == {Judgement.KEEP}


def test_the_lowest_score_is_escalated_by_a_budget_of_everything_only() -> None:
    scores = [0.0, 0.0, 0.0, 1.0] * 500
    assert sum(escalated(judged(budget(0.9), scores))) == pytest.approx(500, abs=10)
    assert sum(escalated(judged(budget(1.0), scores))) == 2000


def test_a_threshold_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UsageError):
        EntropyRouter(math.nan)


@pytest.mark.parametrize("given_", [{}, {"threshold": 1.0, "budget": 0.1}])
def test_a_router_takes_a_threshold_or_a_budget(given_: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="either"):
        make_router("entropy", threshold=given_.get("threshold"), budget=given_.get("budget"))


def test_an_entropy_router_without_arguments_has_a_budget_of_7_percent() -> None:
    state = EntropyRouter().state
    assert isinstance(state, Budget)
    assert state.rate == 0.07
    # It starts near the entropy that 7 % of the positions of a real model exceed.
    assert 1.3 < state.threshold < 2.0
    with pytest.raises(UsageError, match="either"):
        EntropyRouter(1.0, budget=0.07)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_a_budget_outside_0_to_1_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="from 0% to 100%"):
        EntropyRouter(budget=rate)


def test_an_unknown_router_is_refused_with_the_names_to_choose_from() -> None:
    with pytest.raises(UsageError, match=r"'entrpy'; choose one of entropy, margin"):
        make_router("entrpy", threshold=1.0)


# A budget


@given(scores=_SCORES, rate=st.floats(0, 1))
def test_no_run_of_positions_ever_exceeds_the_budget_and_its_burst(
    scores: list[float], rate: float
) -> None:
    spent = list(itertools.accumulate(escalated(judged(budget(rate), scores))))
    for end, total in enumerate(spent):
        for begin in range(end + 1):
            before = spent[begin - 1] if begin else 0
            assert total - before <= rate * (end - begin + 1) + BURST + 1e-6


def test_the_ends_of_a_budget_are_never_and_always() -> None:
    scores = [random.Random(0).random() for _ in range(99)]
    assert sum(escalated(judged(budget(0.0), scores))) == 0
    assert sum(escalated(judged(budget(1.0), scores))) == 99


def _steady(dice: random.Random, at: float) -> float:
    return dice.expovariate(1.0)


def _growing(dice: random.Random, at: float) -> float:
    return dice.expovariate(1.0) * (1 + 4 * at)


def _changing(dice: random.Random, at: float) -> float:
    return dice.expovariate((1.0, 0.2, 5.0, 1.0)[min(3, int(4 * at))])


def _clustered(dice: random.Random, at: float) -> float:
    return dice.expovariate(1.0) * (1 + 3 * math.sin(400 * at) ** 8)


@pytest.mark.parametrize("rate", [0.01, 0.07, 0.3])
@pytest.mark.parametrize("scores", [_steady, _growing, _changing, _clustered])
def test_the_realised_rate_comes_within_15_percent_of_the_budget(
    scores: Callable[[random.Random, float], float], rate: float
) -> None:
    # 200 answers of 10 to 120 tokens in a conversation, on scores that were never calibrated.
    dice = random.Random(5)
    lengths = [dice.randint(10, 120) for _ in range(200)]
    total, state = sum(lengths), budget(rate)
    positions = escalated_in_all = 0
    for length in lengths:
        spent = 0
        for _ in range(length):
            score = scores(dice, positions / total)
            judgement, state = state.decide(score)
            spent += judgement is Judgement.ESCALATE
            positions += 1
        escalated_in_all += spent
        assert spent <= rate * length + BURST + 1e-6
        assert escalated_in_all <= rate * positions + BURST + 1e-6
    assert escalated_in_all / total == pytest.approx(rate, rel=0.15)


def test_a_budget_prefers_the_higher_scores() -> None:
    dice = random.Random(1)
    scores = [dice.random() for _ in range(4000)]
    flags = escalated(judged(budget(0.07), scores))
    chosen = [score for score, flag in zip(scores, flags, strict=True) if flag]
    assert sum(chosen) / len(chosen) > 0.9


@pytest.mark.parametrize("other", [0.0, 0.07, 0.3, 1.0])
def test_another_budget_goes_on_with_bucket_window_and_positions(other: float) -> None:
    state = budget(0.07)
    for score in (0.2, 5.0, 5.0, 5.0):
        state = state.decide(score)[1]
    changed = state.with_rate(other)
    assert changed.rate == other
    assert (changed.bucket, changed.positions) == (state.bucket, 4)
    assert (changed.recent, changed.ordered) == (state.recent, state.ordered)
    assert (changed == state) == (other == 0.07)
    # Back at the first budget, at most what is left in the bucket is escalated.
    judgements = judged(changed.with_rate(0.07), [5.0 + i for i in range(9)])
    assert sum(escalated(judgements)) == 1
    with pytest.raises(UsageError, match="from 0% to 100%"):
        state.with_rate(1.1)


def test_a_calibration_decides_the_first_positions() -> None:
    high = budget(0.07, (0.0, 1.0, 2.0, 3.0, 4.0))
    assert high.decide(2.0)[0] is Judgement.KEEP
    assert high.decide(3.9)[0] is Judgement.ESCALATE


def test_a_spent_budget_gives_its_own_judgement() -> None:
    judgements = judged(budget(0.07), [5.0 + i for i in range(9)])
    assert judgements == [Judgement.ESCALATE] * 4 + [Judgement.OVER_BUDGET] * 5


@given(
    scores=st.lists(st.floats(0, 5), min_size=1, max_size=60),
    seed=st.integers(0, 99),
    band=st.floats(1e-9, 5e-3),
)
def test_scores_that_differ_by_little_leave_the_same_state_unless_they_are_near_a_border(
    scores: list[float], seed: int, band: float
) -> None:
    dice = random.Random(seed)
    one = other = budget(0.1, (0.0, 5.0))
    for score in scores:
        differing = score + dice.uniform(-band, band) * 0.999
        if other.is_borderline(differing, band):
            # Here the engine decodes again.
            differing = score
        judgement, one = one.decide(score)
        same, other = other.decide(differing)
        assert judgement is same
        assert one == other


@given(st.floats(-9, 9))
def test_from_half_a_step_on_every_score_of_a_budget_is_on_a_border(score: float) -> None:
    state = budget(0.07)
    assert state.max_band == 0.01
    assert state.is_borderline(score, state.max_band)
    middle_of_a_step = 3 * state.resolution
    assert not state.is_borderline(middle_of_a_step, 0.9 * state.max_band)
    assert Threshold(1.0).max_band == math.inf


@pytest.mark.parametrize("name", sorted(UNCERTAINTIES - {"entropy"}))
@given(
    logits=st.lists(st.floats(0, 40), min_size=8, max_size=8),
    seed=st.integers(0, 99),
)
@example(logits=[20.69, 0.68, 0.23, 0.2, 0.0, 0.0, 0.0, 0.0], seed=3)
def test_scores_change_by_at_most_their_gain(name: str, logits: list[float], seed: int) -> None:
    dice = random.Random(seed)
    logits = sorted(logits, reverse=True)
    if sum(logits) < 20:
        return
    band = 1e-4
    moved = [x + dice.uniform(-band, band) / 4 for x in logits]
    a, b = (SCORES[name].function(row(*values), 0) for values in (logits, moved))
    assert abs(a - b) <= SCORES[name].gain * band + 1e-12


# Scores


def row(*logits: float) -> Signals:
    lse = math.log(sum(math.exp(x) for x in logits))
    logprobs = tuple(x - lse for x in logits)
    probs = [math.exp(x) for x in logprobs]
    return Signals(
        token_id=0,
        logprob=logprobs[0],
        entropy_nats=-sum(p * math.log(p) for p in probs),
        varentropy=0.0,
        margin=probs[0] - probs[1],
        top_ids=tuple(range(len(logits))),
        top_logprobs=logprobs,
        lse=lse,
    )


@pytest.mark.parametrize("name", sorted(UNCERTAINTIES))
def test_every_score_is_higher_where_the_model_is_less_sure(name: str) -> None:
    sure, unsure = row(18.0, 9.0, 8.0, 7.0), row(18.0, 17.8, 17.5, 17.0)
    assert SCORES[name].function(sure, 0) < SCORES[name].function(unsure, 0)


def test_logu_is_the_expected_entropy_of_a_dirichlet_distribution() -> None:
    # By simulation: E[H(p)] of p ~ Dirichlet(x), whose exact value psi(S+1) - sum x/S psi(x+1) is.
    evidence = (12.0, 7.0, 3.0, 0.5)
    dice = random.Random(2)
    total = 0.0
    for _ in range(20_000):
        gammas = [dice.gammavariate(x, 1.0) for x in evidence]
        shares = [g / sum(gammas) for g in gammas]
        total -= sum(p * math.log(p) for p in shares if p > 0)
    assert SCORES["logu"].function(row(*evidence), 0) == pytest.approx(total / 20_000, abs=0.01)


def test_the_control_depends_on_the_position_alone() -> None:
    score = SCORES["random"].function
    assert [score(row(1.0, 0.0), n) for n in range(9)] == [
        score(row(9.0, 2.0), n) for n in range(9)
    ]
    values = [score(row(1.0, 0.0), n) for n in range(4000)]
    assert sum(value > 0.93 for value in values) / 4000 == pytest.approx(0.07, abs=0.015)


def test_without_a_head_there_is_no_score_of_one() -> None:
    with pytest.raises(UsageError, match="has none; load one with") as raised:
        make_router("head", threshold=5.0).score(row(1.0, 0.0), 0)
    assert raised.value.parameter == "router"


@pytest.mark.parametrize(
    "options",
    [
        *({"budget": value} for value in (math.nan, math.inf, -0.01, 1.01, "7%", True)),
        *({"threshold": value} for value in (math.nan, "1", False)),
        *({"budget": 0.1, "quantiles": scores} for scores in ((), (1.0,), (1.0, 0.0))),
    ],
)
def test_what_is_no_number_in_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be"):
        EntropyRouter(**options)
