"""The advice to use the large model alone, where an answer shows that this would be better."""

from __future__ import annotations

from mlxroute.engine.experience import Experience


def advise(experience: Experience, *, calls_cost: float, whole_cost: float) -> str | None:
    """Return the advice to use the large model alone, with figures, if that would be better.

    `calls_cost` is that of an answer's calls, `whole_cost` that of the large model's whole answer;
    both are 0 where there are no prices. Advice is given once a session; otherwise returns None.
    """
    if experience.advice_was_given:
        return None
    reasons = [_speed_reason(experience)]
    if calls_cost > whole_cost > 0:
        reasons.append(
            f"the large model alone would be cheaper: the calls for this answer cost"
            f" {calls_cost:.2g}, its whole answer would cost about {whole_cost:.2g}"
        )
    advice = "; ".join(filter(None, reasons))
    if not advice:
        return None
    experience.on_advice()
    return advice


def _speed_reason(experience: Experience) -> str:
    """Return why streaming the large model would be faster; empty if it would not."""
    if experience.large_step_s.count < 2 or experience.call_s.count < 2:
        return ""
    large_s, step_s = experience.large_step_s.value, experience.step_s.value
    call_s, rate = experience.call_s.value, experience.escalation_rate.value
    # Streaming is faster if p > (d - a) / R, with d the large model's seconds per token.
    if not call_s or rate <= (large_s - step_s) / call_s:
        return ""
    return (
        "streaming the large model would be faster: it writes a token in"
        f" {large_s * 1e3:,.0f} ms, the small one in {step_s * 1e3:,.0f} ms, and {rate:.1%} of"
        f" the positions cost a call of {call_s * 1e3:,.0f} ms"
    )
