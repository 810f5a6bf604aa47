"""One question to the server: a prompt in a dialect's form, the next greedy tokens back."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from mlxroute.errors import LargeProtocolError, LargeRefused
from mlxroute.large.dialects import Dialect, RequestOptions, StreamingDialect
from mlxroute.large.dialects.json_fields import error_message, parse_object, reported_error
from mlxroute.large.dialects.sse import is_event_stream, parse_events
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.exchange import HttpReply
from mlxroute.large.http.stream_listener import StreamListener
from mlxroute.large.http.transport import Transport
from mlxroute.large.prompt import Prompt
from mlxroute.large.reply import Completion, CompletionAnswer, ReplyPosition
from mlxroute.large.vocabulary.mlx_lm_cache_guard import MlxLmCacheGuard, Usage
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.ledger import Ledger
from mlxroute.safe_text import printable_line
from mlxroute.types import LargeContext

# Vocabularies have tokens of some hundred characters, mostly spaces or dashes.
_LONGEST_TOKEN: Final = 1000


class NotRepeated(LargeProtocolError):
    """The server wrote other tokens than those it was to write again: no fault of the dialect."""


class _Count:
    """Enters one call into the ledger as its reply comes; where the server gives no count, ours."""

    def __init__(self, ledger: Ledger, prompt_tokens: int) -> None:
        self._ledger = ledger
        self._prompt_tokens = prompt_tokens
        self._counted = (0, 0, 0)

    def so_far(self, completion: Completion) -> None:
        """Count what a reply says that was not counted yet."""
        prompt, generated = completion.prompt_tokens, completion.completion_tokens
        prompt = self._prompt_tokens if prompt is None else prompt
        cached = min(completion.cached_tokens or 0, prompt)
        generated = len(completion.positions) if generated is None else generated
        found = (prompt, cached, generated)
        more = [max(0, new - old) for new, old in zip(found, self._counted, strict=True)]
        self._counted = found
        self._ledger.record_usage(
            prompt_tokens=more[0], cached_tokens=more[1], completion_tokens=more[2]
        )


class CompletionRequester:
    """Asks one server. What it has been sent is remembered across dialects.

    Safe for several threads, which share that memory and the reader.
    """

    def __init__(
        self,
        transport: Transport,
        ledger: Ledger,
        *,
        base_url: str,
        top_logprobs: int,
    ) -> None:
        self._transport = transport
        self._ledger = ledger
        self._base_url = base_url
        self._top_logprobs = top_logprobs
        self._cache_guard = MlxLmCacheGuard()
        self._lock = threading.Lock()
        self.reader = TokenReader()
        self.model: str | None = None
        self.model_was_named = False

    def post(
        self, path: str, body: Mapping[str, object], *, deadline: Deadline
    ) -> Mapping[str, object]:
        """POST JSON to a route at the server's root; return the JSON object of the reply.

        Raises LargeError for any status but 200.
        """
        reply = self._transport.call(path, at_root=True, body=_encoded(body), deadline=deadline)
        if reply.status != 200:
            raise self._refusal(error_message(reply.body), reply)
        return parse_object(reply.body)

    def ask(
        self,
        dialect: Dialect,
        prompt: Prompt,
        *,
        count: int,
        deadline: Deadline,
        repeated: tuple[bytes, ...] = (),
        context: LargeContext | None = None,
        listener: StreamListener[CompletionAnswer] | None = None,
    ) -> CompletionAnswer:
        """The next `count` greedy positions after `prompt` and `repeated`, or fewer at the end.

        `repeated` are committed tokens that the form cannot carry and the server has to write
        again. With `listener` the reply is streamed to it. Raises LargeError.
        """
        # One token more than is read, so that this prompt and the read token are no cached whole.
        spare = 1 if dialect.crashes_on_cached_prompts else 0
        with self._lock:
            replayed: tuple[bytes, ...] = ()
            if dialect.crashes_on_cached_prompts:
                text, replayed = self._cache_guard.plan(prompt.text, context=context)
                prompt = replace(prompt, text=text)
            if not (prompt.ids or prompt.text or prompt.messages):
                raise LargeProtocolError("there is no text to send to the large model")
            expected = (*replayed, *repeated)
            asked = RequestOptions(
                len(expected) + count + spare,
                self._top_logprobs,
                self._model_for(dialect),
                streamed=listener is not None,
            )
            body = _encoded(dialect.request(prompt, asked))
            if dialect.crashes_on_cached_prompts:
                self._cache_guard.record_request(prompt.text, max_tokens=asked.max_tokens)
        counted = _Count(
            self._ledger, len(prompt.ids) if context is None else len(context.token_ids)
        )

        def read_partial(reply: bytes) -> bool:
            assert listener is not None
            completion = self._begun(dialect, prompt, reply)
            if completion is None:
                return False
            counted.so_far(completion)
            entries = completion.positions[:count]
            return listener(
                CompletionAnswer(entries, completion.text, False, completion, len(body))
            )

        completion = self._complete(
            dialect, prompt, body, asked, deadline, listener=read_partial if listener else None
        )
        counted.so_far(completion)
        rest = self._after(b"".join(expected), completion.positions)
        entries = rest[:count]
        text = completion.text if len(entries) == len(completion.positions) else ""
        complete = len(entries) == count or entries[-1].ends
        return CompletionAnswer(entries, text, complete, completion, len(body))

    def _model_for(self, dialect: Dialect) -> str | None:
        return self.model if dialect.names_model or self.model_was_named else None

    def _begun(self, dialect: Dialect, prompt: Prompt, body: bytes) -> Completion | None:
        """What a streamed reply says so far; None where that is nothing, or in doubt."""
        try:
            if not is_event_stream(body) or not (found := _joined(dialect, body)):
                return None
            if reported_error(found) is not None:
                return None
            completion = dialect.completion(found, prompt)
            self._check_lengths(completion)
        except LargeProtocolError:
            # The whole reply will be judged.
            return None
        with self._lock:
            self.reader.learn(completion.positions)
        return completion

    def _complete(
        self,
        dialect: Dialect,
        prompt: Prompt,
        body: bytes,
        ask: RequestOptions,
        deadline: Deadline,
        *,
        listener: StreamListener[bytes] | None,
    ) -> Completion:
        watched = dialect.crashes_on_cached_prompts
        reply = self._transport.call(
            dialect.path, at_root=dialect.at_root, body=body, deadline=deadline, listener=listener
        )
        with self._lock:
            if watched and reply.status != 200:
                self._cache_guard.record_refusal(prompt.text, max_tokens=ask.max_tokens)
            completion = self._understood(dialect, prompt, reply)
            self._check_lengths(completion)
            self.reader.learn(completion.positions)
            if watched:
                data = [self.reader.prompt_bytes(entry.token) for entry in completion.positions]
                self._cache_guard.record_reply(prompt.text, data, usage=_usage(completion))
        return completion

    def _check_lengths(self, completion: Completion) -> None:
        for entry in completion.positions:
            spelled = (entry.token.piece, entry.token.data, entry.token.text)
            if (length := max(len(form or "") for form in spelled)) > _LONGEST_TOKEN:
                raise LargeProtocolError(
                    f"{self._base_url} sent {length:,} characters as one token"
                )

    def _after(
        self, expected: bytes, entries: tuple[ReplyPosition, ...]
    ) -> tuple[ReplyPosition, ...]:
        """The positions after those that repeat the committed bytes `expected`."""
        data, skipped = b"", 0
        while len(data) < len(expected) and skipped < len(entries):
            data += self.reader.prompt_bytes(entries[skipped].token) or b""
            skipped += 1
        if data != expected or skipped == len(entries):
            raise NotRepeated(
                f"{self._base_url} did not continue the answer with the tokens it already has"
            )
        return entries[skipped:]

    def _understood(self, dialect: Dialect, prompt: Prompt, reply: HttpReply) -> Completion:
        if reply.status != 200:
            raise self._refusal(error_message(reply.body), reply)
        try:
            if isinstance(dialect, StreamingDialect) and is_event_stream(reply.body):
                value = _joined(dialect, reply.body)
            else:
                value = parse_object(reply.body)
            if (message := reported_error(value)) is not None:
                raise self._refusal(message, reply)
            return dialect.completion(value, prompt)
        except LargeProtocolError as exc:
            raise LargeProtocolError(f"{self._base_url}: {exc}") from exc

    def _refusal(self, message: str, reply: HttpReply) -> LargeRefused:
        """The error for a reply that is no success, without the key should the server echo it."""
        said = printable_line(self._transport.redact(message)) or "no reason given"
        hint = "; check the API key" if reply.status in (401, 403) else ""
        if reply.retry_after_s:
            hint = f"; it asks to be called again in {reply.retry_after_s:,.0f} s"
        return LargeRefused(
            f"{self._base_url} answered {reply.status}: {said}{hint}",
            status=reply.status,
            retry_after_s=reply.retry_after_s,
        )


def _joined(dialect: Dialect, body: bytes) -> dict[str, object]:
    assert isinstance(dialect, StreamingDialect)
    return dialect.join_events(parse_events(body))


def _encoded(body: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise LargeProtocolError("the prompt holds half a surrogate pair") from exc


def _usage(completion: Completion) -> Usage | None:
    if completion.prompt_tokens is None or completion.cached_tokens is None:
        return None
    return Usage(completion.prompt_tokens, completion.cached_tokens)
