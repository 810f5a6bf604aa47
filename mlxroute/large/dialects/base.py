"""The base class of all dialects, and the options of a request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.errors import LargeNotContinued
from mlxroute.large.prompt import Prompt, PromptForm
from mlxroute.large.reply import Completion

NO_THINKING: Final = {"chat_template_kwargs": {"enable_thinking": False}}
"""Turns off reasoning in chat templates that have the switch; other templates ignore it."""


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """How many tokens and alternatives a request asks for.

    `top_logprobs` is the number of alternatives for each position. `model` is None where the
    request names no model. `streamed` asks a `StreamingDialect` for server-sent events.
    """

    max_tokens: int
    top_logprobs: int
    model: str | None
    streamed: bool = False


class Dialect(ABC):
    """The JSON of one family of servers: requests for greedy tokens, and their replies.

    A subclass sets `name`, `rung`, `form` and `path`, and those of the other attributes whose
    default does not fit. Requests contain only keys that the family knows, because strict servers
    refuse unknown ones.
    """

    name: str
    """Unique name, shown to users."""

    rung: int
    """1: ids in and out. 2: text in, ids or bytes out. 3: continued chat turn. 4: text only.
    5: a new chat turn that begins with the end of the answer so far."""

    form: PromptForm

    path: str
    """The route, below the base address or, with `at_root`, below the server's root."""

    at_root: bool = False

    names_model: bool = True
    """Whether requests name the model even if the server has only one."""

    names_tokens: bool = True
    """Whether replies can be divided into tokens; False where they are text alone."""

    is_approximate: bool = False
    """Whether the tokens may differ from those that the model itself would write."""

    crashes_on_cached_prompts: bool = False
    """Whether a prompt that equals a finished request's prompt and answer crashes the server."""

    @abstractmethod
    def request(self, prompt: Prompt, options: RequestOptions) -> dict[str, object]:
        """Return the JSON body that asks for the greedy tokens after `prompt`."""

    @abstractmethod
    def completion(self, reply: Mapping[str, object], prompt: Prompt) -> Completion:
        """Read the reply to `prompt`. Raises LargeProtocolError for a reply it cannot trust."""

    def fallback(self, prompt: Prompt, failure: LargeNotContinued) -> Dialect | None:
        """Return the dialect to ask again in after a reply to `prompt` that did not go on; or None.

        `failure` is what `completion` raised for that reply.
        """
        return None


class StreamingDialect(Dialect):
    """A dialect whose streamed replies describe tokens as fully as whole replies."""

    @abstractmethod
    def join_events(self, events: Sequence[Mapping[str, object]]) -> dict[str, object]:
        """Merge the events received so far into one reply. Raises LargeProtocolError."""


def add_model(body: dict[str, object], options: RequestOptions) -> dict[str, object]:
    """Return the body with the model's name, if `options` has one."""
    return body if options.model is None else body | {"model": options.model}
