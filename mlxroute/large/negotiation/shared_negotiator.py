"""The negotiated dialect, shared by several calls, and forgotten when it keeps failing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from mlxroute.errors import LargeError, LargeRefused, LargeUnsendable, UsageError
from mlxroute.large.dialects import Dialect
from mlxroute.large.dialects.tokenize_routes import TokenizeRoutes
from mlxroute.large.http.deadline import Deadline, NextDeadline
from mlxroute.large.negotiation.negotiator import NegotiatedDialect, Negotiator
from mlxroute.large.negotiation.rejection import may_be_wrong_dialect
from mlxroute.large.negotiation.served_models import ModelName
from mlxroute.large.negotiation.verdict_file import Verdict
from mlxroute.large.negotiation.vocabulary_pairing import VocabularyPairing, pair_vocabulary
from mlxroute.large.prompt import Prompt
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.tokenizers.control_tokens import ControlTokens, control_tokens
from mlxroute.types import LargeContext, Vocabulary

# Failures in a row after which the dialect is negotiated again.
_MAX_FAILURES: Final = 2
# Longer than any use of the lock but a negotiation.
_FAILURE_LOCK_S: Final = 0.1


class SharedNegotiator:
    """A negotiator and the vocabulary pairing in use, behind a lock. Safe for several threads.

    The lock is held during all requests of a negotiation, of a comparison of vocabularies and of
    building a prompt. Methods with one deadline wait for it until then at most.
    """

    def __init__(self, negotiator: Negotiator, reader: TokenReader, *, base_url: str) -> None:
        self._negotiator = negotiator
        self._reader = reader
        self._base_url = base_url
        self._lock = threading.Lock()
        self._failures = 0
        self.pairing: VocabularyPairing | None = None

    @property
    def model(self) -> ModelName:
        """The name of the model, as far as it is known."""
        return self._negotiator.model

    @property
    def negotiated(self) -> NegotiatedDialect | None:
        """The dialect in use, None before the first negotiation."""
        return self._negotiator.negotiated

    @property
    def control_tokens(self) -> ControlTokens:
        """The control tokens of the server, and everything in their form."""
        pairing = self.pairing
        is_shared = pairing is not None and pairing.builder.same_vocabulary
        vocabulary = pairing.vocabulary if pairing and is_shared else self._reader.vocabulary
        names = frozenset[str]() if vocabulary is None else vocabulary.control_names
        return control_tokens(names, any_form=True)

    @property
    def dialect(self) -> Dialect | None:
        """The dialect itself, None before the first negotiation."""
        return None if self.negotiated is None else self.negotiated.dialect

    @property
    def sent_model(self) -> str | None:
        """The name of the model as requests have it, None to leave it out."""
        dialect = self.dialect
        return self.model.known if dialect is None else self.model.for_requests(dialect)

    @property
    def is_verdict_saved(self) -> bool:
        """Whether the verdict of the last probe is in the file."""
        return self._negotiator.is_verdict_saved

    def negotiate(self, next_deadline: NextDeadline, *, thorough: bool) -> NegotiatedDialect:
        """Return the dialect in use; negotiate if there is none. Raises as `Negotiator`."""
        with self._lock:
            return self._negotiated(next_deadline, thorough=thorough)

    def probe(self, next_deadline: NextDeadline) -> Verdict:
        """Probe the server, as `Negotiator.probe`."""
        with self._lock:
            return self._negotiator.probe(next_deadline)

    def pair(self, vocabulary: Vocabulary, next_deadline: NextDeadline) -> VocabularyPairing:
        """Return the pairing for a vocabulary, after a thorough negotiation if there was none.

        Raises LargeError, or UsageError if the user has to choose a model.
        """
        with self._lock:
            pairing = self._current_pairing(vocabulary)
            return pairing or self._pair(vocabulary, next_deadline, thorough=True)

    def find_model(self, deadline: Deadline) -> str | None:
        """Return `sent_model`; ask the server for it, by this deadline, if nothing is known of it.

        Raises LargeError.
        """
        if self._knows_model():
            return self.sent_model
        with self._lock_within(deadline):
            # Another thread may have asked meanwhile.
            if not self._knows_model():
                self._negotiator.list_models(lambda: deadline)
        return self.sent_model

    def pair_within(self, deadline: Deadline, vocabulary: Vocabulary) -> VocabularyPairing:
        """Return the pairing for a vocabulary, by this deadline and with few requests.

        Raises LargeError.
        """
        with self._lock_within(deadline):
            if (pairing := self._current_pairing(vocabulary)) is not None:
                return pairing
            try:
                return self._pair(vocabulary, lambda: deadline, thorough=False)
            except UsageError as exc:
                raise LargeRefused(str(exc), parameter=exc.parameter) from exc

    def build_prompt(
        self, context: LargeContext, pairing: VocabularyPairing, deadline: Deadline
    ) -> Prompt:
        """Return the prompt for a position, by this deadline.

        Raises LargeError, also for a prompt that does not fit in the server's known context.
        """
        builder = pairing.builder
        with self._lock_within(deadline):
            if isinstance(builder.tokens, TokenizeRoutes):
                tokens = self._negotiator.bind(builder.tokens, lambda: deadline)
                builder = replace(builder, tokens=tokens)
            try:
                prompt = builder.build(context)
            except LargeRefused as exc:
                self._count_failure(exc, pairing.negotiated)
                raise
        _check_context_length(prompt, pairing.negotiated.verdict)
        return prompt

    def record_success(self) -> None:
        """Record that a request was answered in the dialect in use."""
        self._failures = 0

    def record_failure(self, error: LargeError, negotiated: NegotiatedDialect) -> None:
        """Record a failed request; forget the dialect after two that it may have caused.

        `negotiated` is the dialect of the request. If it is no longer in use, or is negotiated anew
        at this moment, nothing is counted.
        """
        # Waiting out a negotiation could keep a failed call beyond its deadline.
        if not self._lock.acquire(timeout=_FAILURE_LOCK_S):
            return
        try:
            self._count_failure(error, negotiated)
        finally:
            self._lock.release()

    def _count_failure(self, error: LargeError, negotiated: NegotiatedDialect) -> None:
        if negotiated is not self.negotiated or not may_be_wrong_dialect(error):
            return
        self._failures += 1
        if self._failures >= _MAX_FAILURES:
            self._failures = 0
            self._negotiator.forget()

    def _knows_model(self) -> bool:
        """Return whether the model has a name, or the server was asked for it."""
        model = self.model
        return bool(model.known or model.listed) or self.negotiated is not None

    def _negotiated(self, next_deadline: NextDeadline, *, thorough: bool) -> NegotiatedDialect:
        return self.negotiated or self._negotiator.negotiate(next_deadline, thorough=thorough)

    def _current_pairing(self, vocabulary: Vocabulary) -> VocabularyPairing | None:
        """Return the pairing in use if it is for this vocabulary and the dialect in use."""
        pairing = self.pairing
        if pairing is None or pairing.negotiated is not self._negotiator.negotiated:
            return None
        return pairing if pairing.vocabulary is vocabulary else None

    def _pair(
        self, vocabulary: Vocabulary, next_deadline: NextDeadline, *, thorough: bool
    ) -> VocabularyPairing:
        self._negotiated(next_deadline, thorough=thorough)
        self.pairing = pair_vocabulary(vocabulary, self._negotiator, self._reader, next_deadline)
        return self.pairing

    @contextmanager
    def _lock_within(self, deadline: Deadline) -> Iterator[None]:
        if not self._lock.acquire(timeout=deadline.left_s()):
            raise deadline.error(self._base_url)
        try:
            yield
        finally:
            self._lock.release()


def _check_context_length(prompt: Prompt, verdict: Verdict | None) -> None:
    """Raise LargeUnsendable for a prompt of token ids that fills the server's context."""
    limit = None if verdict is None else verdict.context_length
    if limit is not None and len(prompt.ids) >= limit:
        raise LargeUnsendable(
            f"the prompt has reached the large model's context of {limit:,} tokens;"
            " start a new conversation"
        )
