"""The negotiator of one server: chooses its dialect and remembers the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mlxroute.errors import LargeError, LargeProtocolError, LargeRefused, UsageError
from mlxroute.large.completion_request import CompletionRequester
from mlxroute.large.dialects import Dialect, get_dialect
from mlxroute.large.dialects.tokenize_routes import Post, TokenizeRoutes, find_tokenize_routes
from mlxroute.large.http.deadline import NextDeadline
from mlxroute.large.http.transport import Transport
from mlxroute.large.negotiation import probe_questions
from mlxroute.large.negotiation.prober import NoUsableDialect, Prober, ProbeResult
from mlxroute.large.negotiation.rejection import lacks_root
from mlxroute.large.negotiation.served_models import (
    ModelName,
    ServedModel,
    join_names,
    list_served_models,
)
from mlxroute.large.negotiation.verdict_file import ComparedVocabulary, Verdict, VerdictFile
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.large.vocabulary.token_sources import FileTokenSource, Tokenizer, TokenSource
from mlxroute.large.vocabulary.vocabulary_comparison import (
    VocabularyComparison,
    compare_control_count,
    compare_decoded,
    compare_entries,
    compare_pieces,
    fingerprint,
)
from mlxroute.statistics import percentile
from mlxroute.types import Vocabulary


@dataclass(frozen=True, slots=True)
class NegotiatedDialect:
    """The dialect in use; `verdict` is None if only the first check was made."""

    dialect: Dialect
    verdict: Verdict | None


class Negotiator:
    """Negotiates the dialect of one server. Not safe for several threads.

    The `next_deadline` of the methods returns the deadline of each request.

    Args:
        transport: Sends the request for the list of models.
        requester: Sends the requests of checks.
        base_url: The address, for messages and as the key of verdicts.
        model: The name of the model that the user gave; None if they gave none.
        verdicts: The file that remembers verdicts; None for none.
        find_tokenizer: Returns the tokenizer of a model on this machine, given the server's name of
            the model, or None.
        reader: Gets the model's vocabulary when that becomes known.
    """

    def __init__(
        self,
        transport: Transport,
        requester: CompletionRequester,
        *,
        base_url: str,
        model: str | None,
        verdicts: Path | str | None,
        find_tokenizer: Callable[[str], Tokenizer | None],
        reader: TokenReader,
    ) -> None:
        self._transport = transport
        self._requester = requester
        self._base_url = base_url
        self._verdicts = None if verdicts is None else VerdictFile(verdicts)
        self._find_tokenizer = find_tokenizer
        self._reader = reader
        self._served: tuple[ServedModel, ...] = ()
        self.model = ModelName(model)
        self.tokens: TokenSource | None = None
        self.negotiated: NegotiatedDialect | None = None
        self._former: Dialect | None = None
        self.is_verdict_saved = False
        """Whether the verdict of the last probe is in the file."""

    def negotiate(self, next_deadline: NextDeadline, *, thorough: bool) -> NegotiatedDialect:
        """Choose and return a dialect: that of the last verdict if it passes the first check.

        Otherwise the server is probed or, if not `thorough`, the first dialect to pass its first
        check is taken and not remembered: that of the last negotiation, if the server does not
        refuse it. A `thorough` negotiation also probes where token ids have become known since the
        last verdict. Raises LargeError, or UsageError if the user has to choose a model.
        """
        self._inspect_server(next_deadline)
        prober = self._prober(next_deadline)
        negotiated = self._remembered(prober, thorough=thorough)
        if negotiated is None:
            negotiated = self._probed(prober) if thorough else self._first_working(prober)
        self.negotiated = negotiated
        return negotiated

    def probe(self, next_deadline: NextDeadline) -> Verdict:
        """Probe the server in any case; return and remember the verdict. Raises as `negotiate`."""
        self._inspect_server(next_deadline)
        self.negotiated = self._probed(self._prober(next_deadline))
        assert self.negotiated.verdict is not None
        return self.negotiated.verdict

    def forget(self) -> None:
        """Forget the dialect in use, its verdict, and the vocabulary of the model."""
        if self.negotiated is not None:
            self._former = self.negotiated.dialect
        self.negotiated = None
        self._reader.forget()
        if self._verdicts is not None:
            self._verdicts.forget(self._base_url, self.model.given)

    def compare(self, vocabulary: Vocabulary, next_deadline: NextDeadline) -> VocabularyComparison:
        """Compare a small model's vocabulary with the large model's.

        A result is remembered with the verdict, and checked again, as the server may have another
        model or other tokenizer files now. Call it after `negotiate`. Raises LargeError.
        """
        assert self.negotiated is not None
        verdict = self.negotiated.verdict
        digest = fingerprint(vocabulary)
        remembered = None if verdict is None else verdict.compared(digest)
        if remembered is not None:
            is_same = self._compare_again(vocabulary, next_deadline)
            if is_same is None or is_same is remembered.is_shared:
                return VocabularyComparison(remembered.is_shared, remembered.difference)
        comparison = self._compare(vocabulary, next_deadline)
        shared = comparison.is_same
        if shared is not None and verdict is not None and self._verdicts is not None:
            compared = ComparedVocabulary(digest, shared, comparison.detail)
            verdict = verdict.with_vocabulary(compared)
            self.negotiated = replace(self.negotiated, verdict=verdict)
            self._verdicts.save(verdict, model=self.model.given)
        return comparison

    def _compare_again(self, vocabulary: Vocabulary, next_deadline: NextDeadline) -> bool | None:
        """Return whether all tokens are those of the files, or a sample of them the server's.

        None if neither tells.
        """
        match self.bind(self.tokens, next_deadline):
            case FileTokenSource() as files:
                return compare_entries(vocabulary, files.vocabulary).is_same
            case TokenizeRoutes() as routes:
                with contextlib.suppress(LargeError):
                    return compare_decoded(
                        vocabulary, routes.decode, routes.rendered_ids, sample=True
                    ).is_same
        return None

    def _compare(self, vocabulary: Vocabulary, next_deadline: NextDeadline) -> VocabularyComparison:
        match self.bind(self.tokens, next_deadline):
            case FileTokenSource() as files:
                return compare_entries(vocabulary, files.tokenizer.vocabulary)
            case TokenizeRoutes() as routes:
                return compare_decoded(vocabulary, routes.decode, routes.rendered_ids)
            case _:
                return self._compare_named_tokens(vocabulary, next_deadline)

    def _compare_named_tokens(
        self, vocabulary: Vocabulary, next_deadline: NextDeadline
    ) -> VocabularyComparison:
        """Compare with the pieces in replies; request more tokens if there are few."""
        assert self.negotiated is not None
        prober = self._prober(next_deadline)
        count_before = 0
        for question in probe_questions.MANY_TOKENS:
            pieces = self._reader.pieces_by_id
            # A server that named no new token in the last reply will not do so in the next.
            known = compare_pieces(vocabulary, pieces).is_same is not None
            if known or len(pieces) == count_before:
                break
            count_before = len(pieces)
            prober.learn_tokens(self.negotiated.dialect, question)
        comparison = compare_pieces(vocabulary, self._reader.pieces_by_id)
        if not comparison.is_same:
            return comparison
        dialect = self.negotiated.dialect
        return compare_control_count(vocabulary, lambda text: prober.count_tokens(dialect, text))

    def bind(self, tokens: TokenSource | None, next_deadline: NextDeadline) -> TokenSource | None:
        """Return the token source, with these deadlines for its requests if it sends any."""
        if isinstance(tokens, TokenizeRoutes):
            return tokens.with_post(self._post_within(next_deadline))
        return tokens

    def list_models(self, next_deadline: NextDeadline) -> None:
        """Find the served models. Raises LargeError if the server cannot be reached."""
        self._served = list_served_models(self._transport, next_deadline())
        if self._served:
            self.model = replace(self.model, listed=tuple(model.name for model in self._served))

    def _inspect_server(self, next_deadline: NextDeadline) -> None:
        """Find the served models and a source of token ids."""
        self.list_models(next_deadline)
        name = self.model.known
        tokenizer = None if name is None else self._find_tokenizer(name)
        if tokenizer is None:
            self.tokens = self._find_routes(next_deadline)
        else:
            self.tokens = FileTokenSource(tokenizer)
            self._reader.learn_vocabulary(tokenizer.vocabulary)

    def _find_routes(self, next_deadline: NextDeadline) -> TokenizeRoutes | None:
        """Return the server's tokenise routes; None if it has none."""
        post = self._post_within(next_deadline)
        try:
            return find_tokenize_routes(post, model=self.model.known, former=self.tokens)
        except LargeRefused as exc:
            # Routes that worked before are not gone for good.
            worked = isinstance(self.tokens, TokenizeRoutes)
            if worked or not lacks_root(exc, self.model, self._requester, next_deadline):
                raise
        return None

    def _post_within(self, next_deadline: NextDeadline) -> Post:
        def post(path: str, body: Mapping[str, object]) -> Mapping[str, object]:
            return self._requester.post(path, body, deadline=next_deadline())

        return post

    def _prober(self, next_deadline: NextDeadline) -> Prober:
        return Prober(
            self._requester,
            model=self.model,
            reader=self._reader,
            tokens=self.bind(self.tokens, next_deadline),
            next_deadline=next_deadline,
        )

    def _remembered(self, prober: Prober, *, thorough: bool) -> NegotiatedDialect | None:
        """Return the dialect of the last verdict if it is about this model and still works."""
        if self._verdicts is None:
            return None
        verdict = self._verdicts.load(self._base_url, self.model.given)
        if verdict is None or verdict.model != self.model.known:
            return None
        if thorough and verdict.token_source is None and self.tokens is not None:
            # The probe could not ask for the dialects that need token ids.
            return None
        dialect = get_dialect(verdict.dialect)
        if dialect is None or not prober.passes_first_check(dialect):
            return None
        return NegotiatedDialect(dialect, self._with_context_length(verdict))

    def _with_context_length(self, verdict: Verdict) -> Verdict:
        """Return the verdict with the context that the server lists now; remember a change."""
        model = self._served_model()
        if model is None or model.context_length == verdict.context_length:
            return verdict
        verdict = replace(verdict, context_length=model.context_length)
        assert self._verdicts is not None
        self._verdicts.save(verdict, model=self.model.given)
        return verdict

    def _served_model(self) -> ServedModel | None:
        """Return the entry of the model in the server's list; None if it is not listed."""
        return next((model for model in self._served if model.name == self.model.known), None)

    def _probed(self, prober: Prober) -> NegotiatedDialect:
        try:
            result = prober.find_dialect()
        except NoUsableDialect as exc:
            raise self._model_not_chosen() or exc from exc
        verdict = self._verdict(result)
        self.is_verdict_saved = self._verdicts is not None and self._verdicts.save(
            verdict, model=self.model.given
        )
        return NegotiatedDialect(result.dialect, verdict)

    def _first_working(self, prober: Prober) -> NegotiatedDialect:
        former = self._former
        # Another dialect could give other answers than those before.
        if former is not None and prober.is_kept(former):
            return NegotiatedDialect(former, None)
        if (dialect := prober.find_working_dialect()) is not None:
            return NegotiatedDialect(dialect, None)
        raise self._model_not_chosen() or LargeProtocolError(
            f"{self._base_url} works with none of the known dialects; probe it to see the reasons"
        )

    def _model_not_chosen(self) -> UsageError | None:
        """Return the error for a server with several models if the user chose none, else None."""
        if self.model.given is not None or len(self._served) < 2:
            return None
        names = join_names(self.model.listed)
        return UsageError(
            f"model must be given, because {self._base_url} serves several: {names}",
            parameter="model",
        )

    def _verdict(self, result: ProbeResult) -> Verdict:
        model = self._served_model()
        return Verdict(
            base_url=self._base_url,
            model=self.model.known,
            dialect=result.dialect.name,
            rung=result.dialect.rung,
            checks=result.checks,
            rejected=result.rejected,
            token_source=None if self.tokens is None else self.tokens.name,
            context_length=None if model is None else model.context_length,
            latency_p50_s=percentile(result.latencies_s, 0.5),
            latency_p95_s=percentile(result.latencies_s, 0.95),
            requests=result.requests,
        )
