"""One routed answer: the decode loop of the `wait` mode."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mlxroute.engine.escalation import Escalator
from mlxroute.engine.privacy import NeverSend
from mlxroute.engine.roles import Large, Router, Small
from mlxroute.engine.stats import gaps, percentile
from mlxroute.engine.text import CharacterStream, SpanLog, StopStrings
from mlxroute.errors import ContextTooLong, UsageError
from mlxroute.types import (
    Activity,
    Escalation,
    LargeContext,
    Message,
    Prices,
    RunStats,
    Sampling,
    Signals,
    Source,
    StopReason,
    Token,
)

_LONGEST_TIMEOUT_S = 86_400


@dataclass(frozen=True, slots=True)
class Options:
    """Limits and sampling of one answer; `timeout_s` bounds a call and all faults together.

    Positions whose context a pattern of `never_send` matches anywhere are not escalated.
    """

    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    timeout_s: float = 30.0
    strict: bool = False
    never_send: tuple[re.Pattern[str], ...] = ()
    prices: Prices | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if not 0 < self.timeout_s <= _LONGEST_TIMEOUT_S:
            raise UsageError(
                f"--timeout must be above 0 and at most {_LONGEST_TIMEOUT_S} seconds,"
                f" not {self.timeout_s:g}"
            )
        if self.sampling.seed is not None and not 0 <= self.sampling.seed < 2**64:
            raise UsageError(f"--seed must be from 0 to 2^64 - 1, not {self.sampling.seed}")
        if not 0 <= self.sampling.temperature < math.inf:
            raise UsageError(f"--temperature must be 0 or more, not {self.sampling.temperature:g}")
        if not 0 < self.sampling.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, not {self.sampling.top_p:g}")


@dataclass(frozen=True, slots=True)
class _Decision:
    """What to commit at a position, and how it came about."""

    signals: Signals
    score: float
    token_ids: tuple[int, ...]
    source: Source
    ends: bool
    escalation: Escalation | None = None
    checked: bool = True


class Answer:
    """Iterate it to decode: each item is one committed token. `stats()` may be read any time.

    `activity`, `prefill_done` and `prefill_total` tell another thread what is going on.
    """

    def __init__(
        self,
        small: Small,
        large: Large | None,
        messages: Sequence[Message],
        *,
        router: Router,
        options: Options,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._small = small
        self._router = router
        self._options = options
        self._clock = clock
        self._began_s = clock()
        self._messages = tuple(messages)
        self._prompt_text = small.render(messages)
        self._prompt_ids = small.encode_prompt(self._prompt_text)
        self._check_context()
        self._limit = min(options.max_tokens, small.context_length - len(self._prompt_ids))
        self._escalator = Escalator(
            large,
            never_send=NeverSend(options.never_send, [each["content"] for each in messages]),
            timeout_s=options.timeout_s,
            strict=options.strict,
            clock=clock,
        )
        self._characters = CharacterStream()
        self._stop_strings = StopStrings(options.stop)
        self._spans = SpanLog()
        self._answer_ids: list[int] = []
        self._raw_text: list[str] = []
        self._shown_text: list[str] = []
        self._times_s: list[float] = []
        self._large_tokens = 0
        self._unchecked = 0
        self._reused = 0
        self._started = False
        self._finish = StopReason.CANCELLED
        self.activity = Activity.PREFILL
        self.prefill_done = 0
        self.prefill_total = len(self._prompt_ids)

    def __iter__(self) -> Iterator[Token]:
        """Decode to the end. Abandoning the iterator leaves the answer `cancelled`.

        Raises UsageError when it was iterated before: decoding cannot be repeated from here.
        """
        if self._started:
            raise UsageError("an answer can be iterated once; call generate again")
        self._started = True
        signals = self._prefill()
        while True:
            decision = self._decide(signals)
            yield from self._commit(decision)
            if self._ended(decision):
                break
            signals = self._small.extend(decision.token_ids)
        yield from self._show(self._stop_strings.flush())
        self.activity = Activity.DONE

    def stats(self) -> RunStats:
        """The summary so far; final once the iteration has ended."""
        times, escalator, prices = self._times_s, self._escalator, self._options.prices
        uploads = escalator.uploads
        itl = gaps(times)
        decoding_s = times[-1] - times[0] if len(times) > 1 else 0.0
        return RunStats(
            text="".join(self._shown_text),
            tokens=len(times),
            large_tokens=self._large_tokens,
            escalated=escalator.escalated,
            agreed=escalator.agreed,
            fallbacks=escalator.fallbacks,
            unchecked=self._unchecked,
            withheld=escalator.withheld,
            finish_reason=self._finish,
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
        self.activity = Activity.DECODE
        return signals

    def _on_prefill(self, label: str, done: int, total: int | None) -> None:
        self.prefill_done = done

    def _decide(self, signals: Signals) -> _Decision:
        """Keep the small model's token, or ask the large model and take what it answers."""
        score = self._router.score(signals)
        small_id = signals.token_id
        kept = _Decision(
            signals,
            score,
            token_ids=(small_id,),
            source=Source.SMALL,
            ends=small_id in self._small.vocabulary.eos_ids,
        )
        if not self._router.escalates(score):
            return kept
        if not self._escalator.open:
            return replace(kept, checked=False)
        self.activity = Activity.WAIT
        escalation = self._escalator.ask(self._context(), small_id)
        self.activity = Activity.DECODE
        if escalation is None or (answer := escalation.large) is None:
            return replace(kept, escalation=escalation, checked=False)
        return _Decision(
            signals,
            score,
            token_ids=answer.token_ids,
            source=Source.LARGE,
            ends=answer.is_eos,
            escalation=escalation,
        )

    def _context(self) -> LargeContext:
        fragment_ids = self._characters.fragment_ids
        whole = self._raw_text[: len(self._raw_text) - len(fragment_ids)]
        return LargeContext(
            text=self._prompt_text + "".join(whole),
            token_ids=(*self._prompt_ids, *self._answer_ids),
            fragment_ids=fragment_ids,
            vocabulary=self._small.vocabulary,
            messages=self._messages,
            spans=self._spans.all(),
        )

    def _commit(self, decision: _Decision) -> Iterator[Token]:
        self._unchecked += not decision.checked
        for position, token_id in enumerate(decision.token_ids):
            if self._stop_strings.hit or len(self._times_s) >= self._limit:
                return
            token = Token(
                index=len(self._times_s),
                token_id=token_id,
                text="" if decision.ends else self._text_of(token_id),
                source=decision.source,
                score=decision.score,
                signals=decision.signals,
                # A large token spelled as several small ones is still one escalation.
                escalation=decision.escalation if position == 0 else None,
                checked=decision.checked,
                time_s=self._clock() - self._began_s,
            )
            self._answer_ids.append(token_id)
            self._raw_text.append(token.text)
            self._spans.push(token.text, _large_ids(decision, position))
            self._times_s.append(token.time_s)
            self._large_tokens += decision.source is Source.LARGE
            yield from self._show(self._stop_strings.push(token))

    def _text_of(self, token_id: int) -> str:
        return self._characters.push(token_id, self._small.vocabulary.token_bytes(token_id))

    def _show(self, tokens: Iterator[Token]) -> Iterator[Token]:
        for token in tokens:
            self._shown_text.append(token.text)
            yield token

    def _ended(self, decision: _Decision) -> bool:
        if self._stop_strings.hit:
            self._finish = StopReason.STOP_STRING
        elif decision.ends:
            self._finish = StopReason.EOS
        elif len(self._times_s) >= self._limit:
            self._finish = StopReason.LENGTH
        else:
            return False
        return True


def _large_ids(decision: _Decision, position: int) -> tuple[int, ...] | None:
    """The large model's own ids of a decision's token; None for the later ones of several."""
    if decision.source is Source.SMALL or decision.escalation is None:
        return ()
    large = decision.escalation.large
    return None if position or large is None else large.large_ids


def generate(  # noqa: PLR0913 - the options of the command line, by the same names
    small: Small,
    large: Large | None,
    messages: Sequence[Message] | str,
    *,
    router: Router,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    timeout_s: float = 30.0,
    strict: bool = False,
    never_send: Sequence[re.Pattern[str]] = (),
    prices: Prices | None = None,
) -> Answer:
    """Answer a conversation (or one user message) with the small model, escalating as told.

    Iterate the result to decode it token by token. Escalated positions take the large model's
    most likely token; temperature, top-p and seed shape the small model's own. `large=None` means
    every position is the small model's; so is one whose context a `never_send` pattern matches,
    and every later one. `prices` give `stats()` a cost estimate. Raises UsageError and
    ContextTooLong before any work; while iterating, LargeError only if `strict`.
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
    )
    return Answer(small, large, messages, router=router, options=options)
