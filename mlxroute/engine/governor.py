"""The governor of `auto`: picks a mode and a prefetch from measurements, within a call ceiling.

With a the seconds of a decode step, R those of a call, p the share of positions that are escalated,
q the large model's agreement there, c its coverage by the branches, and b the cost of a step of all
branches in steps of one row, the expected seconds of a token are to first order

    wait: a + p R      overlap: a + p (1 - q) R      hedge: a + p R (1 - c / b)

For overlap and hedge, a and R are the times while the other is under way. Derivation: a wait costs
R at each escalation; overlap hides it where the models agree; hedge hides it in the share c of
cases where a branch already holds the large token, at b steps' cost for each decoded token.
Where no decision of a batch would stand, there are no branches, and hedge is not picked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from mlxroute.engine.experience import Experience
from mlxroute.types import Mode

# Tokens that a call prefetches under auto, where that pays.
PREFETCH_TOKENS: Final = 16
# The alternative is measured again once in this many calls.
_TRY_EVERY: Final = 24
# Assumed cost of a batch of branches, in steps, until it is measured.
_ASSUMED_BRANCH_COST: Final = 1.5
# Decoding pauses when a call takes this many times the average: decoding may be delaying it.
_OVERDUE: Final = 4.0
# Calls to a server on this machine that are measured before decoding goes on beside one.
_LOCAL_CALLS: Final = 2
# A step that takes this many times its average is slowed by a call on this machine.
_SLOWED: Final = 3.0
# Slowed steps of an answer may cost this share of a call's time, which decoding hides.
_SLOWED_SHARE: Final = 0.5
# Switch modes only for gains above 5 %.
_SWITCH_GAIN: Final = 0.95


@dataclass(frozen=True, slots=True)
class ModeTimes:
    """Expected seconds of a committed token in each mode."""

    wait_s: float
    overlap_s: float
    hedge_s: float


def expected_mode_times(experience: Experience, *, branch_cost: float) -> ModeTimes:
    """Return the expected times by the module's formulas; `branch_cost` is b."""
    step_s, call_s = experience.step_s.value, experience.call_s.value
    rate = experience.escalation_rate.value
    shared_step_s = step_s * experience.step_slowdown.value
    shared_call_s = call_s * experience.call_slowdown.value
    disagreement = 1 - experience.agreement.value
    uncovered = max(0.0, 1 - experience.coverage.value / branch_cost)
    return ModeTimes(
        wait_s=step_s + rate * call_s,
        overlap_s=shared_step_s + rate * disagreement * shared_call_s,
        hedge_s=shared_step_s + rate * shared_call_s * uncovered,
    )


class Governor:
    """Picks the mode, the prefetch and the calls of one answer.

    Args:
        mode: A fixed mode, or auto.
        experience: The measurements to decide by.
        prefetch: Tokens that each call prefetches; None leaves the number to the mode.
        call_ceiling: Maximum number of calls of a session, in calls per escalated position; None
            sets no limit.
        is_local: Whether the server runs on this machine. Under auto, decoding then goes on beside
            a call, and calls prefetch, only where the cores suffice for both, and not for some
            time after calls have slowed its steps.
        max_rounding_nats: Rounding of batches, in nats, from which on every decision of a batch is
            made again; inf, the default, if there is none.
    """

    def __init__(
        self,
        mode: Mode,
        experience: Experience,
        *,
        prefetch: int | None,
        call_ceiling: float | None,
        is_local: bool = False,
        max_rounding_nats: float = math.inf,
    ) -> None:
        self._mode = mode
        self._experience = experience
        self._prefetch = prefetch
        self._call_ceiling = call_ceiling
        self.is_local = is_local
        self._max_rounding_nats = max_rounding_nats
        self._last_mode = Mode.WAIT
        # Seconds that slowed steps of this answer took beyond their average.
        self._slowed_s = 0.0

    @property
    def mode(self) -> Mode:
        """The mode to use now."""
        experience = self._experience
        if self._mode is not Mode.AUTO:
            return self._mode
        if self._must_wait:
            return Mode.WAIT
        # Measure a call alone first; one as short as a step leaves nothing to gain.
        if not experience.call_s.count or experience.call_s.value < experience.step_s.value:
            return Mode.WAIT
        # Then measure one while decoding goes on.
        if not experience.has_call_slowdown or self._is_trial:
            return Mode.OVERLAP
        expected = expected_mode_times(experience, branch_cost=self._branch_cost)
        times_s = {
            Mode.WAIT: expected.wait_s,
            Mode.OVERLAP: expected.overlap_s,
            Mode.HEDGE: expected.hedge_s if self._has_branches else math.inf,
        }
        times_s[self._last_mode] *= _SWITCH_GAIN
        return min(times_s, key=lambda mode: times_s[mode])

    @property
    def prefetch(self) -> int:
        """The number of tokens that the next call prefetches."""
        experience = self._experience
        if self._prefetch is not None:
            return self._prefetch
        if self._mode is not Mode.AUTO or not experience.call_s.count or self._must_wait:
            return 0
        if not experience.prefetch_call_s.count:
            return PREFETCH_TOKENS
        missed = 1 - experience.prefetch_hit_rate.value
        is_worthwhile = experience.prefetch_call_s.value * missed < experience.call_s.value
        return PREFETCH_TOKENS if is_worthwhile != self._is_trial else 0

    def on_call_started(self) -> None:
        """Remember the mode in which a call was started."""
        self._last_mode = self.mode

    def on_shared_step(self, seconds: float) -> bool:
        """Record a step beside a call; return whether calls slow steps so much that it should stop.

        Only auto stops, and only where the server runs on this machine.
        """
        average = self._experience.step_s
        is_slowed = average.count > 1 and seconds > _SLOWED * average.value
        if not (is_slowed and self.is_local and self._mode is Mode.AUTO):
            return False
        self._slowed_s += seconds - average.value
        if self._slowed_s <= _SLOWED_SHARE * self._experience.call_s.value:
            return False
        self._slowed_s = 0.0
        self._experience.on_slowed_steps()
        return True

    def may_decode_ahead(self, oldest_call_s: float | None) -> bool:
        """Return whether decoding may go on while calls are in flight.

        `oldest_call_s` is the age of the oldest call in seconds, None without calls in flight.
        """
        if oldest_call_s is None:
            return True
        if self.mode is Mode.WAIT:
            return False
        if self._mode is not Mode.AUTO:
            return True
        return oldest_call_s <= _OVERDUE * self._experience.call_s.value

    def may_batch(self, rounding_nats: float) -> bool:
        """Return whether some decisions of a batch stand, if it rounds by up to this much."""
        return rounding_nats < self._max_rounding_nats

    def may_call_speculatively(self, *, is_likeliest: bool, joined: int) -> bool:
        """Return whether a call may be made for a position that may never be reached.

        Under a ceiling only the likeliest branch gets such calls. `joined` positions wait for
        prefetched tokens, and may still need calls of their own.
        """
        if self._call_ceiling is None:
            return True
        experience = self._experience
        # The position that is pending now counts as escalated.
        allowed = self._call_ceiling * (experience.escalated_positions + 1)
        return is_likeliest and experience.started_calls + joined + 1 <= allowed

    def explain(self) -> str:
        """Return the mode that `auto` picks and the figures behind it.

        Empty for a fixed mode, and until the first call is answered.
        """
        experience = self._experience
        if not experience.call_s.count or self._mode is not Mode.AUTO:
            return ""
        return (
            f"{self.mode}: call {experience.call_s.value:.2g} s,"
            f" step {experience.step_s.value:.2g} s,"
            f" agreement {experience.agreement.value:.0%},"
            f" coverage {experience.coverage.value:.0%}"
        )

    @property
    def _must_wait(self) -> bool:
        """Whether decoding beside a call would, or might, slow both models down."""
        experience = self._experience
        if not self.is_local:
            return False
        return experience.call_s.count < _LOCAL_CALLS or experience.machine_is_busy

    @property
    def _has_branches(self) -> bool:
        """Whether branches can be decoded as a batch, as far as its rounding is measured."""
        cost = self._experience.branch_cost
        return self.may_batch(0.0 if cost is None else cost.rounding_nats)

    @property
    def _branch_cost(self) -> float:
        cost = self._experience.branch_cost
        return _ASSUMED_BRANCH_COST if cost is None else cost.batch_s / cost.step_s

    @property
    def _is_trial(self) -> bool:
        """Whether the alternative is to be measured again."""
        return self._experience.answered_calls % _TRY_EVERY == _TRY_EVERY - 1
