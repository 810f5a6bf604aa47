"""The large model behind an address: one token per call, or an error that says why not."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
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
from mlxroute.large.bridge import Bridge, Bridged
from mlxroute.large.dialects import LADDER, Dialect, Form, Prompt, dialect_named, reading_ids
from mlxroute.large.match import fingerprint, same_decoded, same_entries, same_named
from mlxroute.large.models import ServedModel, listed, served_models
from mlxroute.large.probe import Found, NothingFits, Prober
from mlxroute.large.prompt import PromptBuilder
from mlxroute.large.tokens import FileTokens, ServerTokens, Tokenizer, TokenSource
from mlxroute.large.transport import Deadline, Reply, Transport, printable
from mlxroute.large.verdict import Verdict, VerdictFile
from mlxroute.ledger import Ledger
from mlxroute.types import LargeContext, LargeToken, Progress, Uploads, Vocabulary, no_progress

_LONGEST_S: Final = 86_400
_MOST_PARTS: Final = 6
_MISFITS: Final = 2
_DIALECT_STATUSES: Final = {400, 404, 405, 415, 422}


@dataclass(frozen=True, slots=True)
class _Terms:
    """How the server is asked."""

    dialect: Dialect
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class _Pairing:
    """How the answers of one small vocabulary go out and come back."""

    vocabulary: Vocabulary
    builder: PromptBuilder
    bridge: Bridge


class LargeModel:
    """One token per call from a large model on an OpenAI-compatible server.

    `connect` finds out how the server wants to be asked, by questions whose answers are known;
    the outcome is remembered in the file `verdicts`. `find_tokenizer` may know the tokenizer of a
    model by the name the server gives it. `timeout_s` bounds a whole reply. `ledger` records what
    is sent. Not for several threads at once.
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
            ledger=self._ledger,
        )
        self._asker = Asker(
            self._transport,
            self._ledger,
            base_url=self._address.url,
            api_key=api_key,
            top_logprobs=top_logprobs,
        )
        self._asker.model, self._asker.model_was_named = model, model is not None
        self._timeout_s = timeout_s
        self._model = model
        self._verdicts = None if verdicts is None else VerdictFile(verdicts)
        self._find_tokenizer = find_tokenizer
        self._served: tuple[ServedModel, ...] = ()
        self._tokens: TokenSource | None = None
        self._terms: _Terms | None = None
        self._pairing: _Pairing | None = None
        self._call: Deadline | None = None
        self._misfits = 0

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

    def connect(self, *, progress: Progress = no_progress) -> str:
        """Settle how to ask the server; return one line saying what was found.

        A remembered verdict is checked with one call, otherwise the server is probed. Raises
        LargeError, or UsageError when a model must be named.
        """
        if self._terms is None:
            self._look_around()
            self._terms = self._remembered() or self._probed(progress)
        return f"large model {self.model_name} at {self.base_url} ({self._terms.dialect.name})"

    def probe(self, *, progress: Progress = no_progress) -> Verdict:
        """Find the best way to ask the server, whatever is remembered of it; remember the outcome.

        Raises LargeError (`probe.NothingFits` when no way tells the truth) and UsageError.
        """
        self._look_around()
        self._terms = self._probed(progress)
        assert self._terms.verdict is not None
        return self._terms.verdict

    def meet(self, vocabulary: Vocabulary) -> bool:
        """Prepare for answers in a small vocabulary; return whether the large model shares it.

        The token strings are compared id by id, once for each endpoint. Raises LargeError.
        """
        if self._terms is None:
            self.connect()
        return self._paired(vocabulary).builder.same

    def next_token(self, context: LargeContext, *, deadline_s: float | None = None) -> LargeToken:
        """The large model's greedy token after `context`. Raises LargeError subclasses only."""
        start_s = time.perf_counter()
        limit_s = self._timeout_s if deadline_s is None else min(self._timeout_s, deadline_s)
        if limit_s <= 0:
            raise LargeTimeout(f"no time left to ask {self.base_url}")
        self._call = Deadline(limit_s)
        try:
            return self._next_token(context, self._call, start_s)
        except UsageError as exc:
            raise LargeRefused(str(exc)) from exc
        finally:
            self._call = None

    def _next_token(self, context: LargeContext, deadline: Deadline, start_s: float) -> LargeToken:
        if self._terms is None:
            self._terms = self._first_that_fits()
        pairing = self._paired(context.vocabulary)
        try:
            prompt = pairing.builder.build(context)
        except LargeRefused as exc:
            self._count_misfit(exc)
            raise
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
            latency_s=time.perf_counter() - start_s,
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
            self._count_misfit(exc)
            raise
        self._misfits = 0
        return answered

    def _count_misfit(self, exc: LargeError) -> None:
        refused = isinstance(exc, LargeRefused) and exc.status in _DIALECT_STATUSES
        unread = isinstance(exc, LargeProtocolError) and not isinstance(exc, NotRepeated)
        self._misfits += refused or unread
        if self._misfits >= _MISFITS:
            self._misfits = 0
            self._terms = self._pairing = None
            if self._verdicts is not None:
                self._verdicts.forget(self.base_url, self._model)

    def _look_around(self) -> None:
        """Which models there are, and where ids of the large vocabulary come from."""
        self._served = served_models(self._transport, self._deadline())
        if self._model is None and len(self._served) == 1:
            self._asker.model = self._served[0].name
        self._tokens = self._find_tokens()

    def _find_tokens(self) -> TokenSource | None:
        tokenizer = None if self._asker.model is None else self._find_tokenizer(self._asker.model)
        if tokenizer is None:
            return ServerTokens.find(self._post, model=self._asker.model)
        self._asker.reader.own = tokenizer.vocabulary
        return FileTokens(tokenizer)

    def _remembered(self) -> _Terms | None:
        """The terms of an earlier probe, if they still hold."""
        verdict = None
        if self._verdicts is not None:
            verdict = self._verdicts.load(self.base_url, self._model)
        dialect = None if verdict is None else dialect_named(verdict.dialect)
        if verdict is None or dialect is None or verdict.model != self._asker.model:
            return None
        return _Terms(dialect, verdict) if self._prober().fits(dialect) else None

    def _probed(self, progress: Progress) -> _Terms:
        try:
            found = self._prober(progress).find()
        except NothingFits as exc:
            raise self._unnamed() or exc from exc
        verdict = self._verdict(found)
        if self._verdicts is not None:
            self._verdicts.save(verdict, named=self._model)
        return _Terms(found.dialect, verdict)

    def _first_that_fits(self) -> _Terms:
        """Terms found within one call's time, by the first question alone, for this once."""
        self._look_around()
        prober = self._prober()
        for dialect in LADDER:
            if prober.fits(dialect):
                return _Terms(dialect, None)
        raise self._unnamed() or LargeProtocolError(
            f"{self.base_url} answers in no way that is understood; try `mlxroute probe`"
        )

    def _unnamed(self) -> UsageError | None:
        """The error for a server with several models of which none was named."""
        if self._model is not None or len(self._served) < 2:
            return None
        names = listed([model.name for model in self._served])
        return UsageError(
            f"{self.base_url} has several models; name one with --large-model: {names}"
        )

    def _prober(self, progress: Progress = no_progress) -> Prober:
        return Prober(self._asker, self._tokens, deadline=self._deadline, progress=progress)

    def _verdict(self, found: Found) -> Verdict:
        ordered = sorted(found.latencies_s)
        model = next((m for m in self._served if m.name == self._asker.model), None)
        return Verdict(
            base_url=self.base_url,
            model=self._asker.model,
            dialect=found.dialect.name,
            rung=found.dialect.rung,
            checks=found.checks,
            refusals=found.refusals,
            tokens=None if self._tokens is None else self._tokens.name,
            context_length=None if model is None else model.context_length,
            latency_p50_s=ordered[len(ordered) // 2],
            latency_p95_s=ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            calls=found.calls,
        )

    def _paired(self, vocabulary: Vocabulary) -> _Pairing:
        if self._pairing is None or self._pairing.vocabulary is not vocabulary:
            assert self._terms is not None
            same = self._shares(vocabulary)
            reader = self._asker.reader
            if same and reader.own is None:
                reader.own = vocabulary
            dialect = self._terms.dialect
            if reader.own is not None:
                dialect = reading_ids(dialect)
            self._pairing = _Pairing(
                vocabulary,
                PromptBuilder(dialect, same=same, tokens=self._tokens),
                Bridge(reader, vocabulary, same=same),
            )
        return self._pairing

    def _shares(self, vocabulary: Vocabulary) -> bool:
        assert self._terms is not None
        verdict, small = self._terms.verdict, fingerprint(vocabulary)
        if verdict is not None and (known := verdict.knows(small)) is not None:
            return known
        same: bool | None
        match self._tokens:
            case FileTokens() as files:
                same = same_entries(vocabulary, files.tokenizer.vocabulary)
            case ServerTokens() as routes:
                same = same_decoded(vocabulary, routes.decode)
            case _:
                same = same_named(vocabulary, self._asker.reader.named)
        if same is not None and verdict is not None and self._verdicts is not None:
            verdict = verdict.knowing(small, same)
            self._terms = replace(self._terms, verdict=verdict)
            self._verdicts.save(verdict, named=self._model)
        return bool(same)

    def _deadline(self) -> Deadline:
        """That of the call at hand, or a new one for a call of its own."""
        return self._call or Deadline(self._timeout_s)

    def _post(self, path: str, body: Mapping[str, object]) -> Reply:
        return self._asker.post(path, body, deadline=self._deadline())
