"""`LargeModel`: the client of a server, with one call per position."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from mlxroute.closeable import Closeable
from mlxroute.errors import LargeError, LargeNotContinued, LargeProtocolError, LargeTimeout
from mlxroute.large.answer_scorer import AnswerScorer
from mlxroute.large.completion_request import (
    CompletionRequest,
    CompletionRequester,
    TokensNotReplayed,
)
from mlxroute.large.dialects.chat.thinking_switch import ThinkingSwitch
from mlxroute.large.dialects.system_role import SystemRole
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.circuit_breaker import CircuitBreaker
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.model_loading import ModelLoading
from mlxroute.large.http.pending_calls import PendingCall, PendingCalls, Publish, Tokens
from mlxroute.large.http.transport import Transport
from mlxroute.large.negotiation.negotiator import Negotiator
from mlxroute.large.negotiation.shared_negotiator import SharedNegotiator
from mlxroute.large.negotiation.verdict_file import Verdict
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import CompletionAnswer
from mlxroute.large.request_plan import RequestPlan, RequestPlanner
from mlxroute.large.streaming import TokenCall, TokenStream, may_work_unstreamed
from mlxroute.large.vocabulary.reply_reader import read_streamed_tokens
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.large.vocabulary.token_sources import Tokenizer
from mlxroute.large.vocabulary.vocabulary_comparison import VocabularyComparison
from mlxroute.large.whole_chat import WholeChat
from mlxroute.ledger import Ledger
from mlxroute.types import LargeContext, LargeToken, Uploads, Vocabulary
from mlxroute.types.limits import MAX_TIMEOUT_S, check_number

_MAX_IN_FLIGHT: Final = 8
# The first reply may have to wait until the server has loaded the model.
_FIRST_REPLY_FACTOR: Final = 4


class LargeModel(Closeable):
    """A large model on an OpenAI-compatible server, asked for one token per call.

    Before the first call the client negotiates a dialect: it asks the server questions whose
    answers are known, in every dialect it speaks, until one is answered correctly. `connect` does
    that ahead of time. Several calls may be in flight, each on a connection of its own. All
    methods raise LargeError subclasses for failures of the server or the network.

    Args:
        base_url: The address of the server's API, such as `http://127.0.0.1:8081/v1`. A missing
            path becomes `/v1`; a user and password before the host are sent as basic
            authentication.
        model: The name of the model on the server. Default: the server's only model; a server with
            several needs a name.
        api_key: The key sent as a bearer token. Default: none.
        timeout_s: The time limit of one call, in seconds, retries included; above 0 and at most
            86,400. `connect` and `probe` wait four times as long for the first reply of a server
            that may have to load the model. Default: 30.
        connect_timeout_s: The limit for opening a connection, in seconds; same range. Default: 5.
        top_logprobs: The number of alternatives to ask for at each position, at least 1. Servers
            may return fewer. Default: 5.
        ca_bundle: A file of PEM certificates that the server's certificate is checked against.
            Default: the authorities of `requests`.
        ledger: Records every request body that is sent. Default: a ledger that only counts.
        verdicts: A JSON file that remembers the results of probes. Default: no file, so that every
            client negotiates anew.
        find_tokenizer: Returns the tokenizer of a model on this machine, given the server's name of
            the model, or None if there is none. Default: always None.

    Raises:
        UsageError: A value is out of range or cannot be used.
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
        ca_bundle: Path | str | None = None,
        ledger: Ledger | None = None,
        verdicts: Path | str | None = None,
        find_tokenizer: Callable[[str], Tokenizer | None] = lambda name: None,
    ) -> None:
        check_number("timeout_s", timeout_s, limits="timeout")
        check_number("connect_timeout_s", connect_timeout_s, limits="timeout")
        self._address = parse_address(base_url)
        self._timeout_s = timeout_s
        self._ledger = Ledger() if ledger is None else ledger
        self._transport = Transport(
            self._address,
            api_key=api_key,
            connect_timeout_s=connect_timeout_s,
            ca_bundle=ca_bundle,
            ledger=self._ledger,
        )
        self._breaker = CircuitBreaker(self.base_url)
        self._reader = TokenReader()
        self._requester = CompletionRequester(
            self._transport,
            self._ledger,
            base_url=self.base_url,
            top_logprobs=top_logprobs,
            reader=self._reader,
        )
        negotiator = Negotiator(
            self._transport,
            self._requester,
            base_url=self.base_url,
            model=model,
            verdicts=verdicts,
            find_tokenizer=find_tokenizer,
            reader=self._reader,
        )
        self._negotiator = SharedNegotiator(negotiator, self._reader, base_url=self.base_url)
        self._planner = RequestPlanner()
        self._system_role = SystemRole()
        self._thinking_switch = ThinkingSwitch()
        self._neutralised: dict[str, None] = {}  # Names of control tokens, in order.
        self._pending_calls = calls = PendingCalls()
        self._loading = ModelLoading(self._transport, self._breaker, calls, base_url=self.base_url)

    def __repr__(self) -> str:
        return f"LargeModel({self.base_url!r}, model={self.model_name!r})"

    @property
    def base_url(self) -> str:
        """The server's address, without user and password."""
        return self._address.url

    @property
    def model_name(self) -> str:
        """The name of the model for display; a placeholder while it is not known."""
        return self._negotiator.model.display

    @property
    def full_model_name(self) -> str:
        """The name of the model on the server, in full; while not known, one for this address."""
        return self._negotiator.model.for_records(self.base_url)

    @property
    def listed_instead(self) -> str | None:
        """The models that the server lists, in words, if `model` is not one of them; else None."""
        return self._negotiator.model.listed_instead

    @property
    def uploads(self) -> Uploads:
        """The totals of what was sent so far, negotiation included."""
        return self._ledger.uploads

    @property
    def connected(self) -> bool:
        """Whether a dialect was negotiated."""
        return self._negotiator.negotiated is not None

    @property
    def is_approximate(self) -> bool:
        """Whether the tokens may differ from those that the model itself would write."""
        negotiated = self._negotiator.negotiated
        return negotiated is not None and negotiated.dialect.is_approximate

    @property
    def knows_chat_template(self) -> bool:
        """Whether the large model gets conversations in its own chat template."""
        pairing = self._negotiator.pairing
        return pairing is not None and pairing.builder.knows_chat_template

    @property
    def is_verdict_saved(self) -> bool:
        """Whether the verdict of the last probe is in the file of verdicts."""
        return self._negotiator.is_verdict_saved

    @property
    def vocabulary_comparison(self) -> VocabularyComparison | None:
        """How the paired vocabulary compares with the large model's; None before a pairing."""
        pairing = self._negotiator.pairing
        return None if pairing is None else pairing.comparison

    @property
    def neutralised(self) -> tuple[str, ...]:
        """Names of control tokens in texts that were sent with a space in them so far.

        The server would have read them as control tokens.
        """
        return tuple(self._neutralised)

    @property
    def is_local(self) -> bool:
        """Whether the server's address is one of this machine."""
        return self._address.is_loopback

    @property
    def has_replied(self) -> bool:
        """Whether the server has answered a request that needs the model."""
        return self._transport.has_served

    @property
    def first_reply_timeout_s(self) -> float:
        """The time limit of a reply for which the model may have to be loaded, in seconds."""
        return min(MAX_TIMEOUT_S, _FIRST_REPLY_FACTOR * self._timeout_s)

    @property
    def max_in_flight(self) -> int:
        """Greatest number of calls in flight at once."""
        negotiated = self._negotiator.negotiated
        # A second prompt may equal the first one with its reply, which is not known in time.
        if negotiated is None or negotiated.dialect.crashes_on_cached_prompts:
            return 1
        return _MAX_IN_FLIGHT

    @property
    def can_stream(self) -> bool:
        """Whether prefetched tokens arrive one by one."""
        negotiated = self._negotiator.negotiated
        return negotiated is not None and self._planner.can_stream(negotiated)

    def connect(self, *, thorough: bool = True) -> str:
        """Negotiate the dialect; return one line that names the model and the dialect.

        A remembered verdict is checked with one request. Otherwise the server is probed or, if not
        `thorough`, asked the first question alone, and the result is not remembered. Raises
        LargeError, or UsageError if the server has several models and none was named.
        """
        with self._breaker.guard():
            negotiated = self._negotiator.negotiate(self._first_deadline, thorough=thorough)
        return f"large model {self.model_name} at {self.base_url} ({negotiated.dialect.name})"

    def probe(self) -> Verdict:
        """Probe the server, whatever is remembered of it; return and remember the verdict.

        Raises LargeError (NoUsableDialect if no dialect works), or UsageError as `connect`.
        """
        return self._negotiator.probe(self._first_deadline)

    def pair_vocabulary(self, vocabulary: Vocabulary) -> bool:
        """Prepare for answers in a small model's vocabulary; return whether it is the large one's.

        The two are compared token by token, once for each endpoint. Vocabularies that cannot be
        compared count as different. Raises as `connect`.
        """
        return self._negotiator.pair(vocabulary, self._new_deadline).builder.same_vocabulary

    def next_token(self, context: LargeContext, *, deadline_s: float | None = None) -> LargeToken:
        """Return the large model's greedy token after `context`.

        The time limit is the smaller of `deadline_s` and `timeout_s`, in seconds. Raises LargeError
        subclasses only: LargeUnavailable if earlier calls failed, or this one was cancelled.
        """
        return self._fetch_tokens(context, 0, self._new_deadline(deadline_s), lambda _: None)[0]

    def begin(
        self, context: LargeContext, *, deadline_s: float | None = None, prefetch: int = 0
    ) -> PendingCall:
        """Start `next_token` in the background; also ask for up to `prefetch` later tokens.

        A prefetched token is the one that a call for its position would return; tokens of which
        that is not certain are left out. If `can_stream`, they arrive one by one.
        """
        fetch = partial(self._fetch_tokens, context, prefetch)
        return self._pending_calls.start(fetch, self._new_deadline(deadline_s))

    def extend_timeout(self, timeout_s: float) -> None:
        """Let later calls take up to `timeout_s` seconds, if that is more than their limit."""
        self._timeout_s = max(self._timeout_s, timeout_s)

    def whole_chat(self, *, timeout_s: float) -> WholeChat:
        """Return a chat completion that the server answers alone, within `timeout_s`."""
        parts = (self._requester, self._breaker, self._ledger, self._negotiator, self._system_role)
        return WholeChat(*parts, self._thinking_switch, self._neutralised, timeout_s=timeout_s)

    def scorer(self, *, timeout_s: float) -> AnswerScorer:
        """Return a scorer of answers of other models, with `timeout_s` for each request."""
        parts = (self._requester, self._breaker, self._ledger, self._negotiator)
        return AnswerScorer(*parts, timeout_s=timeout_s)

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Block until `ready()` is true, checked at each change of a call, or until the timeout."""
        self._pending_calls.wait(ready, timeout_s=timeout_s)

    def close(self) -> None:
        """Cancel all calls and close the connections; a later call opens new ones."""
        self._pending_calls.cancel()
        self._transport.close()
        self._pending_calls.join()

    def _new_deadline(self, seconds: float | None = None) -> Deadline:
        return Deadline(self._timeout_s if seconds is None else min(self._timeout_s, seconds))

    def _first_deadline(self) -> Deadline:
        """Return the deadline of a request of a negotiation."""
        if not self._transport.is_reachable or self._transport.has_served:
            return self._new_deadline()
        return Deadline(self.first_reply_timeout_s, awaits_loading=True)

    def _fetch_tokens(
        self, context: LargeContext, prefetch: int, deadline: Deadline, publish: Publish
    ) -> Tokens:
        if deadline.seconds <= 0:
            raise LargeTimeout(f"no time left to ask {self.base_url}")
        call, is_full = partial(self._call, context), deadline.seconds >= self._timeout_s
        limit_s = self.first_reply_timeout_s if is_full else 0.0
        counted = self._breaker.guard(fragment=bool(context.fragment_ids))
        with self._loading.guard(partial(call, 0), limit_s=limit_s), counted:
            return call(prefetch, deadline, publish)

    def _call(
        self, context: LargeContext, prefetch: int, deadline: Deadline, publish: Publish
    ) -> Tokens:
        """Make one call; if a stream breaks, return the tokens that arrived before."""
        pairing = self._negotiator.pair_within(deadline, context.vocabulary)
        call = TokenCall(pairing, deadline, prefetch, TokenStream(publish, deadline))
        try:
            return self._ask_stable(context, call)
        except LargeError as exc:
            if call.stream.tokens:
                return call.stream.tokens
            if (single := call.shortened(exc)) is None:
                raise
        return self._ask_stable(context, single)

    def _ask_stable(self, context: LargeContext, call: TokenCall) -> Tokens:
        """Ask with a context that the server tokenizes as committed; else with the whole one."""
        stable_context = call.pairing.builder.stable_context(context)
        if stable_context is not context:
            with suppress(TokensNotReplayed):
                return self._ask(stable_context, call)
        try:
            return self._ask(context, call)
        except TokensNotReplayed as exc:
            # The server works; the small model wrote what the large one would not write again.
            raise LargeNotContinued(str(exc)) from exc

    def _ask(self, context: LargeContext, call: TokenCall) -> Tokens:
        """Build the prompt, ask the server and read its tokens, trying one plan after the other."""
        pairing, uploaded_bytes = call.pairing, 0
        prompt = self._negotiator.build_prompt(context, pairing, call.deadline)
        self._neutralised |= dict.fromkeys(prompt.neutralised)
        for plan in self._planner.plans(pairing.negotiated, prefetch=call.prefetch):
            request = CompletionRequest(
                pairing.dialect,
                prompt,
                pairing.model,
                plan.count,
                replayed=pairing.builder.replayed_tokens(context),
                context=context,
            )
            answer = self._complete(request, plan, call)
            uploaded_bytes += answer.uploaded_bytes
            if tokens := plan.read(answer, pairing.bridge, self._reader):
                return call.stream.complete(
                    pairing.builder.stable_prefix(context, tokens),
                    answer.completion,
                    uploaded_bytes=uploaded_bytes,
                )
            if self._planner.is_last(plan, answer, pairing.negotiated):
                break
        raise LargeProtocolError(f"{self.base_url} gave no whole character for this position")

    def _complete(
        self, request: CompletionRequest, plan: RequestPlan, call: TokenCall
    ) -> CompletionAnswer:
        """Send one request; repeat it without streaming if that may help."""

        def listen(partial: CompletionAnswer) -> bool:
            tokens = read_streamed_tokens(partial, call.pairing.bridge, self._reader)
            return call.stream.update(tokens, uploaded_bytes=partial.uploaded_bytes)

        def send(prompt: Prompt) -> CompletionAnswer:
            return self._requester.complete(
                request if prompt is request.prompt else replace(request, prompt=prompt),
                deadline=call.deadline,
                listener=listen if plan.streamed else None,
            )

        negotiated = call.pairing.negotiated
        try:
            answer = self._system_role.send(request.prompt, send, server=negotiated)
        except LargeError as exc:
            if plan.streamed and may_work_unstreamed(exc):
                if call.stream.tokens:
                    raise
                answer = self._complete(request, replace(plan, streamed=False), call)
                self._planner.record_failed_stream(exc, negotiated)
                return answer
            self._negotiator.record_failure(exc, negotiated)
            raise
        self._negotiator.record_success()
        self._planner.record_answer(plan)
        return answer
