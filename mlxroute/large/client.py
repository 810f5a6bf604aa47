"""The large model behind an address: one token per call, or an error that says why not."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final, Self

from mlxroute.errors import (
    LargeError,
    LargeProtocolError,
    LargeRefused,
    LargeTimeout,
    UsageError,
)
from mlxroute.large.address import parse_address
from mlxroute.large.breaker import Breaker
from mlxroute.large.bridge import Bridge
from mlxroute.large.dialects.completions import PlainCompletions
from mlxroute.large.dialects.mlx_lm import MlxLm
from mlxroute.large.replay import SentPrompts, Usage
from mlxroute.large.transport import Deadline, Reply, Transport, printable
from mlxroute.large.wire import (
    Completion,
    Dialect,
    Entry,
    error_in,
    error_message,
    parse_object,
    sequence,
)
from mlxroute.types import LargeContext, LargeToken

_PROBE_PROMPT: Final = "1, 2, 3,"
_MODELS_SHOWN: Final = 8
_LONGEST_S: Final = 86_400
# Vocabularies have tokens of some hundred characters, mostly spaces or dashes.
_LONGEST_TOKEN: Final = 1000


class LargeModel:
    """One token per call from a large model on an OpenAI-compatible server.

    The first call, or `connect`, finds out how the server wants to be asked. `timeout_s` bounds a
    whole reply. Not for several threads at once.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        connect_timeout_s: float = 5.0,
        top_logprobs: int = 5,
        ca_bundle: Path | None = None,
    ) -> None:
        if not (0 < timeout_s <= _LONGEST_S and 0 < connect_timeout_s <= _LONGEST_S):
            raise UsageError(f"timeouts must be above 0 and at most {_LONGEST_S} seconds")
        self._address = parse_address(base_url)
        self._transport = Transport(
            self._address,
            api_key=api_key,
            connect_timeout_s=connect_timeout_s,
            ca_bundle=ca_bundle,
        )
        self._breaker = Breaker(self._address.url)
        self._timeout_s = timeout_s
        self._top_logprobs = top_logprobs
        self._model = model
        self._served_name: str | None = None
        self._dialect: Dialect | None = None
        self._sent = SentPrompts()
        self._bridge = Bridge()

    def __repr__(self) -> str:
        return f"LargeModel({self.base_url!r}, model={self.model_name!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def base_url(self) -> str:
        """The server's address, without user and password."""
        return self._address.url

    @property
    def model_name(self) -> str:
        """The model asked for, or the one the server says it has, fit to be shown."""
        name = self._model or self._served_name or "the server's own model"
        # Servers list a local model by its path; only the last part means something.
        return printable(PurePosixPath(name).name if name.startswith("/") else name, limit=100)

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""
        self._transport.close()

    def connect(self) -> str:
        """Check the server and settle how to ask it; return one line saying what was found.

        Generates at most one token. Raises LargeError, or UsageError when a model must be named.
        """
        with self._breaker.guard():
            dialect = self._settle(Deadline(self._timeout_s))
        return f"large model {self.model_name} at {self.base_url} ({dialect.name})"

    def next_token(self, context: LargeContext, *, deadline_s: float | None = None) -> LargeToken:
        """The large model's greedy token after `context`. Raises LargeError subclasses only.

        LargeUnavailable means that there was no call: the last ones failed too often.
        """
        with self._breaker.guard(fragment=bool(context.fragment_ids)):
            return self._next_token(context, deadline_s=deadline_s)

    def _next_token(self, context: LargeContext, *, deadline_s: float | None) -> LargeToken:
        start_s, lost_s = time.perf_counter(), self._transport.lost_s
        limit_s = self._timeout_s if deadline_s is None else min(self._timeout_s, deadline_s)
        if limit_s <= 0:
            raise LargeTimeout(f"no time left to ask {self.base_url}")
        deadline = Deadline(limit_s)
        try:
            dialect = self._dialect or self._settle(deadline)
        except UsageError as exc:
            raise LargeRefused(str(exc)) from exc
        entry, completion, uploaded_bytes = self._ask(dialect, context, deadline=deadline)
        spelled = (entry.token.piece, entry.token.data, entry.token.text)
        if (length := max(len(form or "") for form in spelled)) > _LONGEST_TOKEN:
            raise LargeProtocolError(f"{self.base_url} sent {length:,} characters as one token")
        bridged = self._bridge.token(entry, vocabulary=context.vocabulary)
        return LargeToken(
            token_ids=bridged.token_ids,
            text=bridged.text,
            is_eos=bridged.is_eos,
            logprob=entry.token.logprob,
            top=bridged.top,
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=completion.cached_tokens,
            completion_tokens=completion.completion_tokens,
            uploaded_bytes=uploaded_bytes,
            latency_s=time.perf_counter() - start_s,
            lost_s=self._transport.lost_s - lost_s,
        )

    def _ask(
        self, dialect: Dialect, context: LargeContext, *, deadline: Deadline
    ) -> tuple[Entry, Completion, int]:
        """The wanted entry of the reply, the reply, and the size of the request."""
        vocabulary = context.vocabulary
        if context.fragment_ids and not dialect.gives_ids:
            raise LargeProtocolError(
                f"{self.base_url} takes text only, and the answer stops inside a character"
            )
        # The server adds the begin token itself; two of them change what the model says.
        prompt = context.text.removeprefix(vocabulary.bos_text)
        repeated: tuple[bytes, ...] = ()
        if dialect.dies_of_cached_prompts:
            prompt, repeated = self._sent.plan(prompt, context=context)
        repeated = (*repeated, *map(vocabulary.token_bytes, context.fragment_ids))
        if not prompt:
            raise LargeProtocolError("there is no text to send to the large model")
        # One token more than is read, so that this prompt and the read token are no cached whole.
        spare = 1 if dialect.dies_of_cached_prompts else 0
        max_tokens = len(repeated) + 1 + spare
        body = self._body(dialect, prompt, max_tokens=max_tokens)
        self._sent.sent(prompt, max_tokens=max_tokens)
        reply = self._transport.call("/completions", body=body, deadline=deadline)
        if reply.status != 200:
            self._sent.refused(prompt, max_tokens=max_tokens)
        completion = self._understood(dialect, reply)
        for entry in completion.entries:
            self._bridge.learn(entry)
        data = [self._bridge.data(e.token, vocabulary=vocabulary) for e in completion.entries]
        self._sent.answered(prompt, data, usage=_usage(completion))
        if data[: len(repeated)] != list(repeated) or len(data) == len(repeated):
            raise LargeProtocolError(
                f"{self.base_url} did not continue the answer with the tokens it already has"
            )
        return completion.entries[len(repeated)], completion, len(body)

    def _settle(self, deadline: Deadline) -> Dialect:
        """Find the dialect, and the model's name where the server needs or knows one.

        `mlx_lm.server` refuses a numeric `logprobs` before it generates anything.
        """
        plain, mlx_lm = PlainCompletions(), MlxLm()
        reply = self._probe(plain, deadline)
        if reply.status == 400 and re.search(r"logprobs.*\bbool", error_message(reply.body)):
            self._served_name = self._sole_model(deadline)
            self._dialect = mlx_lm
            return mlx_lm
        if self._model is None and reply.status not in (401, 403):
            models = self._models(deadline)
            if len(models) > 1:
                raise UsageError(
                    f"{self.base_url} serves several models; choose one with --large-model:"
                    f" {_listed(models)}"
                )
            if models:
                self._model = models[0]
                reply = reply if reply.status == 200 else self._probe(plain, deadline)
        self._understood(plain, reply)
        self._dialect = plain
        return plain

    def _probe(self, dialect: Dialect, deadline: Deadline) -> Reply:
        body = self._body(dialect, _PROBE_PROMPT, max_tokens=1)
        return self._transport.call("/completions", body=body, deadline=deadline)

    def _body(self, dialect: Dialect, prompt: str, *, max_tokens: int) -> bytes:
        request = dialect.request(
            prompt, max_tokens=max_tokens, top_logprobs=self._top_logprobs, model=self._model
        )
        try:
            return json.dumps(request, ensure_ascii=False).encode()
        except UnicodeEncodeError as exc:
            raise LargeProtocolError("the prompt holds half a surrogate pair") from exc

    def _understood(self, dialect: Dialect, reply: Reply) -> Completion:
        if reply.status != 200:
            raise self._refusal(error_message(reply.body), reply=reply)
        try:
            value = parse_object(reply.body)
            if (message := error_in(value)) is not None:
                raise self._refusal(message, reply=reply)
            return dialect.completion(value)
        except LargeProtocolError as exc:
            raise LargeProtocolError(f"{self.base_url}: {exc}") from exc

    def _refusal(self, message: str, *, reply: Reply) -> LargeRefused:
        status, later_s = reply.status, reply.retry_after_s
        said = printable(self._transport.without_secrets(message)) or "no reason given"
        hint = "; check the API key" if status in (401, 403) else ""
        if later_s:
            hint = f"; it asks to be called again in {later_s:,.0f} s"
        return LargeRefused(
            f"{self.base_url} answered {status}: {said}{hint}",
            status=status,
            retry_after_s=later_s,
        )

    def _models(self, deadline: Deadline) -> list[str]:
        """The ids of `/v1/models`; empty where the server does not tell."""
        try:
            reply = self._transport.call("/models", deadline=deadline)
            listed = sequence(parse_object(reply.body).get("data"), what="data")
        except LargeError:
            return []
        ids = (item.get("id") for item in listed if isinstance(item, dict))
        return [name for name in ids if isinstance(name, str) and name]

    def _sole_model(self, deadline: Deadline) -> str | None:
        models = self._models(deadline)
        return models[0] if len(models) == 1 else None


def _usage(completion: Completion) -> Usage | None:
    if completion.prompt_tokens is None or completion.cached_tokens is None:
        return None
    return Usage(completion.prompt_tokens, completion.cached_tokens)


def _listed(models: Sequence[str]) -> str:
    shown = [printable(name, limit=80) for name in models[:_MODELS_SHOWN]]
    rest = len(models) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
