"""`LargeModel`: the client of a server, with one call per position."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from mlxroute.closeable import Closeable
from mlxroute.large.answer_scorer import AnswerScorer
from mlxroute.large.completion_request import CompletionRequester
from mlxroute.large.dialects.chat.thinking_switch import ThinkingSwitch
from mlxroute.large.dialects.system_role import SystemRole
from mlxroute.large.http.address import parse_address
from mlxroute.large.http.circuit_breaker import CircuitBreaker
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.model_loading import ModelLoading
from mlxroute.large.http.pending_calls import PendingCall, PendingCalls
from mlxroute.large.http.transport import Transport
from mlxroute.large.negotiation.negotiator import Negotiator
from mlxroute.large.negotiation.shared_negotiator import SharedNegotiator
from mlxroute.large.negotiation.verdict_file import Verdict
from mlxroute.large.neutralised_names import NeutralisedNames
from mlxroute.large.position_call import PositionCaller
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
        reader = TokenReader()
        self._requester = CompletionRequester(
            self._transport,
            self._ledger,
            base_url=self.base_url,
            top_logprobs=top_logprobs,
            reader=reader,
        )
        negotiator = Negotiator(
            self._transport,
            self._requester,
            base_url=self.base_url,
            model=model,
            verdicts=verdicts,
            find_tokenizer=find_tokenizer,
            reader=reader,
        )
        self._negotiator = SharedNegotiator(negotiator, reader, base_url=self.base_url)
        self._system_role = SystemRole()
        self._thinking_switch = ThinkingSwitch()
        self._neutralised = NeutralisedNames()
        self._pending_calls = PendingCalls()
        self._loading = ModelLoading(
            self._transport, self._breaker, self._pending_calls, base_url=self.base_url
        )
        self._caller = self._position_caller(reader)

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
        return self._neutralised.names

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
        """Maximum number of calls in flight at once."""
        negotiated = self._negotiator.negotiated
        # A second prompt may equal the first one with its reply, which is not known in time.
        if negotiated is None or negotiated.dialect.crashes_on_cached_prompts:
            return 1
        return _MAX_IN_FLIGHT

    @property
    def can_stream(self) -> bool:
        """Whether prefetched tokens arrive one by one."""
        return self._caller.can_stream

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
        deadline = self._new_deadline(deadline_s)
        tokens = self._caller.fetch_tokens(
            context, deadline, lambda _: None, loading_s=self._loading_limit_s(deadline)
        )
        return tokens[0]

    def begin(
        self, context: LargeContext, *, deadline_s: float | None = None, prefetch: int = 0
    ) -> PendingCall:
        """Start `next_token` in the background; also ask for up to `prefetch` later tokens.

        A prefetched token is the one that a call for its position would return; tokens of which
        that is not certain are left out. If `can_stream`, they arrive one by one.
        """
        deadline = self._new_deadline(deadline_s)
        fetch = partial(
            self._caller.fetch_tokens,
            context,
            prefetch=prefetch,
            loading_s=self._loading_limit_s(deadline),
        )
        return self._pending_calls.start(fetch, deadline)

    def extend_timeout(self, timeout_s: float) -> None:
        """Let later calls take up to `timeout_s` seconds, if that is more than their limit."""
        self._timeout_s = max(self._timeout_s, timeout_s)

    def whole_chat(self, *, timeout_s: float) -> WholeChat:
        """Return a chat completion that the server answers alone, within `timeout_s`."""
        return WholeChat(
            requester=self._requester,
            breaker=self._breaker,
            ledger=self._ledger,
            negotiator=self._negotiator,
            system_role=self._system_role,
            thinking_switch=self._thinking_switch,
            neutralised=self._neutralised,
            timeout_s=timeout_s,
        )

    def scorer(self, *, timeout_s: float) -> AnswerScorer:
        """Return a scorer of answers of other models, with `timeout_s` for each request."""
        return AnswerScorer(
            requester=self._requester,
            breaker=self._breaker,
            ledger=self._ledger,
            negotiator=self._negotiator,
            timeout_s=timeout_s,
        )

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Block until `ready()` is true, checked at each change of a call, or until the timeout."""
        self._pending_calls.wait(ready, timeout_s=timeout_s)

    def close(self) -> None:
        """Cancel all calls and close the connections; a later call opens new ones."""
        self._pending_calls.cancel()
        self._transport.close()
        self._pending_calls.join()

    def _position_caller(self, reader: TokenReader) -> PositionCaller:
        return PositionCaller(
            requester=self._requester,
            negotiator=self._negotiator,
            reader=reader,
            breaker=self._breaker,
            loading=self._loading,
            system_role=self._system_role,
            neutralised=self._neutralised,
            base_url=self.base_url,
        )

    def _new_deadline(self, seconds: float | None = None) -> Deadline:
        return Deadline(self._timeout_s if seconds is None else min(self._timeout_s, seconds))

    def _first_deadline(self) -> Deadline:
        """Return the deadline of a request of a negotiation."""
        if not self._transport.is_reachable or self._transport.has_served:
            return self._new_deadline()
        return Deadline(self.first_reply_timeout_s, awaits_loading=True)

    def _loading_limit_s(self, deadline: Deadline) -> float:
        """Return the seconds for a call that waits until the model is loaded; 0 for none.

        A call with less time than usual may fail without the server loading anything.
        """
        return self.first_reply_timeout_s if deadline.seconds >= self._timeout_s else 0.0
