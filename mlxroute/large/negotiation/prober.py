"""The prober: finds the most exact dialect that a server answers correctly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from mlxroute.errors import LargeProtocolError
from mlxroute.large.completion_request import CompletionRequester
from mlxroute.large.dialects import LADDER, Dialect, FieldedDialect
from mlxroute.large.http.deadline import NextDeadline
from mlxroute.large.negotiation.capability_checks import CapabilityChecker
from mlxroute.large.negotiation.field_negotiator import FieldNegotiator
from mlxroute.large.negotiation.probe_questions import ProbeQuestion
from mlxroute.large.negotiation.rejection import (
    DialectRejected,
    Rejection,
    advise,
    may_be_wrong_dialect,
)
from mlxroute.large.negotiation.served_models import ModelName
from mlxroute.large.negotiation.verdict_file import CapabilityCheck, RejectedDialect
from mlxroute.large.vocabulary.token_reader import TokenReader
from mlxroute.large.vocabulary.token_sources import TokenSource

_T = TypeVar("_T")

# Tokens requested at a time to learn the names of vocabulary pieces.
_TOKENS_TO_NAME: Final = 24


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The dialect that passed all checks, and the rejected ones before it.

    `latencies_s` are those of requests for one token in this dialect, in seconds; `requests` are
    counted over all dialects.
    """

    dialect: Dialect
    checks: tuple[CapabilityCheck, ...]
    rejected: tuple[RejectedDialect, ...]
    latencies_s: tuple[float, ...]
    requests: int


@dataclass(frozen=True, slots=True)
class _Checked(Generic[_T]):
    """A dialect, with the fields that the server takes, and what its checks returned."""

    dialect: Dialect
    checker: CapabilityChecker
    result: _T


class NoUsableDialect(LargeProtocolError):
    """Raised when every dialect is rejected; `rejected` has the reasons, the text advises."""

    def __init__(self, rejections: Sequence[Rejection], model: ModelName) -> None:
        self.rejected = _recorded(rejections)
        super().__init__(advise(rejections, model))


class Prober:
    """Checks the dialects of one server, from the most exact rung down.

    `tokens` gives token ids for prompts, None if there is no source. Methods raise LargeError for
    failures that no dialect caused.
    """

    def __init__(
        self,
        requester: CompletionRequester,
        *,
        model: ModelName,
        reader: TokenReader,
        tokens: TokenSource | None,
        next_deadline: NextDeadline,
    ) -> None:
        self._requester = requester
        self._model = model
        self._reader = reader
        self._tokens = tokens
        self._next_deadline = next_deadline
        self._fields = FieldNegotiator()
        self._requests = 0

    def find_dialect(self) -> ProbeResult:
        """Return the first dialect that passes all checks, from the most exact rung down.

        Raises NoUsableDialect if none does.
        """
        rejections: list[Rejection] = []
        for dialect in LADDER:
            try:
                checked = self._check(dialect, CapabilityChecker.check_all)
            except DialectRejected as exc:
                rejections.append(Rejection(dialect.name, str(exc), exc.kind))
            else:
                return ProbeResult(
                    checked.dialect,
                    checks=checked.result,
                    rejected=_recorded(rejections),
                    latencies_s=tuple(checked.checker.latencies_s),
                    requests=self._requests,
                )
        raise NoUsableDialect(rejections, self._model)

    def find_working_dialect(self) -> Dialect | None:
        """Return the first dialect in which the server continues an unfinished word, or None.

        A dialect that is approximate has to pass all checks: one right answer shows little of it.
        """
        for dialect in LADDER:
            with contextlib.suppress(DialectRejected):
                if dialect.is_approximate:
                    return self._check(dialect, CapabilityChecker.check_all).dialect
                return self._check(dialect, CapabilityChecker.check_mid_word).dialect
        return None

    def passes_first_check(self, dialect: Dialect) -> bool:
        """Return whether the server continues an unfinished word in exactly this dialect."""
        try:
            self._checker(dialect).check_mid_word()
        except DialectRejected:
            return False
        return True

    def is_kept(self, dialect: Dialect) -> bool:
        """Return whether a dialect that worked before passes its first check again.

        Raises LargeError where the server neither answers the check nor refuses its form: what
        failed may pass, and another dialect might give other answers.
        """
        try:
            self._checker(dialect).check_mid_word()
        except DialectRejected as exc:
            if exc.error is not None and not may_be_wrong_dialect(exc.error):
                raise exc.error from None
            return False
        return True

    def _check(self, dialect: Dialect, check: Callable[[CapabilityChecker], _T]) -> _Checked[_T]:
        """Check a dialect with the fields that the server takes. Raises DialectRejected."""
        if isinstance(dialect, FieldedDialect):
            dialect = self._fields.applied_to(dialect)
        while True:
            checker = self._checker(dialect)
            try:
                return _Checked(dialect, checker, check(checker))
            except DialectRejected as exc:
                if not isinstance(dialect, FieldedDialect):
                    raise
                dialect = self._fields.changed_for(dialect, exc)
            finally:
                self._requests += checker.requests

    def learn_tokens(self, dialect: Dialect, question: ProbeQuestion) -> None:
        """Let the reader learn the names of tokens that the server generates."""
        with contextlib.suppress(DialectRejected):
            self._checker(dialect).request_tokens(question, _TOKENS_TO_NAME)

    def count_tokens(self, dialect: Dialect, text: str) -> int | None:
        """Return the tokens of a prompt; None if the server does not count them."""
        with contextlib.suppress(DialectRejected):
            return self._checker(dialect).count_tokens(text)
        return None

    def _checker(self, dialect: Dialect) -> CapabilityChecker:
        return CapabilityChecker(
            self._requester,
            dialect,
            model=self._model,
            reader=self._reader,
            tokens=self._tokens,
            next_deadline=self._next_deadline,
        )


def _recorded(rejections: Sequence[Rejection]) -> tuple[RejectedDialect, ...]:
    """Return the rejections as a verdict has them, without their kinds."""
    return tuple(RejectedDialect(item.dialect, item.reason) for item in rejections)
