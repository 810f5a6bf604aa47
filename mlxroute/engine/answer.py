"""One routed answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mlxroute.engine.advice import advise
from mlxroute.engine.commits import Commits
from mlxroute.engine.escalation.calls import AnswerCalls
from mlxroute.engine.escalation.decision import Decider
from mlxroute.engine.escalation.failures import AnswerFailures
from mlxroute.engine.escalation.never_send import NeverSend
from mlxroute.engine.escalation.prefetch import PrefetchedTokens
from mlxroute.engine.experience import Experience
from mlxroute.engine.governor import Governor
from mlxroute.engine.modes.ahead_loop import AheadLoop
from mlxroute.engine.modes.decode_context import DecodeContext
from mlxroute.engine.modes.wait_loop import wait_loop
from mlxroute.engine.options import Options
from mlxroute.engine.protocols import (
    BatchingProtocol,
    LargeProtocol,
    RouterProtocol,
    SmallProtocol,
)
from mlxroute.engine.transcript import RenderedPrompt, render_prompt
from mlxroute.errors import UsageError
from mlxroute.statistics import intervals, percentile
from mlxroute.types import (
    Activity,
    Event,
    Message,
    Mode,
    OnFailure,
    RunStats,
    Signals,
    Token,
    Uploads,
    ignore_failure,
)


class Answer:
    """An answer that is decoded by iterating over it, one committed `Token` at a time.

    `generate` makes one. `stats()` and the attributes may be read at any time, also from another
    thread.

    Args:
        small: The small model.
        large: The large model; None where no position can be escalated.
        messages: The conversation, ending with the user's message.
        router: Scores positions; its state goes on from answer to answer.
        options: Limits, sampling and mode.
        experience: Measurements of the pair from earlier answers; a new object by default.
        on_failure: Called at the first failure of each kind; by default failures are only counted.
        clock: Returns seconds; `time.perf_counter` by default.
        batching: Reports when the small model decoded this answer in a batch with others, so that
            decisions that rounding could change are repeated. None (default) if the text may depend
            on batching.
        answer_start: The text of the assistant's turn that the answer continues, already part of
            the prompt that `small.encode_conversation` returns. Empty by default.

    Attributes:
        prefill_done: Tokens of the prompt that the small model has read.
        prefill_total: Tokens of the prompt.

    Raises:
        UsageError: The prompt is empty.
        ContextTooLong: The prompt does not fit in the small model's context.
    """

    def __init__(  # noqa: PLR0913 - two models, and what several answers share
        self,
        small: SmallProtocol,
        large: LargeProtocol | None,
        messages: Sequence[Message],
        *,
        router: RouterProtocol,
        options: Options,
        experience: Experience | None = None,
        on_failure: OnFailure = ignore_failure,
        clock: Callable[[], float] = time.perf_counter,
        batching: BatchingProtocol | None = None,
        answer_start: str = "",
    ) -> None:
        began_s = clock()
        self._prefill_s = 0.0
        self._failures = AnswerFailures(on_failure)
        self._small = small
        self._options = options
        self._prompt = render_prompt(small, messages, answer_start=answer_start)
        self._context = _decode_context(
            small,
            large,
            self._prompt,
            router,
            options,
            experience=Experience() if experience is None else experience,
            failures=self._failures,
            began_s=began_s,
            clock=clock,
            batching=batching,
        )
        self._ahead = AheadLoop(self._context)
        self._reused = 0
        self._started = False
        # Until it is iterated over, the answer takes no time.
        self._ready_s = clock()
        self._final: RunStats | None = None
        self._stopped_s = 0.0
        self._activity = Activity.PREFILL
        self.prefill_done = 0
        self.prefill_total = len(self._prompt.ids)

    def __iter__(self) -> Iterator[Token]:
        """Decode to the end and yield the committed tokens.

        If the iterator is dropped before, the finish reason stays `cancelled`. Raises UsageError at
        a second iteration, and if another answer was begun on the small model before the end.
        """
        return (event for event in self.events() if isinstance(event, Token))

    def events(self) -> Iterator[Event]:
        """Decode to the end and yield committed tokens, provisional tokens and retractions."""
        if self._started:
            raise UsageError("an answer can be iterated only once; call generate again")
        self._started = True
        context = self._context
        context.commits.skip(context.clock() - self._ready_s)
        context.calls.begin()
        context.claim.take(self._small)
        try:
            signals = self._prefill()
            is_waiting = self._options.mode is Mode.WAIT or not context.calls.is_open
            # The other loop also makes decisions again that the rounding of a batch with other
            # answers could change.
            if is_waiting and context.batching is None:
                yield from wait_loop(context, signals)
            else:
                yield from self._ahead.run(signals)
        except BaseException as exc:
            # A reader that only leaves may do so long after the last token.
            if not (context.commits.ended or isinstance(exc, GeneratorExit)):
                self._stopped_s = context.commits.elapsed_s
            raise
        finally:
            context.calls.close()
            context.prefetched.close()
            # Later answers of the same models change what the figures are computed from.
            self._final = final = self._stats_so_far()
        prices = self._options.prices
        whole = Uploads(tokens=final.prompt_tokens, completion_tokens=final.tokens)
        whole_cost = 0.0 if prices is None else prices.cost(whole)
        calls_cost = final.cost_estimate or 0.0
        advice = advise(context.experience, calls_cost=calls_cost, whole_cost=whole_cost)
        self._final = replace(final, advice=advice)
        self._activity = Activity.DONE

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids of the rendered prompt."""
        return self._prompt.ids

    @property
    def activity(self) -> Activity:
        """What the answer is doing now."""
        return Activity.WAIT if self._context.calls.is_stalling else self._activity

    def stats(self) -> RunStats:
        """Return the summary so far; final once the iteration has ended."""
        return self._final or self._stats_so_far()

    def _stats_so_far(self) -> RunStats:
        context, prices = self._context, self._options.prices
        commits, calls, governor = context.commits, context.calls, context.governor
        times_s, uploads = commits.times_s, calls.uploads
        itl_s = intervals(times_s)
        # The call for the first token, which may bring others, is part of the time.
        decoding_s = times_s[-1] - self._prefill_s if len(times_s) > 1 else 0.0
        return RunStats(
            text=commits.text,
            tokens=len(times_s),
            large_tokens=commits.large_tokens,
            escalated=commits.escalated,
            agreed=commits.agreed,
            fallbacks=commits.fallbacks,
            unchecked=commits.unchecked,
            withheld=commits.withheld,
            finish_reason=commits.finish_reason,
            prompt_tokens=len(self._prompt.ids),
            cached_prompt_tokens=self._reused,
            ttft_s=times_s[0] if times_s else 0.0,
            itl_p50_s=percentile(itl_s, 0.50),
            itl_p95_s=percentile(itl_s, 0.95),
            stall_s=calls.stall_s,
            tokens_per_s=len(itl_s) / decoding_s if decoding_s > 0 else 0.0,
            total_s=max(self._stopped_s, times_s[-1] if times_s else 0.0),
            requests=uploads.requests,
            uploaded_tokens=uploads.tokens,
            uploaded_bytes=uploads.size_bytes,
            large_cached_tokens=uploads.cached_tokens,
            large_completion_tokens=uploads.completion_tokens,
            cost_estimate=None if prices is None else prices.cost(uploads),
            mode=governor.mode,
            calls=calls.started,
            retracted=self._ahead.provisional.retracted,
            prefetch_generated=context.prefetched.generated,
            prefetch_used=commits.prefetch_used,
            held=self._ahead.was_blocked,
            redecoded=self._ahead.redecoded,
            accepted=commits.accepted,
            plan=governor.explain(),
            failures=self._failures.all,
        )

    def _prefill(self) -> Signals:
        signals, self._reused = self._small.prefill(
            self._prompt.ids, sampling=self._options.sampling, progress=self._on_prefill
        )
        self._prefill_s = self._context.commits.elapsed_s
        self._activity = Activity.DECODE
        return signals

    def _on_prefill(self, label: str, done: int, total: int | None) -> None:
        self.prefill_done = done


def _decode_context(  # noqa: PLR0913 - the collaborators of an answer
    small: SmallProtocol,
    large: LargeProtocol | None,
    prompt: RenderedPrompt,
    router: RouterProtocol,
    options: Options,
    *,
    experience: Experience,
    failures: AnswerFailures,
    began_s: float,
    clock: Callable[[], float],
    batching: BatchingProtocol | None,
) -> DecodeContext:
    """Build the collaborators of an answer, whose time counts from `began_s`."""
    max_tokens = min(options.max_tokens, small.context_length - len(prompt.ids))
    governor = _make_governor(large, router, options, experience)
    calls = AnswerCalls(
        large,
        max_tokens=max_tokens,
        timeout_s=options.timeout_s,
        governor=governor,
        experience=experience,
        clock=clock,
    )
    prefetched = PrefetchedTokens()
    decider = Decider(
        router,
        calls,
        vocabulary=small.vocabulary,
        accept_within=options.accept_within,
        never_send=NeverSend(options.never_send, [item["content"] for item in prompt.messages]),
        experience=experience,
        prefetched=prefetched,
    )
    commits = Commits(
        max_tokens=max_tokens,
        stop=options.stop,
        strict=options.strict,
        experience=experience,
        failures=failures,
        began_s=began_s,
        clock=clock,
    )
    return DecodeContext(
        small=small,
        prompt=prompt,
        decider=decider,
        calls=calls,
        prefetched=prefetched,
        commits=commits,
        max_tokens=max_tokens,
        governor=governor,
        experience=experience,
        clock=clock,
        batching=batching,
    )


def _make_governor(
    large: LargeProtocol | None, router: RouterProtocol, options: Options, experience: Experience
) -> Governor:
    return Governor(
        options.mode,
        experience,
        prefetch=options.prefetch,
        call_ceiling=options.call_ceiling,
        is_local=large is not None and large.is_local,
        max_rounding_nats=_max_rounding_nats(router, options),
    )


def _max_rounding_nats(router: RouterProtocol, options: Options) -> float:
    """Return the rounding of batches from which on every decision of a batch is made again."""
    if not options.sampling.is_greedy:
        # A batch would draw other random numbers than a single row.
        return 0.0
    return router.state.max_band / router.gain if router.gain else math.inf
