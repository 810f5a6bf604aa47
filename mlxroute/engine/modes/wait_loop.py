"""`wait`: ask and stand still until the answer is there."""

from __future__ import annotations

from collections.abc import Iterator

from mlxroute.engine.escalation.decision import Decision
from mlxroute.engine.modes.decode_context import Desk
from mlxroute.types import Event, Signals


def wait(desk: Desk, signals: Signals) -> Iterator[Event]:
    """Decode to the end of the answer from the signals of its first position."""
    while True:
        decision = _decide(desk, signals)
        yield from desk.commit(decision, desk.write(decision))
        if desk.commits.ended:
            return
        signals = desk.extend(decision.token_ids)


def _decide(desk: Desk, signals: Signals) -> Decision:
    own = desk.decider.own(signals, desk.decider.pace)
    while True:
        if (decision := desk.decider.at_once(own)) is not None:
            return decision
        call = desk.decider.ask()
        while not desk.escalator.landed(call):
            desk.escalator.wait()
        if (decision := desk.decider.settled(own, call, desk.transcript.ids)) is not None:
            return decision
