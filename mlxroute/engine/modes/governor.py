"""Picks how the wait is spent: from what was seen of both models, within a ceiling on calls.

With a step taking a, a call R, a share p of the positions escalated, of which the large model
agrees at q and wants one of the branches at c, and a step of all branches b times as long as that
of one row, a token takes to first order

    wait: a + p R      overlap: a + p (1 - q) R      hedge: a + p R (1 - c / b)

The last two with a and R as they are at the same time: where the large model runs on this machine,
decoding on slows its answers down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from mlxroute.engine.modes.experience import TRUSTED, Experience
from mlxroute.types import Mode

# Tokens a call brings beyond the one asked for, where that pays.
PREFETCH_TOKENS: Final = 16
# Every so many calls the way not taken is looked at again.
_TRY_EVERY: Final = 24
# Branching is measured where it would pay at this cost: a guess.
_USUAL_COST: Final = 1.5
# Times the usual call.
_PATIENCE: Final = 4.0
# What is not clearly faster is not worth more calls, nor another change.
_CLEARLY: Final = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds a committed token, of each way."""

    wait_s: float
    overlap_s: float
    hedge_s: float


def estimate(experience: Experience, *, cost: float) -> Estimate:
    """What the formulas give for what was seen; `cost` is b."""
    seen = experience
    step_s, call_s, rate = seen.step_s.value, seen.call_s.value, seen.rate.value
    busy_step_s = step_s * seen.step_slowdown.value
    busy_call_s = call_s * seen.call_slowdown.value
    return Estimate(
        wait_s=step_s + rate * call_s,
        overlap_s=busy_step_s + rate * (1 - seen.agreement.value) * busy_call_s,
        hedge_s=busy_step_s + rate * busy_call_s * max(0.0, 1 - seen.coverage.value / cost),
    )


class Governor:
    """Says for one answer what to do during the wait; `mode` is fixed, or auto.

    `ceiling` bounds the calls of a session over its escalated positions: those of `wait` are 1.
    """

    def __init__(
        self, mode: Mode, experience: Experience, *, prefetch: int | None, ceiling: float | None
    ) -> None:
        self._mode = mode
        self._experience = experience
        self._prefetch = prefetch
        self._ceiling = ceiling
        self._taken = Mode.WAIT

    @property
    def mode(self) -> Mode:
        """What to do now."""
        seen = self._experience
        if self._mode is not Mode.AUTO:
            return self._mode
        # First what a call takes alone; one that takes about a step leaves nothing to gain.
        if not seen.call_s.seen or seen.call_s.value < seen.step_s.value:
            return Mode.WAIT
        # Then what becomes of it when decoding goes on.
        if seen.call_slowdown.seen == TRUSTED or self._tries:
            return Mode.OVERLAP
        found = estimate(seen, cost=self._cost)
        times = {
            Mode.WAIT: found.wait_s,
            Mode.OVERLAP: found.overlap_s,
            Mode.HEDGE: found.hedge_s,
        }
        # Calls cost something, and so does a change of mind.
        times[self._taken] *= _CLEARLY
        return min(times, key=lambda mode: times[mode])

    @property
    def patience_s(self) -> float:
        """How long decoding goes on beside a call; one far beyond its time may be held up by it."""
        if self.mode is Mode.WAIT:
            return -1.0
        auto = self._mode is Mode.AUTO
        return _PATIENCE * self._experience.call_s.value if auto else math.inf

    @property
    def _cost(self) -> float:
        branches = self._experience.branches
        return _USUAL_COST if branches is None else branches.batch_s / branches.step_s

    @property
    def ahead(self) -> int:
        """How many tokens the next call is to bring beyond the one it is made for."""
        if self._prefetch is not None:
            return self._prefetch
        if self._mode is not Mode.AUTO:
            return 0
        seen = self._experience
        if not seen.call_s.seen:
            return 0
        if not seen.run_s.seen:
            return PREFETCH_TOKENS
        pays = seen.run_s.value * (1 - seen.answered.value) < seen.call_s.value
        return PREFETCH_TOKENS if pays != self._tries else 0

    @property
    def _tries(self) -> bool:
        """Whether it is time to look at what was not taken."""
        return self._experience.calls % _TRY_EVERY == _TRY_EVERY - 1

    def begun(self) -> None:
        """A call was begun."""
        self._taken = self.mode
        self._experience.begun += 1

    def may_ask_early(self, *, likeliest: bool, joined: int) -> bool:
        """Whether a call may be made for a position that may never be reached.

        Within a ceiling that is one of the `likeliest` row only. `joined` positions wait for tokens
        of other calls, and may come to need calls of their own.
        """
        if self._ceiling is None:
            return True
        seen = self._experience
        # The position that is waited for will be escalated.
        return likeliest and seen.begun + joined + 1 <= self._ceiling * (seen.needed + 1)

    def advice(self) -> str | None:
        """Once in a session: that streaming the large model would be faster, with the figures."""
        seen = self._experience
        if seen.told or seen.large_step_s.seen < 2 or seen.call_s.seen < 2:
            return None
        large_s = seen.large_step_s.value
        step_s, call_s, rate = seen.step_s.value, seen.call_s.value, seen.rate.value
        if not call_s or rate <= (large_s - step_s) / call_s:
            return None
        seen.told = True
        return (
            "streaming the large model would be faster: it writes a token in"
            f" {large_s * 1e3:,.0f} ms, the small one in {step_s * 1e3:,.0f} ms, and {rate:.1%} of"
            f" the positions cost a call of {call_s * 1e3:,.0f} ms"
        )

    def why(self) -> str:
        """What was chosen and from which figures; nothing before the first call."""
        seen = self._experience
        if not seen.call_s.seen or self._mode is not Mode.AUTO:
            return ""
        return (
            f"{self.mode}: call {seen.call_s.value:.2g} s, step {seen.step_s.value:.2g} s,"
            f" agreement {seen.agreement.value:.0%}, coverage {seen.coverage.value:.0%}"
        )
