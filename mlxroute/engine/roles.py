"""What the engine needs of its collaborators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlxroute.types import (
    LargeContext,
    LargeToken,
    Message,
    Progress,
    Sampling,
    Signals,
    Uploads,
    Vocabulary,
)


class Small(Protocol):
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


class Large(Protocol):
    """The remote model; `next_token` raises LargeError and nothing else.

    `uploads` are totals since it was made, and may be read from another thread.
    """

    @property
    def uploads(self) -> Uploads: ...

    def next_token(self, context: LargeContext, *, deadline_s: float) -> LargeToken: ...


class Router(Protocol):
    """Decides from a position's signals whether the large model is asked."""

    def score(self, signals: Signals) -> float: ...

    def escalates(self, score: float) -> bool: ...
