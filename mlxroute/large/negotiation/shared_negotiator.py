"""One negotiator for several calls at once: each waits for the others, within its deadline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from mlxroute.errors import LargeError, LargeProtocolError, LargeRefused, UsageError
from mlxroute.large.http.deadline import Deadline, NextDeadline
from mlxroute.large.negotiation.negotiator import NegotiatedDialect, Negotiator
from mlxroute.large.negotiation.served_models import ModelName
from mlxroute.large.negotiation.verdict_file import Verdict
from mlxroute.large.negotiation.vocabulary_pairing import VocabularyPairing, pair_vocabulary
from mlxroute.large.prompt import Prompt
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.types import LargeContext, Vocabulary


class SharedNegotiator:
    """A negotiator and the vocabulary pairing in use, behind a lock. Safe for several threads.

    The lock is held for all requests that a negotiation, a comparison of vocabularies or a prompt
    takes, tokenise routes included.
    """

    def __init__(self, negotiator: Negotiator, reader: TokenReader, *, base_url: str) -> None:
        self._negotiator = negotiator
        self._reader = reader
        self._base_url = base_url
        self._lock = threading.Lock()
        self.pairing: VocabularyPairing | None = None

    @property
    def model(self) -> ModelName:
        """The name of the model, as far as it is known."""
        return self._negotiator.model

    @property
    def negotiated(self) -> NegotiatedDialect | None:
        """The dialect in use, None before the first negotiation."""
        return self._negotiator.negotiated

    def negotiate(self, next_deadline: NextDeadline, *, thorough: bool) -> NegotiatedDialect:
        """As `Negotiator.negotiate`."""
        with self._lock:
            return self._negotiator.negotiate(next_deadline, thorough=thorough)

    def probe(self, next_deadline: NextDeadline) -> Verdict:
        """As `Negotiator.probe`."""
        with self._lock:
            return self._negotiator.probe(next_deadline)

    def pair(self, vocabulary: Vocabulary, next_deadline: NextDeadline) -> VocabularyPairing:
        """Return the pairing for a vocabulary, after a thorough negotiation if there was none.

        Raises LargeError, or UsageError if the user has to choose a model.
        """
        with self._lock:
            self._negotiator.negotiate(next_deadline, thorough=True)
            return self._pair(vocabulary, next_deadline)

    def pair_within(self, deadline: Deadline, vocabulary: Vocabulary) -> VocabularyPairing:
        """Return the pairing for a vocabulary, by this deadline and with few requests.

        Raises LargeError.
        """
        with self._lock_within(deadline):
            try:
                self._negotiator.negotiate(lambda: deadline, thorough=False)
            except UsageError as exc:
                raise LargeRefused(str(exc), parameter=exc.parameter) from exc
            return self._pair(vocabulary, lambda: deadline)

    def build_prompt(
        self, context: LargeContext, pairing: VocabularyPairing, deadline: Deadline
    ) -> Prompt:
        """Return the prompt for a position, by this deadline.

        Raises LargeError, also for a prompt that the server is known to have no room for.
        """
        with self._lock_within(deadline):
            tokens = self._negotiator.bind(pairing.builder.tokens, lambda: deadline)
            try:
                prompt = replace(pairing.builder, tokens=tokens).build(context)
            except LargeRefused as exc:
                self._negotiator.record_failure(exc, pairing.negotiated)
                raise
        _check_context_length(prompt, pairing.negotiated.verdict)
        return prompt

    def record_success(self) -> None:
        """As `Negotiator.record_success`."""
        self._negotiator.record_success()

    def record_failure(self, error: LargeError, negotiated: NegotiatedDialect) -> None:
        """As `Negotiator.record_failure`."""
        with self._lock:
            self._negotiator.record_failure(error, negotiated)

    def _pair(self, vocabulary: Vocabulary, next_deadline: NextDeadline) -> VocabularyPairing:
        pairing = self.pairing
        if (
            pairing is None
            or pairing.vocabulary is not vocabulary
            or pairing.negotiated is not self._negotiator.negotiated
        ):
            pairing = pair_vocabulary(vocabulary, self._negotiator, self._reader, next_deadline)
            self.pairing = pairing
        return pairing

    @contextmanager
    def _lock_within(self, deadline: Deadline) -> Iterator[None]:
        if not self._lock.acquire(timeout=deadline.left_s()):
            raise deadline.error(self._base_url)
        try:
            yield
        finally:
            self._lock.release()


def _check_context_length(prompt: Prompt, verdict: Verdict | None) -> None:
    """Refuse, without a request, a prompt of token ids that fills the server's context."""
    limit = None if verdict is None else verdict.context_length
    if limit is not None and len(prompt.ids) >= limit:
        raise LargeProtocolError(
            f"the prompt has reached the large model's context of {limit:,} tokens;"
            " start a new conversation"
        )
