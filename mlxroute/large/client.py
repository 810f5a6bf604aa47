"""The large model behind an address: one token per call, or an error that says why not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from mlxroute.closeable import Closeable
from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    UsageError,
)
from mlxroute.large.completion_request import CompletionRequester, NotRepeated
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.background import PendingCall, Tokens
from mlxroute.large.http.circuit_breaker import CircuitBreaker
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.stream_listener import StreamListener
from mlxroute.large.http.transport import Transport
from mlxroute.large.negotiation.negotiator import Negotiator
from mlxroute.large.negotiation.verdict_file import Verdict
from mlxroute.large.negotiation.vocabulary_pairing import Pairing, Pairings
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import CompletionAnswer
from mlxroute.large.request_plan import RequestPlanner
from mlxroute.large.streaming import StreamedTokens, may_do_whole
from mlxroute.large.vocabulary.reply_reader import read_first_token, read_streamed_tokens
from mlxroute.large.vocabulary.token_sources import FileTokenSource, Tokenizer
from mlxroute.ledger import Ledger
from mlxroute.safe_text import printable_line
from mlxroute.types import LargeContext, LargeToken, Uploads, Vocabulary

_LONGEST_S: Final = 86_400
_MOST_IN_FLIGHT: Final = 8
# How long threads that were told to end may take before they are left to end by themselves.
_ENDING_S: Final = 0.3


class LargeModel(Closeable):
    """One token per call from a large model on an OpenAI-compatible server.

    `connect` finds out how the server wants to be asked, by questions whose answers are known;
    the outcome is remembered in the file `verdicts`. `find_tokenizer` may know the tokenizer of a
    model by the name the server gives it. `timeout_s` bounds a whole reply. `ledger` records what
    is sent.

    Several calls may be under way. They take turns at what they share (the terms, the vocabularies'
    pairing, the server's tokenise routes) and exchange over connections of their own.
    """

    def __init__(  # noqa: PLR0913 - what varies between servers
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
        top_logprobs: int = 5,
        ca_bundle: Path | None = None,
        ledger: Ledger | None = None,
        verdicts: Path | None = None,
        find_tokenizer: Callable[[str], Tokenizer | None] = lambda name: None,
    ) -> None:
        if not (0 < timeout_s <= _LONGEST_S and 0 < connect_timeout_s <= _LONGEST_S):
            raise UsageError(f"timeouts must be above 0 and at most {_LONGEST_S} seconds")
        self._address = parse_address(base_url)
        self._ledger = Ledger() if ledger is None else ledger
        self._transport = Transport(
            self._address,
            api_key=api_key,
            connect_timeout_s=connect_timeout_s,
            ca_bundle=ca_bundle,
            ledger=self._ledger,
        )
        self._breaker = CircuitBreaker(self._address.url)
        self._asker = CompletionRequester(
            self._transport,
            self._ledger,
            base_url=self._address.url,
            top_logprobs=top_logprobs,
        )
        self._asker.model, self._asker.model_was_named = model, model is not None
        self._timeout_s = timeout_s
        self._model = model
        self._settlement = Negotiator(
            self._transport,
            self._asker,
            base_url=self._address.url,
            model=model,
            verdicts=verdicts,
            find_tokenizer=find_tokenizer,
            deadline=self._deadline,
        )
        # Held while terms and pairing are read or found, with all calls that this takes.
        self._turn = threading.RLock()
        self._turn_deadline: Deadline | None = None
        self._pairings = Pairings(self._settlement, self._asker.reader)
        self._ways = RequestPlanner()
        self._landed = threading.Condition()
        self._flights: list[PendingCall] = []

    def __repr__(self) -> str:
        return f"LargeModel({self.base_url!r}, model={self.model_name!r})"

    @property
    def base_url(self) -> str:
        """The server's address, without user and password."""
        return self._address.url

    @property
    def model_name(self) -> str:
        """The model asked for, or the one the server says it has, fit to be shown."""
        name = self._model or self._asker.model or "the server's own model"
        # Servers list a local model by its path; only the last part means something.
        return printable_line(PurePosixPath(name).name if name.startswith("/") else name, limit=100)

    @property
    def uploads(self) -> Uploads:
        """What was sent so far, questions about the server included."""
        return self._ledger.uploads

    def close(self) -> None:
        """End all calls and close the connections; a later call opens a new one."""
        for flight in self._flights:
            flight.cancel()
        self._transport.close()
        ends_s = time.monotonic() + _ENDING_S
        for flight in self._flights:
            flight.join(max(0.0, ends_s - time.monotonic()))

    @property
    def connected(self) -> bool:
        """Whether it is settled how the server is asked."""
        return self._settlement.terms is not None

    def connect(self, *, thorough: bool = True) -> str:
        """Settle how to ask the server; return one line saying what was found.

        A remembered verdict is checked with one call, otherwise the server is probed; not
        `thorough`, the first question alone decides, and nothing is remembered. Raises LargeError,
        or UsageError when a model must be named.
        """
        with self._turn, self._breaker.guard():
            terms = self._settlement.settle(thorough=thorough)
        return f"large model {self.model_name} at {self.base_url} ({terms.dialect.name})"

    def probe(self) -> Verdict:
        """Find the best way to ask the server, whatever is remembered of it; remember the outcome.

        Raises LargeError (`probe.NothingFits` when no way tells the truth) and UsageError.
        """
        with self._turn:
            return self._settlement.probe()

    def pair_vocabulary(self, vocabulary: Vocabulary) -> bool:
        """Prepare for answers in a small vocabulary; return whether the large model shares it.

        The token strings are compared id by id, once for each endpoint. Raises LargeError.
        """
        with self._turn:
            self._settlement.settle(thorough=True)
            return self._pairings.of(vocabulary).builder.same_vocabulary

    @property
    def knows_chat_template(self) -> bool:
        """Whether a conversation reaches the large model in its own chat template."""
        if self._pairings.latest is None:
            return False
        builder = self._pairings.latest.builder
        by_server = builder.form is not PromptForm.TEXT
        return builder.same_vocabulary or by_server or isinstance(builder.tokens, FileTokenSource)

    @property
    def max_in_flight(self) -> int:
        """How many calls may be under way at once, as far as the server is known."""
        terms = self._settlement.terms
        # Two prompts of one text under way could complete each other to a cached whole.
        first_token = terms is None or terms.dialect.crashes_on_cached_prompts
        return 1 if first_token else _MOST_IN_FLIGHT

    def next_token(self, context: LargeContext, *, deadline_s: float | None = None) -> LargeToken:
        """The large model's greedy token after `context`. Raises LargeError subclasses only.

        LargeUnavailable means that there was no call: the last ones failed too often.
        """
        return self._next_tokens(
            context, self._deadline_of(deadline_s), prefetch=0, publish=lambda tokens: None
        )[0]

    def begin(
        self, context: LargeContext, *, deadline_s: float | None = None, prefetch: int = 0
    ) -> PendingCall:
        """Ask as `next_token` does, without waiting for the answer.

        Up to `prefetch` of the large model's next tokens come with it, where the server's reply can
        be taken apart without doubt; each is what a call after the ones before it would give. They
        come one by one where the server's dialect streams, each with its own `latency_s`.
        """

        def ask(deadline: Deadline, publish: Callable[[Tokens], None]) -> Tokens:
            return self._next_tokens(context, deadline, prefetch=prefetch, publish=publish)

        self._flights = [flight for flight in self._flights if not flight.finished]
        flight = PendingCall(ask, deadline=self._deadline_of(deadline_s), changed=self._landed)
        self._flights.append(flight)
        flight.start()
        return flight

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Return when `ready()`, looked at whenever a flight lands, or when the time is up."""
        with self._landed:
            self._landed.wait_for(ready, timeout_s)

    def _deadline_of(self, seconds: float | None) -> Deadline:
        return Deadline(self._timeout_s if seconds is None else min(self._timeout_s, seconds))

    @property
    def can_stream(self) -> bool:
        """Whether tokens ahead come one by one, as far as the server is known."""
        terms = self._settlement.terms
        return terms is not None and self._ways.may_stream(terms)

    def _next_tokens(
        self,
        context: LargeContext,
        deadline: Deadline,
        *,
        prefetch: int,
        publish: Callable[[Tokens], None],
    ) -> Tokens:
        if deadline.seconds <= 0:
            raise LargeTimeout(f"no time left to ask {self.base_url}")
        coming = StreamedTokens(publish, deadline)
        with self._breaker.guard(fragment=bool(context.fragment_ids)):
            with self._my_turn(deadline):
                pairing = self._prepared(context.vocabulary)
            told = pairing.builder.stable_context(context)
            try:
                tokens = self._tokens_after(
                    told, pairing, deadline, prefetch=prefetch, coming=coming
                )
            except NotRepeated:
                if told is context:
                    raise
                # Where the server does not write its tokens again, it reads them in its own way.
                tokens = self._tokens_after(
                    context, pairing, deadline, prefetch=prefetch, coming=coming
                )
            except LargeError:
                if not coming.tokens:
                    raise
                return coming.tokens
        return coming.completed(tokens)

    def _tokens_after(
        self,
        context: LargeContext,
        pairing: Pairing,
        deadline: Deadline,
        *,
        prefetch: int,
        coming: StreamedTokens,
    ) -> Tokens:
        with self._my_turn(deadline):
            prompt = self._prompt(context, pairing)
        repeated: tuple[bytes, ...] = ()
        if pairing.dialect.form is not PromptForm.IDS:
            repeated = tuple(map(context.vocabulary.token_bytes, context.fragment_ids))
        uploaded = 0

        def listener(answered: CompletionAnswer) -> bool:
            return coming.heard(read_streamed_tokens(answered, pairing.bridge, self._asker.reader))

        for way in self._ways.after(pairing.terms, prefetch=prefetch):
            try:
                answered = self._ask(
                    pairing,
                    prompt,
                    context,
                    repeated,
                    way.count,
                    deadline,
                    listener=listener if way.streamed else None,
                )
            except (LargeProtocolError, LargeRefused) as exc:
                if not way.streamed or coming.tokens or not may_do_whole(exc):
                    raise
                self._ways.not_streamed(pairing.terms)
                continue
            uploaded += answered.uploaded_bytes
            tokens = way.read(answered, pairing.bridge, self._asker.reader)
            # Behind the end of the answer there is nothing more to ask for.
            if tokens or (way.read is read_first_token and answered.completion.ends):
                break
        if not tokens:
            raise LargeProtocolError(f"{self.base_url} gives no whole character here")
        completion = answered.completion
        first = replace(
            tokens[0],
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=completion.cached_tokens,
            completion_tokens=completion.completion_tokens,
            uploaded_bytes=uploaded,
        )
        return (first, *pairing.builder.stable_prefix(context, tokens)[1:])

    @contextmanager
    def _my_turn(self, deadline: Deadline) -> Iterator[None]:
        """Settle, pair and build inside, within this call's time."""
        if not self._turn.acquire(timeout=deadline.left_s()):
            raise deadline.error(self.base_url)
        try:
            self._turn_deadline = deadline
            yield
        finally:
            self._turn_deadline = None
            self._turn.release()

    def _prepared(self, vocabulary: Vocabulary) -> Pairing:
        try:
            self._settlement.settle(thorough=False)
        except UsageError as exc:
            raise LargeRefused(str(exc)) from exc
        return self._pairings.of(vocabulary)

    def _prompt(self, context: LargeContext, pairing: Pairing) -> Prompt:
        try:
            prompt = pairing.builder.build(context)
        except LargeRefused as exc:
            self._settlement.failed(exc, pairing.terms)
            raise
        self._check_length(prompt)
        return prompt

    def _ask(
        self,
        pairing: Pairing,
        prompt: Prompt,
        context: LargeContext,
        repeated: tuple[bytes, ...],
        count: int,
        deadline: Deadline,
        *,
        listener: StreamListener[CompletionAnswer] | None,
    ) -> CompletionAnswer:
        """One call; a dialect that keeps failing is given up, and the server probed anew."""
        try:
            answered = self._asker.ask(
                pairing.dialect,
                prompt,
                count=count,
                deadline=deadline,
                repeated=repeated,
                context=context,
                listener=listener,
            )
        except LargeError as exc:
            # It may well answer as a whole.
            if listener is None or not may_do_whole(exc):
                with self._turn:
                    self._settlement.failed(exc, pairing.terms)
            raise
        self._settlement.fitted()
        return answered

    def _check_length(self, prompt: Prompt) -> None:
        """Refuse, without a call, what the server said it cannot hold."""
        terms = self._settlement.terms
        verdict = None if terms is None else terms.verdict
        if verdict is None or verdict.context_length is None:
            return
        if len(prompt.ids) >= verdict.context_length:
            raise LargeProtocolError(
                f"the chat has reached the large model's context of {verdict.context_length:,}"
                " tokens; /reset starts anew"
            )

    def _deadline(self) -> Deadline:
        """That of the call whose turn it is, or a new one for a call of its own."""
        return self._turn_deadline or Deadline(self._timeout_s)
