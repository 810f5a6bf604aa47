"""One routed answer: what is asked, what is committed, and the figures of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence

from mlxroute.engine.commits import Commits
from mlxroute.engine.escalation.calls import Escalator
from mlxroute.engine.escalation.decision import Decider
from mlxroute.engine.escalation.never_send import NeverSend
from mlxroute.engine.modes.ahead_loop import Ahead
from mlxroute.engine.modes.decode_context import Desk
from mlxroute.engine.modes.experience import Experience
from mlxroute.engine.modes.governor import Governor
from mlxroute.engine.modes.wait_loop import wait
from mlxroute.engine.options import Options, parse_mode
from mlxroute.engine.protocols import LargeProtocol, RouterProtocol, SmallProtocol
from mlxroute.engine.transcript import Transcript
from mlxroute.errors import ContextTooLong, UsageError
from mlxroute.statistics import intervals, percentile
from mlxroute.types import (
    Activity,
    Event,
    Message,
    Mode,
    Prices,
    RunStats,
    Sampling,
    Signals,
    Token,
)


class Answer:
    """Iterate it to decode: each item is one committed token. `stats()` may be read any time.

    `activity`, `prefill_done` and `prefill_total` tell another thread what is going on.
    """

    def __init__(
        self,
        small: SmallProtocol,
        large: LargeProtocol | None,
        messages: Sequence[Message],
        *,
        router: RouterProtocol,
        options: Options,
        experience: Experience | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        began_s = clock()
        self._small = small
        self._options = options
        self._prompt_text = small.render(messages)
        self._prompt_ids = small.encode_prompt(self._prompt_text)
        self._check_context()
        self._experience = Experience() if experience is None else experience
        self._governor = Governor(
            options.mode,
            self._experience,
            prefetch=options.prefetch,
            ceiling=options.call_ceiling,
        )
        self._escalator = Escalator(
            large, timeout_s=options.timeout_s, governor=self._governor, clock=clock
        )
        transcript = Transcript(
            small.vocabulary,
            messages,
            prompt_text=self._prompt_text,
            prompt_ids=self._prompt_ids,
        )
        self._decider = Decider(
            router,
            self._escalator,
            transcript,
            eos_ids=small.vocabulary.eos_ids,
            never_send=NeverSend(options.never_send, [each["content"] for each in messages]),
            experience=self._experience,
        )
        limit = min(options.max_tokens, small.context_length - len(self._prompt_ids))
        self._commits = Commits(
            limit=limit,
            stop=options.stop,
            strict=options.strict,
            experience=self._experience,
            began_s=began_s,
            clock=clock,
        )
        self._desk = Desk(
            small=small,
            transcript=transcript,
            decider=self._decider,
            escalator=self._escalator,
            commits=self._commits,
            limit=limit,
            governor=self._governor,
            experience=self._experience,
            clock=clock,
        )
        # A batch would draw other random numbers than a row alone.
        self._ahead = Ahead(self._desk, branching=options.sampling.temperature == 0)
        self._reused = 0
        self._advice: str | None = None
        self._started = False
        self._activity = Activity.PREFILL
        self.prefill_done = 0
        self.prefill_total = len(self._prompt_ids)

    def __iter__(self) -> Iterator[Token]:
        """Decode to the end. Abandoning the iterator leaves the answer `cancelled`.

        Raises UsageError when it was iterated before: decoding cannot be repeated from here.
        """
        return (event for event in self.events() if isinstance(event, Token))

    def events(self) -> Iterator[Event]:
        """Decode as by iteration, and tell of provisional tokens and retractions in between."""
        if self._started:
            raise UsageError("an answer can be iterated once; call generate again")
        self._started = True
        try:
            signals = self._prefill()
            if self._options.mode is Mode.WAIT or not self._escalator.open:
                yield from wait(self._desk, signals)
            else:
                yield from self._ahead.walk(signals)
        finally:
            self._escalator.close()
            self._decider.prefetched.close()
        self._advice = self._governor.advice()
        self._activity = Activity.DONE

    @property
    def activity(self) -> Activity:
        """What is going on."""
        return Activity.WAIT if self._escalator.stalling else self._activity

    def stats(self) -> RunStats:
        """The summary so far; final once the iteration has ended."""
        commits, escalator, prices = self._commits, self._escalator, self._options.prices
        times, uploads = commits.times_s, escalator.uploads
        itl = intervals(times)
        decoding_s = times[-1] - times[0] if len(times) > 1 else 0.0
        return RunStats(
            text=commits.text,
            tokens=len(times),
            large_tokens=commits.large_tokens,
            escalated=commits.escalated,
            agreed=commits.agreed,
            fallbacks=commits.fallbacks,
            unchecked=commits.unchecked,
            withheld=commits.withheld,
            finish_reason=commits.finish,
            prompt_tokens=len(self._prompt_ids),
            cached_prompt_tokens=self._reused,
            ttft_s=times[0] if times else 0.0,
            itl_p50_s=percentile(itl, 0.50),
            itl_p95_s=percentile(itl, 0.95),
            stall_s=escalator.stall_s,
            tokens_per_s=len(itl) / decoding_s if decoding_s > 0 else 0.0,
            total_s=times[-1] if times else 0.0,
            requests=uploads.requests,
            uploaded_tokens=uploads.tokens,
            uploaded_bytes=uploads.size_bytes,
            large_cached_tokens=uploads.cached_tokens,
            large_completion_tokens=uploads.completion_tokens,
            cost_estimate=None if prices is None else prices.cost(uploads),
            mode=self._governor.mode,
            calls=escalator.begun,
            retracted=self._ahead.retracted,
            prefetch_generated=self._decider.prefetched.generated,
            prefetch_used=commits.prefetch_used,
            held=self._ahead.held,
            redecoded=self._ahead.redecoded,
            plan=self._governor.why(),
            advice=self._advice,
        )

    def _check_context(self) -> None:
        count, room = len(self._prompt_ids), self._small.context_length
        if count == 0:
            raise UsageError("the prompt is empty")
        if count >= room:
            raise ContextTooLong(
                f"the prompt is {count:,} tokens and the small model's context holds {room:,};"
                " shorten it, or use /reset in a chat"
            )

    def _prefill(self) -> Signals:
        signals, self._reused = self._small.prefill(
            self._prompt_ids, sampling=self._options.sampling, progress=self._on_prefill
        )
        self._activity = Activity.DECODE
        return signals

    def _on_prefill(self, label: str, done: int, total: int | None) -> None:
        self.prefill_done = done


def generate(  # noqa: PLR0913 - the options of the command line, by the same names
    small: SmallProtocol,
    large: LargeProtocol | None,
    messages: Sequence[Message] | str,
    *,
    router: RouterProtocol,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    timeout_s: float = 30.0,
    strict: bool = False,
    never_send: Sequence[re.Pattern[str]] = (),
    prices: Prices | None = None,
    mode: Mode | str = Mode.AUTO,
    prefetch: int | None = None,
    call_ceiling: float | None = None,
    experience: Experience | None = None,
) -> Answer:
    """Answer a conversation (or one user message) with the small model, escalating as told.

    Iterate the result to decode it token by token. Escalated positions take the large model's
    most likely token; temperature, top-p and seed shape the small model's own. `large=None` means
    every position is the small model's; so is one whose context a `never_send` pattern matches,
    and every later one. `prices` give `stats()` a cost estimate. `mode` and `prefetch` (tokens that
    each call brings beyond the one asked for) change the time it takes and not the answer; nor do
    `call_ceiling` (calls for each escalated position, at most) and `experience`, what earlier
    answers taught about both models, and the calls they took. Raises
    UsageError and ContextTooLong before any work; while iterating, LargeError only if `strict`.
    """
    if isinstance(messages, str):
        if not messages.strip():
            raise UsageError("the prompt is empty")
        messages = [{"role": "user", "content": messages}]
    options = Options(
        max_tokens=max_tokens,
        stop=tuple(stop),
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        timeout_s=timeout_s,
        strict=strict,
        never_send=tuple(never_send),
        prices=prices,
        mode=parse_mode(mode),
        prefetch=prefetch,
        call_ceiling=call_ceiling,
    )
    return Answer(small, large, messages, router=router, options=options, experience=experience)
