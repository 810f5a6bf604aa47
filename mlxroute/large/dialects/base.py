"""What the dialects have in common: how a prompt is given, and what a family of servers does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion

ANSWER_AT_ONCE: Final = {"chat_template_kwargs": {"enable_thinking": False}}
"""For templates that would begin with a thought; others ignore it, as the small model's do."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The bounds of one request; `model` is None where the server is not to be told one.

    `streamed` asks for the reply token by token, of dialects that are `Streaming`.
    """

    max_tokens: int
    top_logprobs: int
    model: str | None
    streamed: bool = False


class Dialect(Protocol):
    """How one family of servers is asked for greedy tokens and understood.

    `request` names only keys that the family knows: strict servers refuse any other.
    """

    @property
    def name(self) -> str:
        """What users see; one of a kind."""
        ...

    @property
    def rung(self) -> int:
        """1 ids in and out, 2 text in and ids or bytes out, 3 continued chat turn, 4 text only."""
        ...

    @property
    def form(self) -> PromptForm: ...

    @property
    def path(self) -> str:
        """The route below the base address, or from the server's root with `at_root`."""
        ...

    @property
    def at_root(self) -> bool: ...

    @property
    def names_model(self) -> bool:
        """Whether the server is told which model, also when it serves just one."""
        ...

    @property
    def crashes_on_cached_prompts(self) -> bool:
        """Whether a prompt equal to a finished request's prompt and answer stops the server."""
        ...

    def request(self, prompt: Prompt, ask: RequestOptions) -> dict[str, object]:
        """The JSON body that asks for the next greedy tokens after `prompt`."""
        ...

    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Understand the reply to `prompt`. Raises LargeProtocolError when it cannot be trusted."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A dialect whose streamed replies carry the same of every token as others do."""

    def join_events(self, events: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """The reply that these events are the beginning of, or the whole.

        Raises LargeProtocolError.
        """
        ...
