"""What the engine requires of its collaborators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from mlxroute.types import (
    BranchCost,
    EncodedPrompt,
    Judgement,
    LargeContext,
    LargeToken,
    Message,
    Progress,
    Sampling,
    Signals,
    Uploads,
    Vocabulary,
)


class SmallProtocol(Protocol):
    """The on-device model with its KV cache."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def context_length(self) -> int:
        """Maximum total number of tokens of prompt and answer."""
        ...

    def encode_conversation(self, messages: Sequence[Message]) -> EncodedPrompt:
        """Return the prompt of a conversation, its message contents as plain text."""
        ...

    @property
    def cached_ids(self) -> Sequence[int]:
        """The ids in the KV cache, prompt included; without the rows of a batch."""
        ...

    @property
    def batch_tails(self) -> Sequence[Sequence[int]]:
        """For each row of a batch, the ids it holds beyond `cached_ids`; empty without a batch."""
        ...

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]:
        """Run a prompt; return the first position's signals and the number of ids reused."""
        ...

    def extend(self, token_ids: Sequence[int]) -> Signals:
        """Feed tokens in one pass; return the signals of the position after the last."""
        ...

    def can_rollback(self, count: int) -> bool:
        """Return whether the next `count` tokens could be rolled back after they are fed."""
        ...

    def rollback(self, count: int) -> None:
        """Remove the last `count` tokens from the KV cache. Raises RollbackError."""
        ...

    @property
    def max_rows(self) -> int:
        """Maximum number of rows of a batch now; 1 where the KV cache cannot be branched."""
        ...

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        """Measure a decode step of one row and of `rows` rows, with `token_id` as the next token.

        The KV cache is left as it was.
        """
        ...

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Feed one token to each row of a batch, row i continuing row `parents[i]`.

        Returns the signals after each row, which are rounded differently from those of one row.
        """
        ...

    def select(self, row: int) -> None:
        """End the batch and go on with one of its rows."""
        ...


class BatchingProtocol(Protocol):
    """What tells signals of a batch with other answers from those of one row."""

    @property
    def was_batched(self) -> bool:
        """Whether a batch fed some of the latest tokens, so that their rounding may differ."""
        ...

    @property
    def rounding_nats(self) -> float:
        """Bound of the differences between a batch and a single row.

        It holds for logprobs, entropies and head scores.
        """
        ...

    def extend_unbatched(self, token_ids: Sequence[int]) -> Signals:
        """Feed tokens in one pass, as one row; return the signals of the position after them."""
        ...


class PendingCallProtocol(Protocol):
    """A call to the large model, in flight or finished."""

    @property
    def ready(self) -> bool:
        """Whether the call has returned a token or failed; true at its deadline at the latest."""
        ...

    @property
    def finished(self) -> bool:
        """Whether no more tokens can arrive."""
        ...

    def result(self) -> tuple[LargeToken, ...]:
        """Return the token of a ready call, followed by the prefetched tokens so far.

        Raises LargeError and nothing else.
        """
        ...

    def cancel(self) -> None:
        """Abort the call and drop any later reply; return at once."""
        ...


class LargeProtocol(Protocol):
    """The remote model; several answers may use it, each in a thread of its own."""

    @property
    def uploads(self) -> Uploads:
        """Totals since the object was made; may be read from another thread."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, so that both models share its cores."""
        ...

    @property
    def max_in_flight(self) -> int:
        """Maximum number of calls in flight; may change once the server is negotiated."""
        ...

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        """Start a call for the token after `context`.

        The call also asks for up to `prefetch` later tokens. It is ready after `deadline_s` seconds
        at the latest.
        """
        ...

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Block until `ready()` is true, for `timeout_s` at most.

        `ready` is checked whenever a call changes.
        """
        ...


class NamedLargeProtocol(LargeProtocol, Protocol):
    """A large model whose name is known."""

    @property
    def model_name(self) -> str: ...


class RouterState(Protocol):
    """Immutable router state after the last position."""

    @property
    def threshold(self) -> float:
        """The score that the next position has to exceed to be escalated."""
        ...

    @property
    def positions(self) -> int:
        """The number of positions so far."""
        ...

    def decide(self, score: float) -> tuple[Judgement, Self]:
        """Judge the next position by its score; return the judgement and the state after it."""
        ...

    @property
    def max_band(self) -> float:
        """The band from which on every score is borderline; inf if there is none."""
        ...

    def is_borderline(self, score: float, band: float) -> bool:
        """Return whether a score that differs by `band` could be judged or counted differently."""
        ...


class RouterProtocol(Protocol):
    """A score of positions, and the router state after the last committed position."""

    @property
    def state(self) -> RouterState: ...

    @state.setter
    def state(self, state: Any) -> None: ...

    @property
    def gain(self) -> float:
        """Maximum change of the score if logprobs, entropy and head score change by at most 1."""
        ...

    def score(self, signals: Signals, position: int) -> float:
        """Return the score of a position, given its signals and its number; higher escalates."""
        ...
