"""The speed of every mode at set call times: measured with a delayed server, and simulated.

The simulation runs the same engine on a virtual clock, with the same answers and with the measured
step and batch times. Without the measurement, a whole grid takes minutes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from mlxroute.bench.delayed_server import DELAYS, DelayedServer
from mlxroute.bench.latency_figures import point_figures, side_figures
from mlxroute.bench.latency_sides import SIDES, LatencyGrid, LatencySide, SideAnswers
from mlxroute.bench.measurement import run_interleaved
from mlxroute.bench.virtual_models import OutputCache, VirtualClock, VirtualLarge, VirtualSmall
from mlxroute.engine import Answer, Experience, Options
from mlxroute.engine.experience import BRANCH_ROWS
from mlxroute.engine.protocols import LargeProtocol, SmallProtocol
from mlxroute.engine.transcript import Transcript, render_prompt
from mlxroute.errors import UsageError
from mlxroute.large import LargeModel
from mlxroute.routers import EntropyRouter
from mlxroute.small import SmallModel
from mlxroute.statistics import intervals
from mlxroute.types import (
    BranchCost,
    LargeContext,
    Message,
    Mode,
    Progress,
    RunStats,
    Token,
    Uploads,
    no_progress,
)

# Tokens of a call that is long enough to measure the time per token.
_LONG_PREFETCH: Final = 32
_TIMEOUT_S: Final = 3600.0


class _LatencyBench:
    """The pair of models, with the measurements that precede the first point."""

    def __init__(
        self,
        small: SmallModel,
        large: LargeModel,
        server: DelayedServer,
        prompts: Sequence[Sequence[Message]],
        grid: LatencyGrid,
        *,
        large_step_s: float,
        progress: Progress,
    ) -> None:
        self._small = small
        self._large = large
        self._server = server
        self._prompts = prompts
        self._grid = grid
        self._large_step_s = large_step_s
        self._progress = progress
        self._answers_done = 0
        self._outputs = OutputCache()
        self.small_only = SideAnswers()
        for prompt in prompts:
            side = LatencySide(Mode.WAIT)
            self.small_only.add(
                *_answer(
                    small,
                    None,
                    prompt,
                    threshold=math.inf,
                    side=side,
                    max_tokens=grid.max_tokens,
                )
            )
        steps_s = [
            interval
            for tokens in self.small_only.tokens
            for interval in intervals([token.time_s for token in tokens])
        ]
        if not steps_s:
            raise UsageError(
                "the small model ends every answer after one token, so that no step can be timed;"
                " use other prompts or another small model",
                parameter="small",
            )
        self.step_s = statistics.median(steps_s)
        measured = _measure_branch_cost(small, prompts)
        # The machine's speed drifts, so only the ratio of these two measurements is used.
        self.batch_over_step = measured.batch_s / measured.step_s
        batch_s = self.batch_over_step * self.step_s
        self.cost = replace(measured, step_s=self.step_s, batch_s=batch_s)

    def compute_thresholds(self) -> dict[float, float]:
        """Return the threshold of each rate, in nats, halfway between two observed entropies."""
        entropies = sorted(
            token.signals.entropy_nats for tokens in self.small_only.tokens for token in tokens
        )
        indices = {rate: round((1.0 - rate) * (len(entropies) - 1)) for rate in self._grid.rates}
        return {
            rate: statistics.fmean(entropies[index : index + 2]) for rate, index in indices.items()
        }

    def report_point(self, rate: float, threshold: float, ratio: float) -> dict[str, Any]:
        """Run all sides at one point of the grid and return its report."""
        call_s = ratio * self.step_s
        forwarded = self._server.forwarded
        simulated = self.simulate(threshold, call_s)
        sides = self.measure(threshold, call_s) if self._grid.measure else simulated
        return {
            "rate": rate,
            "ratio": ratio,
            "call_s": round(call_s, 4),
            "threshold_nats": round(threshold, 4),
            "passed_on": self._server.forwarded - forwarded,
            **point_figures(sides, cost=self.cost, call_s=call_s),
            **_reference_speeds(sides["wait"], simulated, call_s, self._large_step_s),
        }

    def measure(self, threshold: float, call_s: float) -> dict[str, SideAnswers]:
        """Let every side answer all prompts with the delayed server, interleaved."""
        self._server.delay, self._server.delay_s = DELAYS[self._grid.delay], call_s
        self._server.token_s = self._large_step_s
        sides = {name: SideAnswers() for name in SIDES}

        def answerer(name: str) -> Callable[[int], None]:
            def answer(index: int) -> None:
                run, tokens = _answer(
                    self._small,
                    self._large,
                    self._prompts[index],
                    threshold=threshold,
                    side=SIDES[name],
                    max_tokens=self._grid.max_tokens,
                    experience=sides[name].experience,
                )
                sides[name].add(run, tokens)
                self._count_answer()

            return answer

        # The first answer is a warm-up, in which `auto` measures both models.
        run_interleaved({name: answerer(name) for name in SIDES}, rounds=len(self._prompts))
        self._server.delay_s = self._server.token_s = 0.0
        for answers in sides.values():
            answers.drop_first()
        return sides

    def simulate(self, threshold: float, call_s: float) -> dict[str, SideAnswers]:
        """Let every side answer all prompts on a virtual clock."""
        sides = {name: SideAnswers() for name in SIDES}
        for name, answers in sides.items():
            for prompt in [self._prompts[0], *self._prompts]:
                clock = VirtualClock()
                small = VirtualSmall(self._small, self._outputs, clock, self.cost)
                large = VirtualLarge(
                    self._large,
                    self._outputs,
                    clock,
                    call_s=call_s,
                    token_s=self._large_step_s,
                    streams=self._large.can_stream,
                    delay=DELAYS[self._grid.delay],
                )
                run, tokens = _answer(
                    small,
                    large,
                    prompt,
                    threshold=threshold,
                    side=SIDES[name],
                    max_tokens=self._grid.max_tokens,
                    experience=answers.experience,
                    clock=clock,
                )
                answers.add(run, tokens)
                self._count_answer()
            answers.drop_first()
        return sides

    def _count_answer(self) -> None:
        """Report progress after an answer of a point."""
        grid = self._grid
        runs = 2 if grid.measure else 1
        answers_per_run = (1 + len(self._prompts)) * len(SIDES)
        self._answers_done += 1
        self._progress(
            "answers",
            self._answers_done,
            len(grid.rates) * len(grid.ratios) * runs * answers_per_run,
        )


def _measure_branch_cost(small: SmallModel, prompts: Sequence[Sequence[Message]]) -> BranchCost:
    """Measure, after the first prompt that allows it, what batches cost.

    Without such a prompt the cost is that of one row, with which there are no branches.
    """
    for prompt in prompts:
        ids = small.encode_conversation(prompt).ids
        small.prefill(ids)
        rows = min(BRANCH_ROWS, small.max_rows)
        if rows > 1 and small.can_rollback(BRANCH_ROWS):
            return small.measure_branch_cost(ids[-1], rows=rows)
    return BranchCost(rows=1, step_s=1.0, batch_s=1.0, rounding_nats=0.0)


def bench_latency(
    small: SmallModel,
    large: LargeModel,
    server: DelayedServer,
    prompts: Sequence[Sequence[Message]],
    grid: LatencyGrid,
    *,
    large_step_s: float,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return the report of all sides at all points of the grid.

    The simulation comes first and fills the server's record, so that few requests of the
    measurement go to the real server.

    Args:
        small: The small model.
        large: A client of `server`.
        server: Proxy that delays the large model's replies.
        prompts: Conversations to answer.
        grid: Points to measure.
        large_step_s: Seconds per token of a call for several tokens.
        progress: Receives the number of answers so far.
    """
    bench = _LatencyBench(
        small, large, server, prompts, grid, large_step_s=large_step_s, progress=progress
    )
    points = [
        bench.report_point(rate, threshold, ratio)
        for rate, threshold in bench.compute_thresholds().items()
        for ratio in grid.ratios
    ]
    return {
        "small": small.name,
        "large": large.model_name,
        "prompts": len(prompts),
        "tokens": grid.max_tokens,
        "delay": grid.delay,
        "measured": grid.measure,
        "step_s": round(bench.step_s, 5),
        "batch_over_step": None if bench.cost.rows == 1 else round(bench.batch_over_step, 3),
        "large_step_s": round(large_step_s, 5),
        "small_only": side_figures(bench.small_only, None),
        "points": points,
    }


def _reference_speeds(
    wait: SideAnswers, simulated: Mapping[str, SideAnswers], call_s: float, large_step_s: float
) -> dict[str, Any]:
    """Return the simulated speed of each side, and the speed of the large model alone.

    The large model alone takes one call for each answer, then `large_step_s` for each token.
    """
    count = sum(run.tokens for run in wait.stats)
    streaming_s = len(wait.stats) * call_s + count * large_step_s
    return {
        "played_tokens_per_s": {
            name: round(answers.tokens_per_s, 4) for name, answers in simulated.items()
        },
        "large_streaming_tokens_per_s": round(count / streaming_s, 4),
    }


def measure_large_step_s(
    small: SmallModel, large: LargeModel, prompts: Sequence[Sequence[Message]]
) -> float:
    """Return the large model's seconds per token, from calls for one token and for many.

    Where no call returns a second token, each token takes a call.
    """
    calls_s, steps_s = [], []
    for prompt in prompts:
        context = Transcript(render_prompt(small, prompt)).context()
        short_s, short_tokens = _time_call(large, context, prefetch=0)
        long_s, long_tokens = _time_call(large, context, prefetch=_LONG_PREFETCH)
        calls_s.append(short_s)
        # An answer may end before.
        if (further_tokens := long_tokens - short_tokens) > 0:
            steps_s.append(max(0.0, long_s - short_s) / further_tokens)
    return statistics.median(steps_s or calls_s)


def _time_call(large: LargeModel, context: LargeContext, *, prefetch: int) -> tuple[float, int]:
    """Return the seconds of a call, and the number of tokens that the server generated in it."""
    # The first call fills the server's prefix cache, the second is measured.
    for _ in range(2):
        began_s = time.perf_counter()
        call = large.begin(context, prefetch=prefetch)
        call.join()
        tokens = call.result()
    return time.perf_counter() - began_s, Uploads.of_call(context, tokens).completion_tokens


def _answer(
    small: SmallProtocol,
    large: LargeProtocol | None,
    prompt: Sequence[Message],
    *,
    threshold: float,
    side: LatencySide,
    max_tokens: int,
    experience: Experience | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[RunStats, list[Token]]:
    """Write one answer from an empty KV cache; return its statistics and tokens."""
    if isinstance(small, SmallModel):
        small.reset_cache()
    answer = Answer(
        small,
        large,
        prompt,
        router=EntropyRouter(threshold),
        options=Options(
            max_tokens=max_tokens,
            timeout_s=_TIMEOUT_S,
            strict=True,
            mode=side.mode,
            prefetch=side.prefetch,
            call_ceiling=side.call_ceiling,
        ),
        experience=experience,
        clock=clock,
    )
    tokens = list(answer)
    return answer.stats(), tokens
