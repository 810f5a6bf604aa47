"""How fast answers are while the large model is waited for, in every mode, at set call times.

Measured before a server that takes its time, and played on a virtual clock: the same engine and the
same answers, with the step, batch and call times that were measured. Played alone, the whole grid
takes minutes.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from mlxroute.bench.delayed_server import DELAYS, DelayedServer
from mlxroute.bench.latency_figures import figures, side_figures
from mlxroute.bench.latency_sides import SIDES, Answers, LatencySide
from mlxroute.bench.measurement import interleaved
from mlxroute.bench.virtual_models import Known, VirtualClock, VirtualLarge, VirtualSmall
from mlxroute.engine import Answer, Experience, Options
from mlxroute.engine.experience import BRANCH_ROWS
from mlxroute.engine.protocols import LargeProtocol, SmallProtocol
from mlxroute.engine.transcript import Transcript, render_prompt
from mlxroute.large import LargeModel
from mlxroute.routers import EntropyRouter
from mlxroute.small import SmallModel
from mlxroute.statistics import intervals
from mlxroute.types import Message, Mode, Progress, RunStats, Token, no_progress

_MANY: Final = 32
_TIMEOUT_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Answers of up to `tokens` at call times of `ratios` steps and at these escalation rates.

    With `measure` they are waited for, too.
    """

    tokens: int
    ratios: Sequence[float]
    rates: Sequence[float]
    delay: str
    measure: bool = True


class _Bench:
    """The pair, and what is known of it."""

    def __init__(
        self,
        small: SmallModel,
        large: LargeModel,
        server: DelayedServer,
        prompts: Sequence[Sequence[Message]],
        grid: Grid,
        large_step_s: float,
    ) -> None:
        self._small = small
        self._large = large
        self._server = server
        self._prompts = prompts
        self._grid = grid
        self._large_step_s = large_step_s
        self._known = Known()
        self.alone = [
            _answer(small, None, prompt, math.inf, LatencySide(Mode.WAIT), grid.tokens)
            for prompt in prompts
        ]
        self.step_s = statistics.median(
            gap for _, each in self.alone for gap in intervals([token.time_s for token in each])
        )
        ids = small.encode_prompt(small.render(prompts[0]))
        small.prefill(ids)
        found = small.measure_branch_cost(ids[-1], rows=BRANCH_ROWS)
        # How much longer a batch takes is compared in the same seconds.
        self.batch_over_step = found.batch_s / found.step_s
        batch_s = self.batch_over_step * self.step_s
        self.cost = replace(found, step_s=self.step_s, batch_s=batch_s)

    def thresholds(self) -> dict[float, float]:
        """The threshold of each rate, in nats; between two positions, so that none lies on it."""
        found = sorted(token.signals.entropy_nats for _, each in self.alone for token in each)
        below = {rate: round((1.0 - rate) * (len(found) - 1)) for rate in self._grid.rates}
        return {rate: statistics.fmean(found[at : at + 2]) for rate, at in below.items()}

    def measured(
        self, threshold: float, call_s: float, counted: Callable[[], None]
    ) -> dict[str, Answers]:
        """Every side before the server, in turns."""
        self._server.delay, self._server.delay_s = DELAYS[self._grid.delay], call_s
        self._server.token_s = self._large_step_s
        sides = {name: Answers() for name in SIDES}

        def answering(name: str) -> Callable[[int], None]:
            def answer(index: int) -> None:
                prompt, tokens = self._prompts[index], self._grid.tokens
                seen = sides[name].experience
                found = _answer(
                    self._small, self._large, prompt, threshold, SIDES[name], tokens, seen
                )
                sides[name].add(*found)
                counted()

            return answer

        turns = {name: answering(name) for name in SIDES}
        # The first answer is that in which `auto` gets to know both models.
        interleaved(turns, rounds=len(self._prompts))
        self._server.delay_s = self._server.token_s = 0.0
        for answers in sides.values():
            answers.forget_first()
        return sides

    def played(
        self, threshold: float, call_s: float, counted: Callable[[], None]
    ) -> dict[str, Answers]:
        """Every side on a virtual clock."""
        sides = {name: Answers() for name in SIDES}
        for name, answers in sides.items():
            for prompt in [self._prompts[0], *self._prompts]:
                clock = VirtualClock()
                small = VirtualSmall(self._small, self._known, clock, self.cost)
                large = VirtualLarge(
                    self._large,
                    self._known,
                    clock,
                    call_s=call_s,
                    token_s=self._large_step_s,
                    streams=self._large.can_stream,
                    delay=DELAYS[self._grid.delay],
                )
                tokens, seen = self._grid.tokens, answers.experience
                found = _answer(small, large, prompt, threshold, SIDES[name], tokens, seen, clock)
                answers.add(*found)
                counted()
            answers.forget_first()
        return sides


def bench_latency(
    small: SmallModel,
    large: LargeModel,
    server: DelayedServer,
    prompts: Sequence[Sequence[Message]],
    grid: Grid,
    *,
    large_step_s: float,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """All sides over the grid.

    `large` talks to `server`, which keeps what is asked while playing: then little is passed on.
    `large_step_s` is what the large model itself takes for a token when it goes on writing: calls
    for several take as much longer.
    """
    bench = _Bench(small, large, server, prompts, grid, large_step_s)
    runs = 2 if grid.measure else 1
    total = len(grid.rates) * len(grid.ratios) * runs * (1 + len(prompts)) * len(SIDES)
    done = itertools.count(1)

    def counted() -> None:
        progress("answers", next(done), total)

    found = []
    for rate, threshold in bench.thresholds().items():
        for ratio in grid.ratios:
            call_s = ratio * bench.step_s
            missed = server.missed
            played = bench.played(threshold, call_s, counted)
            sides = bench.measured(threshold, call_s, counted) if grid.measure else played
            found.append(
                {
                    "rate": rate,
                    "ratio": ratio,
                    "call_s": round(call_s, 4),
                    "threshold_nats": round(threshold, 4),
                    "passed_on": server.missed - missed,
                    **figures(sides, cost=bench.cost, call_s=call_s),
                    "played_tokens_per_s": {
                        name: round(each.tokens_per_s, 4) for name, each in played.items()
                    },
                    "large_streaming_tokens_per_s": _streaming(sides["wait"], call_s, large_step_s),
                }
            )
    return {
        "small": small.name,
        "large": large.model_name,
        "prompts": len(prompts),
        "tokens": grid.tokens,
        "delay": grid.delay,
        "measured": grid.measure,
        "step_s": round(bench.step_s, 5),
        "batch_over_step": round(bench.batch_over_step, 3),
        "large_step_s": round(large_step_s, 5),
        "small_only": side_figures(Answers(stats=[stats for stats, _ in bench.alone]), None),
        "points": found,
    }


def large_step_seconds(
    small: SmallModel, large: LargeModel, prompts: Sequence[Sequence[Message]]
) -> float:
    """What a token takes the large model when it goes on writing, by calls for one and for many."""
    waits: dict[int, list[float]] = {0: [], _MANY: []}
    for prompt in prompts:
        context = Transcript(render_prompt(small, prompt)).context()
        for prefetch, found in waits.items():
            # Once for the server's prompt cache.
            for _ in range(2):
                began_s = time.perf_counter()
                flight = large.begin(context, prefetch=prefetch)
                flight.join()
                flight.result()
            found.append(time.perf_counter() - began_s)
    one, many = (statistics.median(found) for found in waits.values())
    return max(0.0, many - one) / _MANY


def _streaming(waited: Answers, call_s: float, step_s: float) -> float:
    """Tokens/s if the large model wrote these answers: one call, then a token a step."""
    count = sum(each.tokens for each in waited.stats)
    return round(count / (len(waited.stats) * call_s + count * step_s), 4)


def _answer(
    small: SmallProtocol,
    large: LargeProtocol | None,
    prompt: Sequence[Message],
    threshold: float,
    side: LatencySide,
    tokens: int,
    experience: Experience | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[RunStats, list[Token]]:
    if isinstance(small, SmallModel):
        small.rollback(len(small.cached_ids))
    answer = Answer(
        small,
        large,
        prompt,
        router=EntropyRouter(threshold),
        options=Options(
            max_tokens=tokens,
            timeout_s=_TIMEOUT_S,
            mode=side.mode,
            prefetch=side.prefetch,
            call_ceiling=side.ceiling,
        ),
        experience=experience,
        clock=clock,
    )
    found = list(answer)
    return answer.stats(), found
