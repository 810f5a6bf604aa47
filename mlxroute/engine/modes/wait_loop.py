"""The decode loop of `wait`, and of answers without a large model: decoding pauses during calls."""

from __future__ import annotations

from collections.abc import Iterator

from mlxroute.engine.escalation.decision import Decision
from mlxroute.engine.modes.decode_context import DecodeContext, append_decision
from mlxroute.engine.transcript import Transcript
from mlxroute.types import Event, Signals


def wait_loop(context: DecodeContext, signals: Signals) -> Iterator[Event]:
    """Decode to the end of the answer; `signals` are those of its first position."""
    transcript = Transcript(context.prompt)
    while True:
        decision = _decide(context, signals, transcript)
        transcript = append_decision(transcript, decision)
        yield from context.commit(decision, transcript)
        if context.commits.ended:
            return
        signals = context.feed(decision.token_ids)


def _decide(context: DecodeContext, signals: Signals, transcript: Transcript) -> Decision:
    """Decide the position after the transcript, with as many calls as that takes."""
    decider, calls = context.decider, context.calls
    small_choice = decider.judge(signals, decider.router_state)
    while (decision := decider.decide_without_call(small_choice, transcript)) is None:
        call = decider.start_call(transcript)
        while not calls.is_finished(call):
            calls.wait()
        decision = decider.decide_from_call(small_choice, call, transcript.ids)
        if decision is not None:
            break
    return decision
