"""What a chat needs of a session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mlxroute.types import Message, OnFailure, RunStats, Uploads

if TYPE_CHECKING:
    from rich.console import Console

    from mlxroute.conversation import Conversation
    from mlxroute.view import DocumentedStream


class ChatRouting(Protocol):
    """The threshold or budget of a session, which a chat shows and changes."""

    @property
    def threshold(self) -> float:
        """The score above which the large model is asked."""
        ...

    @property
    def unit(self) -> str:
        """The unit of the threshold."""
        ...

    @property
    def budget(self) -> float | None:
        """The largest share of escalated tokens; None with a threshold or without large model."""
        ...

    def set_threshold(self, threshold: float) -> None:
        """Ask above this score from now on."""
        ...

    def set_budget(self, budget: float) -> None:
        """Ask for at most this share of the tokens from now on."""
        ...


class ChatSession(Protocol):
    """The models behind a chat, and the conversation."""

    conversation: Conversation
    mode: str

    @property
    def routing(self) -> ChatRouting: ...

    @property
    def cost(self) -> float | None:
        """The estimated cost of the uploads to servers with known prices; None if there is none."""
        ...

    @property
    def uploads(self) -> Uploads:
        """What was sent since the start; may be read from another thread."""
        ...

    def warnings(self, stats: RunStats) -> list[str]:
        """Return the warnings about an answer that were not returned before."""
        ...

    def answer(self, messages: Sequence[Message], *, on_failure: OnFailure) -> DocumentedStream:
        """Start to answer a conversation; `on_failure` as in `generate`."""
        ...

    def save_conversation(self, path: Path) -> None:
        """Write the conversation to a file. Raises UsageError."""
        ...

    def change_large(self, address: str, model: str | None, err: Console) -> None:
        """Use another large model from the next answer on."""
        ...

    def change_small(self, name: str, err: Console) -> None:
        """Use another small model from the next answer on."""
        ...

    def describe(self) -> str:
        """Return one line about the models."""
        ...
