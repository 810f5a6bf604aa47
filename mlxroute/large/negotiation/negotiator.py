"""How a server is asked: settled by a probe, remembered, and given up when it stops fitting."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mlxroute.errors import LargeError, LargeProtocolError, LargeRefused, UsageError
from mlxroute.large.completion_request import CompletionRequester, NotRepeated
from mlxroute.large.dialects import LADDER, Dialect, dialect_named
from mlxroute.large.dialects.tokenize_routes import TokenizeRoutes, find_tokenize_routes
from mlxroute.large.http.deadline import Deadline
from mlxroute.large.http.transport import Transport
from mlxroute.large.negotiation import probe_questions
from mlxroute.large.negotiation.prober import Found, NoUsableDialect, Prober
from mlxroute.large.negotiation.served_models import ServedModel, listed, served_models
from mlxroute.large.negotiation.verdict_file import Verdict, VerdictFile
from mlxroute.large.vocabulary.token_sources import FileTokenSource, Tokenizer, TokenSource
from mlxroute.large.vocabulary.vocabulary_comparison import (
    compare_decoded,
    compare_entries,
    compare_pieces,
    fingerprint,
)
from mlxroute.types import Vocabulary

_MISFITS: Final = 2
_DIALECT_STATUSES: Final = {400, 404, 405, 415, 422}


@dataclass(frozen=True, slots=True)
class NegotiatedDialect:
    """How the server is asked; without a verdict where only the first question was put to it."""

    dialect: Dialect
    verdict: Verdict | None


class Negotiator:
    """Finds and keeps the terms of one endpoint. `deadline` makes the bound of each call."""

    def __init__(
        self,
        transport: Transport,
        asker: CompletionRequester,
        *,
        base_url: str,
        model: str | None,
        verdicts: Path | None,
        find_tokenizer: Callable[[str], Tokenizer | None],
        deadline: Callable[[], Deadline],
    ) -> None:
        self._transport = transport
        self._asker = asker
        self._base_url = base_url
        self._model = model
        self._verdicts = None if verdicts is None else VerdictFile(verdicts)
        self._find_tokenizer = find_tokenizer
        self._deadline = deadline
        self._served: tuple[ServedModel, ...] = ()
        self._misfits = 0
        self.tokens: TokenSource | None = None
        self.terms: NegotiatedDialect | None = None

    def settle(self, *, thorough: bool) -> NegotiatedDialect:
        """The terms: those of an earlier probe if they still hold, else those of a new one.

        Not `thorough`, the first question alone decides, and nothing is remembered. Raises
        LargeError, or UsageError when a model must be named.
        """
        if self.terms is None:
            self._look_around()
            found = self._remembered()
            self.terms = found or (self._probed() if thorough else self._first_that_fits())
        return self.terms

    def probe(self) -> Verdict:
        """A new verdict, whatever is remembered. Raises as `settle`."""
        self._look_around()
        self.terms = self._probed()
        assert self.terms.verdict is not None
        return self.terms.verdict

    def fitted(self) -> None:
        """A call was answered as the terms have it."""
        self._misfits = 0

    def failed(self, error: LargeError, terms: NegotiatedDialect) -> None:
        """A call under these terms failed; terms that keep misfitting are given up and forgotten.

        Other terms than the present ones are no news: the call began under earlier ones.
        """
        if terms is not self.terms or not _misfits(error):
            return
        self._misfits += 1
        if self._misfits >= _MISFITS:
            self._misfits = 0
            self.terms = None
            if self._verdicts is not None:
                self._verdicts.forget(self._base_url, self._model)

    def shares(self, vocabulary: Vocabulary) -> bool | None:
        """Whether the large model's vocabulary is this one, compared once for each endpoint.

        None where that cannot be told. Raises LargeError.
        """
        assert self.terms is not None
        verdict, small = self.terms.verdict, fingerprint(vocabulary)
        if verdict is not None and (known := verdict.knows(small)) is not None:
            return known
        same: bool | None
        match self.tokens:
            case FileTokenSource() as files:
                same = compare_entries(vocabulary, files.tokenizer.vocabulary)
            case TokenizeRoutes() as routes:
                same = compare_decoded(vocabulary, routes.decode)
            case _:
                same = self._named_alike(vocabulary)
        if same is not None and verdict is not None and self._verdicts is not None:
            verdict = verdict.knowing(small, same)
            self.terms = replace(self.terms, verdict=verdict)
            self._verdicts.save(verdict, named=self._model)
        return same

    def _named_alike(self, vocabulary: Vocabulary) -> bool | None:
        """The same by what replies name; a server that names tokens is asked for enough of them."""
        assert self.terms is not None
        reader, prober, before = self._asker.reader, self._prober(), 0
        for question in probe_questions.MANY_TOKENS:
            named = reader.pieces_by_id
            if len(named) == before or compare_pieces(vocabulary, named) is not None:
                break
            before = len(named)
            prober.have_named(self.terms.dialect, question)
        return compare_pieces(vocabulary, reader.pieces_by_id)

    def _look_around(self) -> None:
        """Which models there are, and where ids of the large vocabulary come from."""
        self._served = served_models(self._transport, self._deadline())
        if self._model is None and len(self._served) == 1:
            self._asker.model = self._served[0].name
        self.tokens = self._find_tokens()

    def _find_tokens(self) -> TokenSource | None:
        tokenizer = None if self._asker.model is None else self._find_tokenizer(self._asker.model)
        if tokenizer is None:
            return find_tokenize_routes(self._post, model=self._asker.model)
        self._asker.reader.vocabulary = tokenizer.vocabulary
        return FileTokenSource(tokenizer)

    def _remembered(self) -> NegotiatedDialect | None:
        """The terms of an earlier probe, if they still hold."""
        verdict = None
        if self._verdicts is not None:
            verdict = self._verdicts.load(self._base_url, self._model)
        dialect = None if verdict is None else dialect_named(verdict.dialect)
        if verdict is None or dialect is None or verdict.model != self._asker.model:
            return None
        return NegotiatedDialect(dialect, verdict) if self._prober().fits(dialect) else None

    def _probed(self) -> NegotiatedDialect:
        try:
            found = self._prober().find()
        except NoUsableDialect as exc:
            raise self._unnamed() or exc from exc
        verdict = self._verdict(found)
        if self._verdicts is not None:
            self._verdicts.save(verdict, named=self._model)
        return NegotiatedDialect(found.dialect, verdict)

    def _first_that_fits(self) -> NegotiatedDialect:
        """Terms found by the first question alone, in a few calls."""
        prober = self._prober()
        for dialect in LADDER:
            if prober.fits(dialect):
                return NegotiatedDialect(dialect, None)
        raise self._unnamed() or LargeProtocolError(
            f"{self._base_url} answers in no way that is understood; try `mlxroute probe`"
        )

    def _unnamed(self) -> UsageError | None:
        """The error for a server with several models of which none was named."""
        if self._model is not None or len(self._served) < 2:
            return None
        names = listed([model.name for model in self._served])
        return UsageError(
            f"{self._base_url} has several models; name one with --large-model: {names}"
        )

    def _prober(self) -> Prober:
        return Prober(self._asker, self.tokens, deadline=self._deadline)

    def _verdict(self, found: Found) -> Verdict:
        ordered = sorted(found.latencies_s)
        model = next((m for m in self._served if m.name == self._asker.model), None)
        return Verdict(
            base_url=self._base_url,
            model=self._asker.model,
            dialect=found.dialect.name,
            rung=found.dialect.rung,
            checks=found.checks,
            refusals=found.refusals,
            tokens=None if self.tokens is None else self.tokens.name,
            context_length=None if model is None else model.context_length,
            latency_p50_s=ordered[len(ordered) // 2],
            latency_p95_s=ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            calls=found.calls,
        )

    def _post(self, path: str, body: Mapping[str, object]) -> Mapping[str, object]:
        return self._asker.post(path, body, deadline=self._deadline())


def _misfits(error: LargeError) -> bool:
    """Whether an error says that the server is asked in the wrong way."""
    if isinstance(error, LargeRefused):
        # A 400 for a prompt that is too long says nothing about how it was asked.
        too_long = re.search(r"context|too long|maximum|exceed", str(error))
        return error.status in _DIALECT_STATUSES and not too_long
    return isinstance(error, LargeProtocolError) and not isinstance(error, NotRepeated)
