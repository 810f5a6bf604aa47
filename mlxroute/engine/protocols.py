"""What the engine needs of its collaborators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from mlxroute.types import (
    BranchCost,
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
    """The on-device model, as the engine uses it."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def context_length(self) -> int: ...

    def render(self, messages: Sequence[Message]) -> str: ...

    def encode_prompt(self, text: str) -> list[int]: ...

    def prefill(
        self, prompt_ids: Sequence[int], *, sampling: Sampling, progress: Progress
    ) -> tuple[Signals, int]: ...

    def extend(self, token_ids: Sequence[int]) -> Signals: ...

    def can_rollback(self, count: int) -> bool:
        """Whether `count` tokens that are fed next could be taken back."""
        ...

    def rollback(self, count: int) -> None: ...

    @property
    def max_rows(self) -> int:
        """How many rows `branch` may have now; 1 when there can be none beside the first."""
        ...

    def measure_branch_cost(self, token_id: int, *, rows: int) -> BranchCost:
        """What a step of `rows` rows costs and how it rounds, `token_id` being the next token."""
        ...

    def branch(self, parents: Sequence[int], token_ids: Sequence[int]) -> list[Signals]:
        """Feed one token a row, row i continuing row `parents[i]`; signals round differently."""
        ...

    def select(self, row: int) -> None:
        """Go on with one row alone."""
        ...


class PendingCallProtocol(Protocol):
    """A call to the large model under way, or over."""

    @property
    def ready(self) -> bool:
        """Whether it has an answer or has failed; at its deadline it has, at the latest."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing more comes of it."""
        ...

    def result(self) -> tuple[LargeToken, ...]:
        """What a ready flight brought: the token asked for, maybe some of those after it.

        There may be more of these each time, until it is over. Raises LargeError and nothing else.
        """
        ...

    def cancel(self) -> None:
        """Drop the call and whatever comes of it; returns at once."""
        ...


class LargeProtocol(Protocol):
    """The remote model, used by one thread.

    `uploads` are totals since it was made, and may be read from another thread.
    """

    @property
    def uploads(self) -> Uploads: ...

    @property
    def max_in_flight(self) -> int:
        """How many calls may be under way at once; it can change with what is found out."""
        ...

    def begin(
        self, context: LargeContext, *, deadline_s: float, prefetch: int
    ) -> PendingCallProtocol:
        """Ask for the token after `context` and, if that costs no call, for `prefetch` more."""
        ...

    def wait(self, ready: Callable[[], bool], *, timeout_s: float) -> None:
        """Return when `ready()`, which changes only as a flight does, or when the time is up."""
        ...


class NamedLargeProtocol(LargeProtocol, Protocol):
    """A large model whose name is known."""

    @property
    def model_name(self) -> str: ...


class RouterState(Protocol):
    """What a router decides from scores, as far as it has come: a value."""

    @property
    def threshold(self) -> float:
        """The score that the next position has to exceed."""
        ...

    @property
    def seen(self) -> int:
        """How many positions there were."""
        ...

    def decide(self, score: float) -> tuple[Judgement, Self]:
        """What is to be done at the next position if this is its score, and the pace behind it."""
        ...

    def is_near(self, score: float, band: float) -> bool:
        """Whether a score that differs by `band` could be judged, or leave the pace, otherwise."""
        ...


class RouterProtocol(Protocol):
    """Scores positions. `pace` is that behind the last committed one, of whichever answer."""

    @property
    def pace(self) -> RouterState: ...

    @pace.setter
    def pace(self, pace: Any) -> None: ...

    @property
    def gain(self) -> float:
        """By how much the score moves at most where logprobs, entropy and head move by 1."""
        ...

    def score(self, signals: Signals, number: int) -> float:
        """The score of the position with this number; higher means escalate."""
        ...
