"""The large model behind an address: one token per call, or an error that says why not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from mlxroute.large.asker import Answered, Asker, NotRepeated
from mlxroute.large.breaker import Breaker
from mlxroute.large.bridge import Bridge, Bridged
from mlxroute.large.dialects import Form, Prompt, reading_ids
from mlxroute.large.match import ENOUGH
from mlxroute.large.prompt import PromptBuilder
from mlxroute.large.settlement import Settlement, Terms
from mlxroute.large.tokens import FileTokens, Tokenizer
from mlxroute.large.transport import Deadline, Transport, printable
from mlxroute.large.verdict import Verdict
from mlxroute.ledger import Ledger
from mlxroute.types import LargeContext, LargeToken, Uploads, Vocabulary

_LONGEST_S: Final = 86_400
_MOST_PARTS: Final = 6
_DIALECT_STATUSES: Final = {400, 404, 405, 415, 422}


@dataclass(frozen=True, slots=True)
class _Pairing:
    """How the answers of one small vocabulary go out and come back."""

    vocabulary: Vocabulary
    terms: Terms
    same: bool | None
    builder: PromptBuilder
    bridge: Bridge


class LargeModel:
    """One token per call from a large model on an OpenAI-compatible server.

    `connect` finds out how the server wants to be asked, by questions whose answers are known;
    the outcome is remembered in the file `verdicts`. `find_tokenizer` may know the tokenizer of a
    model by the name the server gives it. `timeout_s` bounds a whole reply. `ledger` records what
    is sent. Not for several threads at once.
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
        self._breaker = Breaker(self._address.url)
        self._asker = Asker(
            self._transport,
            self._ledger,
            base_url=self._address.url,
            top_logprobs=top_logprobs,
        )
        self._asker.model, self._asker.model_was_named = model, model is not None
        self._timeout_s = timeout_s
        self._model = model
        self._settlement = Settlement(
            self._transport,
            self._asker,
            base_url=self._address.url,
            model=model,
            verdicts=verdicts,
            find_tokenizer=find_tokenizer,
            deadline=self._deadline,
        )
        self._pairing: _Pairing | None = None
        self._call: Deadline | None = None

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
        name = self._model or self._asker.model or "the server's own model"
        # Servers list a local model by its path; only the last part means something.
        return printable(PurePosixPath(name).name if name.startswith("/") else name, limit=100)

    @property
    def uploads(self) -> Uploads:
        """What was sent so far, questions about the server included."""
        return self._ledger.uploads

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""
        self._transport.close()

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
        with self._breaker.guard():
            terms = self._settlement.settle(thorough=thorough)
        return f"large model {self.model_name} at {self.base_url} ({terms.dialect.name})"

    def probe(self) -> Verdict:
        """Find the best way to ask the server, whatever is remembered of it; remember the outcome.

        Raises LargeError (`probe.NothingFits` when no way tells the truth) and UsageError.
        """
        return self._settlement.probe()

    def meet(self, vocabulary: Vocabulary) -> bool:
        """Prepare for answers in a small vocabulary; return whether the large model shares it.

        The token strings are compared id by id, once for each endpoint. Raises LargeError.
        """
        self._settlement.settle(thorough=True)
        return self._paired(vocabulary).builder.same

    @property
    def knows_template(self) -> bool:
        """Whether a conversation reaches the large model in its own chat template."""
        if self._pairing is None:
            return False
        builder = self._pairing.builder
        by_server = builder.dialect.form is not Form.TEXT
        return builder.same or by_server or isinstance(builder.tokens, FileTokens)

    def next_token(self, context: LargeContext, *, deadline_s: float | None = None) -> LargeToken:
        """The large model's greedy token after `context`. Raises LargeError subclasses only.

        LargeUnavailable means that there was no call: the last ones failed too often.
        """
        limit_s = self._timeout_s if deadline_s is None else min(self._timeout_s, deadline_s)
        if limit_s <= 0:
            raise LargeTimeout(f"no time left to ask {self.base_url}")
        self._call = Deadline(limit_s)
        try:
            with self._breaker.guard(fragment=bool(context.fragment_ids)):
                return self._next_token(context, self._call)
        finally:
            self._call = None

    def _next_token(self, context: LargeContext, deadline: Deadline) -> LargeToken:
        start_s, lost_s = time.perf_counter(), self._transport.lost_s
        try:
            self._settlement.settle(thorough=False)
        except UsageError as exc:
            raise LargeRefused(str(exc)) from exc
        pairing = self._paired(context.vocabulary)
        sent = pairing.builder.as_read(context)
        try:
            token = self._token_after(sent, pairing, deadline)
        except NotRepeated:
            if sent is context:
                raise
            # Where the server does not write its tokens again, it reads them in its own way.
            token = self._token_after(context, pairing, deadline)
        return replace(
            token,
            latency_s=time.perf_counter() - start_s,
            lost_s=self._transport.lost_s - lost_s,
        )

    def _token_after(
        self, context: LargeContext, pairing: _Pairing, deadline: Deadline
    ) -> LargeToken:
        try:
            prompt = pairing.builder.build(context)
        except LargeRefused as exc:
            self._note(exc)
            raise
        self._check_length(prompt)
        repeated: tuple[bytes, ...] = ()
        if pairing.builder.dialect.form is not Form.IDS:
            repeated = tuple(map(context.vocabulary.token_bytes, context.fragment_ids))
        bridged: Bridged | None = None
        uploaded = 0
        for count in range(1, _MOST_PARTS + 1):
            answered = self._ask(pairing, prompt, context, repeated, count, deadline)
            uploaded += answered.uploaded_bytes
            bridged = pairing.bridge.token(answered.entries, answered.text)
            # Behind the end of the answer there is nothing more to ask for.
            if bridged is not None or answered.completion.ends:
                break
        if bridged is None:
            raise LargeProtocolError(f"{self.base_url} gives no whole character here")
        completion = answered.completion
        return LargeToken(
            token_ids=bridged.token_ids,
            text=bridged.text,
            is_eos=bridged.is_eos,
            logprob=answered.entries[0].token.logprob,
            top=bridged.top,
            large_ids=bridged.large_ids,
            prompt_tokens=completion.prompt_tokens,
            cached_tokens=completion.cached_tokens,
            completion_tokens=completion.completion_tokens,
            uploaded_bytes=uploaded,
            latency_s=0.0,
        )

    def _ask(
        self,
        pairing: _Pairing,
        prompt: Prompt,
        context: LargeContext,
        repeated: tuple[bytes, ...],
        count: int,
        deadline: Deadline,
    ) -> Answered:
        """One call; a dialect that keeps failing is given up, and the server probed anew."""
        try:
            answered = self._asker.ask(
                pairing.builder.dialect,
                prompt,
                count=count,
                deadline=deadline,
                repeated=repeated,
                context=context,
            )
        except LargeError as exc:
            self._note(exc)
            raise
        self._settlement.fitted()
        return answered

    def _note(self, error: LargeError) -> None:
        if _misfits(error):
            self._settlement.misfit()

    def _paired(self, vocabulary: Vocabulary) -> _Pairing:
        settlement, reader, known = self._settlement, self._asker.reader, self._pairing
        if (
            known is None
            or known.vocabulary is not vocabulary
            or known.terms is not settlement.terms
            # What could not be told by the first replies is told by enough of them.
            or (known.same is None and len(reader.named) >= ENOUGH)
        ):
            same = settlement.shares(vocabulary)
            terms = settlement.terms
            assert terms is not None
            if same and reader.own is None:
                reader.own = vocabulary
            dialect = terms.dialect if reader.own is None else reading_ids(terms.dialect)
            known = self._pairing = _Pairing(
                vocabulary,
                terms,
                same,
                PromptBuilder(dialect, same=bool(same), tokens=settlement.tokens),
                Bridge(reader, vocabulary, same=bool(same)),
            )
        return known

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
        """That of the call at hand, or a new one for a call of its own."""
        return self._call or Deadline(self._timeout_s)


def _misfits(error: LargeError) -> bool:
    """Whether an error says that the server is asked in the wrong way."""
    if isinstance(error, LargeRefused):
        # A 400 for a prompt that is too long says nothing about how it was asked.
        too_long = re.search(r"context|too long|maximum|exceed", str(error))
        return error.status in _DIALECT_STATUSES and not too_long
    return isinstance(error, LargeProtocolError) and not isinstance(error, NotRepeated)
