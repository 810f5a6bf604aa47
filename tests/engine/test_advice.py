"""The advice to use the large model alone: for its speed, for its cost, once a session."""

from __future__ import annotations

from mlxroute.engine.advice import advise
from mlxroute.engine.experience import Experience, MovingAverage


def measured() -> Experience:
    return Experience(step_s=MovingAverage(0.01, 9), call_s=MovingAverage(2.0, 9))


def advice(experience: Experience, *, calls_cost: float = 0.0, whole_cost: float = 0.0) -> str:
    return advise(experience, calls_cost=calls_cost, whole_cost=whole_cost) or ""


def test_the_advice_to_stream_is_given_once_with_figures() -> None:
    experience = measured()
    assert advice(experience) == ""
    experience.large_step_s, experience.escalation_rate = (
        MovingAverage(0.05, 9),
        MovingAverage(0.1, 9),
    )
    assert "50 ms" in advice(experience)
    assert advice(experience) == ""
    experience.advice_was_given, experience.escalation_rate = False, MovingAverage(0.01, 9)
    assert advice(experience) == ""


def test_the_advice_names_the_cost_where_the_large_model_alone_is_cheaper() -> None:
    experience = measured()
    assert advice(experience, calls_cost=0.01, whole_cost=0.02) == ""
    assert advice(experience, calls_cost=0.01, whole_cost=0.0) == ""
    text = advice(experience, calls_cost=0.0361, whole_cost=0.012)
    assert "for this answer cost 0.036, its whole answer would cost about 0.012" in text
    assert advice(experience, calls_cost=1.0, whole_cost=0.5) == ""
