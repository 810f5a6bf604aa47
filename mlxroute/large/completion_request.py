"""Requests for the next greedy tokens: sent in a dialect, their replies checked and counted."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from mlxroute.errors import LargeNotContinued, LargeProtocolError, LargeRefused
from mlxroute.large.dialects import Dialect, RequestOptions, StreamingDialect
from mlxroute.large.dialects.json_fields import (
    error_message,
    json_items,
    parse_object,
    reported_error,
    usage_counts,
)
from mlxroute.large.dialects.sse import is_event_stream, parse_events
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.exchange import HttpReply
from mlxroute.large.http.stream_listener import StreamListener
from mlxroute.large.http.transport import Transport
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import Completion, CompletionAnswer, ReplyPosition
from mlxroute.large.vocabulary.mlx_lm_cache_guard import MlxLmCacheGuard, Usage
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.large.vocabulary.truncation_guard import TruncationGuard
from mlxroute.ledger import Ledger
from mlxroute.safe_text import printable_line
from mlxroute.types import LargeContext
from mlxroute.types.limits import check_number

# The longest tokens of real vocabularies are runs of some hundred spaces or dashes.
_MAX_TOKEN_CHARACTERS: Final = 1000
# For an estimate of the tokens of a request.
_BYTES_PER_TOKEN: Final = 4
# Requests for one position, where the cache guard cut too much off the prompt of the first.
_MAX_TRIES: Final = 3


class TokensNotReplayed(LargeProtocolError):
    """Raised for a reply without the committed tokens that the server had to generate again.

    The dialect may be right: the server's tokenizer may split the prompt in another way.
    """


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A request for the next `count` greedy tokens after a prompt.

    Args:
        dialect: The dialect to send it in.
        prompt: The prompt.
        model: The model name to send; None to send none.
        count: Number of tokens to ask for.
        replayed: The bytes of committed tokens that this form of prompt cannot hold: the server
            has to generate them again first.
        context: The position that the prompt was built for; None for the question of a probe.
    """

    dialect: Dialect
    prompt: Prompt
    model: str | None
    count: int
    replayed: tuple[bytes, ...] = ()
    context: LargeContext | None = None


@dataclass(frozen=True, slots=True)
class _EncodedRequest:
    """A request as it is sent; its reply must begin with the bytes `replayed`.

    `prompt` is shorter than the one asked for if the cache guard moved its end to `replayed`.
    """

    dialect: Dialect
    prompt: Prompt
    replayed: bytes
    count: int
    max_tokens: int
    body: bytes


class _UsageRecorder:
    """Records the token counts of one request in the ledger while its reply arrives."""

    def __init__(self, ledger: Ledger, request: CompletionRequest, *, body: bytes) -> None:
        self._ledger = ledger
        ids = request.prompt.ids if request.context is None else request.context.token_ids
        # The request has far more than the conversation where it shows worked examples.
        is_framed = request.dialect.is_approximate
        self._prompt_tokens = len(body) // _BYTES_PER_TOKEN if is_framed else len(ids)
        self._recorded = (0, 0, 0)

    def record(self, completion: Completion) -> None:
        """Record the change of the counts since the last time; estimate those not reported.

        The count of a stream's prompt may come last, and be lower than the estimate.
        """
        prompt, generated = completion.prompt_tokens, completion.completion_tokens
        prompt = self._prompt_tokens if prompt is None else prompt
        generated = len(completion.positions) if generated is None else generated
        self._record(prompt, completion.cached_tokens, generated)

    def record_unread(self, reply: HttpReply) -> None:
        """Record the counts of a reply that has no usable token, such as one of thoughts only."""
        with contextlib.suppress(LargeProtocolError):
            counts = usage_counts(parse_object(reply.body))
            prompt, generated = counts["prompt_tokens"], counts["completion_tokens"]
            if prompt is not None and generated is not None:
                self._record(prompt, counts["cached_tokens"], generated)

    def _record(self, prompt: int, cached: int | None, generated: int) -> None:
        totals = (prompt, min(cached or 0, prompt), generated)
        new = [b - a for a, b in zip(self._recorded, totals, strict=True)]
        self._recorded = totals
        self._ledger.record_usage(
            prompt_tokens=new[0], cached_tokens=new[1], completion_tokens=new[2]
        )


class CompletionRequester:
    """Sends completion requests to one server and reads their replies.

    All dialects share its cache guard and `reader`, which learns from every reply. `top_logprobs`
    is the number of alternatives asked for at each position. Safe for several threads.
    """

    def __init__(
        self,
        transport: Transport,
        ledger: Ledger,
        *,
        base_url: str,
        top_logprobs: int,
        reader: TokenReader,
    ) -> None:
        self._transport = transport
        self._ledger = ledger
        self._base_url = base_url
        check_number("top_logprobs", top_logprobs)
        self._top_logprobs = top_logprobs
        self._reader = reader
        self._cache_guard = MlxLmCacheGuard()
        self._truncation_guard = TruncationGuard()
        # Protects the guards, and the reader while it learns.
        self._lock = threading.Lock()

    def post(
        self,
        path: str,
        body: Mapping[str, object],
        *,
        deadline: Deadline,
        at_root: bool = True,
        whole_answer: bool = False,
    ) -> Mapping[str, object]:
        """Post JSON to a route; return the JSON object of the reply.

        The route is at the server's root, or below the base address unless `at_root`;
        `whole_answer` is as in Transport. Raises LargeError for any status but 200, and for an
        error in place of a whole answer.
        """
        reply = self._transport.call(
            path, at_root=at_root, body=_encode(body), deadline=deadline, whole_answer=whole_answer
        )
        if reply.status != 200:
            raise self._refusal(reply, error_message(reply.body), reply.status)
        value = parse_object(reply.body)
        if (error := reported_error(value)) is None:
            self._transport.record_served()
        # Callers of tokenise routes ask again after an error with status 200.
        elif whole_answer:
            raise self._refusal(reply, *error)
        return value

    def check_secret(self, answer: object) -> None:
        """Raise LargeProtocolError if an answer, a JSON value, has the key in one of its texts."""
        texts = (item for item in json_items(answer) if isinstance(item, str))
        if any(map(self._transport.has_secret, texts)):
            raise LargeProtocolError(f"{self._base_url} wrote the key into the answer")

    def complete(
        self,
        request: CompletionRequest,
        *,
        deadline: Deadline,
        listener: StreamListener[CompletionAnswer] | None = None,
    ) -> CompletionAnswer:
        """Send a request; return its positions, fewer than asked for where the answer ends.

        A reply that does not go on with the answer is followed by a request in the dialect's
        fallback. With a `listener` the reply is streamed to it. Raises LargeError, and its subclass
        TokensNotReplayed.
        """
        tries = uploaded_bytes = 0
        while True:
            sent = self._prepare(request, streamed=listener is not None)
            uploaded_bytes += len(sent.body)
            try:
                answer = self._send(request, sent, deadline=deadline, listener=listener)
            except LargeNotContinued as exc:
                if (fallback := request.dialect.fallback(request.prompt, exc)) is None:
                    raise
                request = replace(request, dialect=fallback)
            except TokensNotReplayed:
                tries += 1
                # The reply may have shown that the prompt is in no cache and can be sent longer.
                if tries == _MAX_TRIES or not self._can_be_longer(request, sent):
                    raise
            else:
                return replace(answer, uploaded_bytes=uploaded_bytes)

    def _can_be_longer(self, request: CompletionRequest, sent: _EncodedRequest) -> bool:
        """Return whether the cache guard now cuts less off the prompt than when it was sent."""
        if not request.dialect.crashes_on_cached_prompts:
            return False
        with self._lock:
            text, _ = self._cache_guard.plan(request.prompt.text, context=request.context)
        return len(text) > len(sent.prompt.text)

    def _send(
        self,
        request: CompletionRequest,
        sent: _EncodedRequest,
        *,
        deadline: Deadline,
        listener: StreamListener[CompletionAnswer] | None,
    ) -> CompletionAnswer:
        usage = _UsageRecorder(self._ledger, request, body=sent.body)

        def read_partial(body: bytes) -> bool:
            assert listener is not None
            completion = self._partial_completion(sent, body)
            if completion is None:
                return False
            usage.record(completion)
            return listener(_partial_answer(sent, completion))

        reply = self._transport.call(
            sent.dialect.path,
            at_root=sent.dialect.at_root,
            body=sent.body,
            deadline=deadline,
            listener=None if listener is None else read_partial,
        )
        try:
            completion = self._completion(sent, reply)
        except LargeProtocolError:
            usage.record_unread(reply)
            raise
        usage.record(completion)
        return self._answer(sent, completion)

    def _prepare(self, request: CompletionRequest, *, streamed: bool) -> _EncodedRequest:
        dialect, prompt, replayed = request.dialect, request.prompt, request.replayed
        is_guarded = dialect.crashes_on_cached_prompts
        with self._lock:
            if is_guarded:
                text, cut_off = self._cache_guard.plan(prompt.text, context=request.context)
                prompt, replayed = replace(prompt, text=text), (*cut_off, *replayed)
            if not (prompt.ids or prompt.text or prompt.messages):
                raise LargeProtocolError("the prompt for the large model is empty")
            # One token more than is read, so that prompt and read tokens are no cached sequence.
            max_tokens = len(replayed) + request.count + (1 if is_guarded else 0)
            options = RequestOptions(
                max_tokens, self._top_logprobs, request.model, streamed=streamed
            )
            body = _encode(dialect.request(prompt, options))
            if is_guarded:
                self._cache_guard.record_request(prompt.text, max_tokens=max_tokens)
        return _EncodedRequest(dialect, prompt, b"".join(replayed), request.count, max_tokens, body)

    def _partial_completion(self, sent: _EncodedRequest, body: bytes) -> Completion | None:
        """Return the part of a streamed reply that has arrived; None while it cannot be used.

        Errors are left to the whole reply, which holds them as well.
        """
        try:
            if not is_event_stream(body) or not (value := _join_events(sent.dialect, body)):
                return None
            if reported_error(value) is not None:
                return None
            completion = sent.dialect.completion(value, sent.prompt)
            self._check_tokens(completion)
        except LargeProtocolError:
            return None
        with self._lock:
            self._reader.learn(completion.positions)
        return completion

    def _completion(self, sent: _EncodedRequest, reply: HttpReply) -> Completion:
        """Return the whole reply; record it in the cache guard and the reader."""
        is_guarded = sent.dialect.crashes_on_cached_prompts
        with self._lock:
            if is_guarded and reply.status != 200:
                self._cache_guard.record_refusal(sent.prompt.text, max_tokens=sent.max_tokens)
            completion = self._parse(sent, reply)
            self._check_tokens(completion)
            self._reader.learn(completion.positions)
            if is_guarded:
                tokens = [self._reader.prompt_bytes(p.token) for p in completion.positions]
                usage = _cache_usage(completion)
                self._cache_guard.record_reply(sent.prompt.text, tokens, usage=usage)
        return completion

    def _parse(self, sent: _EncodedRequest, reply: HttpReply) -> Completion:
        if reply.status != 200:
            raise self._refusal(reply, error_message(reply.body), reply.status)
        try:
            if isinstance(sent.dialect, StreamingDialect) and is_event_stream(reply.body):
                value = _join_events(sent.dialect, reply.body)
            else:
                value = parse_object(reply.body)
            if (error := reported_error(value)) is not None:
                raise self._refusal(reply, *error)
            self._transport.record_served()
            completion = sent.dialect.completion(value, sent.prompt)
            self._truncation_guard.check(sent.prompt.whole_text, completion.prompt_tokens)
        except LargeProtocolError as exc:
            raise type(exc)(f"{self._base_url}: {exc}") from exc
        return completion

    def _check_tokens(self, completion: Completion) -> None:
        """Raise LargeProtocolError for tokens of another model or of none, and for the key."""
        try:
            self._reader.check(completion.positions)
        except LargeProtocolError as exc:
            raise LargeProtocolError(f"{self._base_url}: {exc}") from exc
        self.check_secret(completion.text)
        for token in (position.token for position in completion.positions):
            length = max(len(form or "") for form in (token.piece, token.data, token.text))
            if length > _MAX_TOKEN_CHARACTERS:
                raise LargeProtocolError(
                    f"{self._base_url} sent {length:,} characters as one token"
                )

    def _answer(self, sent: _EncodedRequest, completion: Completion) -> CompletionAnswer:
        new = self._after_replayed(sent.replayed, completion.positions)
        positions = new[: sent.count]
        # The server's text is that of all positions, so it does not fit a part of them.
        text = completion.text if len(positions) == len(completion.positions) else ""
        is_complete = len(positions) == sent.count or positions[-1].ends
        return CompletionAnswer(positions, text, is_complete, completion, len(sent.body))

    def _after_replayed(
        self, replayed: bytes, positions: tuple[ReplyPosition, ...]
    ) -> tuple[ReplyPosition, ...]:
        """Return the positions after those that replay these bytes; there is at least one."""
        data = b""
        count = 0
        while len(data) < len(replayed) and count < len(positions):
            data += self._reader.prompt_bytes(positions[count].token) or b""
            count += 1
        if data != replayed or count == len(positions):
            raise TokensNotReplayed(
                f"{self._base_url} did not continue the answer with the tokens it already has"
            )
        return positions[count:]

    def _refusal(self, reply: HttpReply, message: str, status: int) -> LargeRefused:
        """Return the error for a refusal, with an echoed key removed from the server's text."""
        reason = printable_line(self._transport.redact(message)) or "no reason given"
        advice = "; check the API key" if status in (401, 403) else ""
        if reply.retry_after_s:
            advice = f"; it asks to be called again in {reply.retry_after_s:,.0f} s"
        return LargeRefused(
            f"{self._base_url} answered {status}: {reason}{advice}",
            status=status,
            retry_after_s=reply.retry_after_s,
            in_body=reply.status == 200,
        )


def _partial_answer(sent: _EncodedRequest, completion: Completion) -> CompletionAnswer:
    """Return an answer that is still arriving. No dialect that streams replays tokens."""
    positions = completion.positions[: sent.count]
    return CompletionAnswer(positions, completion.text, False, completion, len(sent.body))


def _join_events(dialect: Dialect, body: bytes) -> dict[str, object]:
    assert isinstance(dialect, StreamingDialect)
    return dialect.join_events(parse_events(body))


def _encode(body: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise LargeProtocolError("the prompt contains a lone surrogate") from exc


def _cache_usage(completion: Completion) -> Usage | None:
    if completion.prompt_tokens is None or completion.cached_tokens is None:
        return None
    return Usage(completion.prompt_tokens, completion.cached_tokens)
