"""The rejection of a dialect: what it shows about the server, and the advice that follows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from mlxroute.errors import (
    LargeError,
    LargeNotContinued,
    LargeProtocolError,
    LargeRefused,
    LargeUnreadable,
    LargeUnsendable,
)
from mlxroute.large.completion_request import CompletionRequester, TokensNotReplayed
from mlxroute.large.http.deadline import NextDeadline
from mlxroute.large.negotiation.served_models import ModelName

# Statuses of a request whose form the server does not know.
_WRONG_FORM_STATUSES: Final = {400, 404, 405, 415, 422}
# Errors that show nothing about the dialect.
_NOT_THE_DIALECT: Final = (LargeUnreadable, TokensNotReplayed, LargeUnsendable, LargeNotContinued)
_NOT_FOUND: Final = 404
_NO_PATH: Final = "/mlxroute-asks-for-no-route"


class RejectionKind(Enum):
    """What the rejection of a dialect shows about the server."""

    NO_ROUTE = auto()
    """The request was answered with status 404: no such route, or no such model."""
    NO_TOKENIZER = auto()
    """The dialect needs token ids, and nothing here gives them."""
    NOT_CONTINUED = auto()
    """An unfinished word was not continued."""
    NOT_BY_EXAMPLE = auto()
    """Too few partial answers were continued correctly after worked examples."""
    NO_LOGPROBS = auto()
    """The replies have no usable logprobs, or the server refuses to give any."""
    THINKS = auto()
    """A token costs too many generated ones, because the model thinks first."""
    OTHER = auto()


class DialectRejected(Exception):
    """Raised when the server fails a check of a dialect; the text is the reason.

    Args:
        reason: Why, in one line.
        kind: What that shows about the server. Default: what `error` shows.
        error: The error of the request that failed; None (default) if the reply was read and is
            wrong.
    """

    def __init__(
        self, reason: str, *, kind: RejectionKind | None = None, error: LargeError | None = None
    ) -> None:
        super().__init__(reason)
        self.kind = _kind_of(error) if kind is None else kind
        self.error = error


@dataclass(frozen=True, slots=True)
class Rejection:
    """The name of a dialect that the server failed, and why."""

    dialect: str
    reason: str
    kind: RejectionKind


def may_be_wrong_dialect(error: LargeError) -> bool:
    """Return whether the dialect of a request may have caused its failure."""
    if isinstance(error, LargeRefused):
        # Any dialect gets a 400 for a prompt that is too long.
        return error.status in _WRONG_FORM_STATUSES and not error.is_too_long
    return isinstance(error, LargeProtocolError) and not isinstance(error, _NOT_THE_DIALECT)


def lacks_root(
    error: LargeRefused,
    model: ModelName,
    requester: CompletionRequester,
    next_deadline: NextDeadline,
) -> bool:
    """Return whether the refusal of a route at the root shows that only the API is served.

    A proxy may have no server for other paths. It then gives the same status for one that no server
    has, while a busy server knows that there is none.
    """
    if not (model.listed and error.may_lack_route):
        return False
    try:
        requester.post(_NO_PATH, {}, deadline=next_deadline())
    except LargeRefused as exc:
        return exc.status == error.status
    except LargeError:
        pass
    return False


def advise(rejections: Sequence[Rejection], model: ModelName) -> str:
    """Return advice for a server that failed every dialect, asked for this model."""
    kinds = [rejection.kind for rejection in rejections]
    last = rejections[-1]
    if set(kinds) <= {RejectionKind.NO_ROUTE, RejectionKind.NO_TOKENIZER}:
        return _advise_not_found([rejection.reason for rejection in rejections], model)
    if RejectionKind.THINKS in kinds:
        reason = rejections[kinds.index(RejectionKind.THINKS)].reason
        return f"{reason}; choose a model that does not think"
    if last.kind is RejectionKind.NOT_BY_EXAMPLE:
        return (
            "the server only chats, and its model does not continue a partial answer even after"
            f" worked examples: {last.reason}; use a stronger model, or a server with"
            " /v1/completions (vLLM, llama-server, mlx_lm.server)"
        )
    if RejectionKind.NOT_CONTINUED in kinds:
        return (
            "the server starts a new answer instead of continuing one (or its model cannot finish a"
            " word); use a server with /v1/completions (vLLM, llama-server, mlx_lm.server)"
        )
    if RejectionKind.NO_LOGPROBS in kinds:
        return (
            "the server gives no logprobs on any route that continues a text; enable them, or use a"
            " server with /v1/completions (vLLM, llama-server, mlx_lm.server)"
        )
    return f"this server works with none of the known dialects ({last.reason})"


def _advise_not_found(reasons: Sequence[str], model: ModelName) -> str:
    """Return advice where every route answered 404: no model of this name, or no such route."""
    for reason in reasons:
        # The words after "answered 404: ".
        _, _, words = reason.partition(":")
        if model.given and re.search(rf"(?<![\w.-]){re.escape(model.given)}(?![\w-])", words):
            return f"the server {reason}"
    if model.listed:
        return f"the server lists models, but no known route completes text ({reasons[-1]})"
    return "nothing at this address completes text; does it end in the API's path, as in /v1?"


def _kind_of(error: LargeError | None) -> RejectionKind:
    if isinstance(error, LargeRefused) and error.status == _NOT_FOUND:
        return RejectionKind.NO_ROUTE
    # The server's words, or the name of a field of its reply.
    if "logprobs" in str(error or ""):
        return RejectionKind.NO_LOGPROBS
    return RejectionKind.OTHER
