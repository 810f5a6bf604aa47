"""What is asked of the scheduler, and what it reports besides the engine's events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from mlxroute.engine.options import Options
from mlxroute.engine.protocols import LargeProtocol, RouterProtocol
from mlxroute.errors import MlxRouteError
from mlxroute.types import Event, Message, Signals

DEFAULT_CACHE_BYTES: Final = 1 << 30
"""Maximum memory of KV caches that are kept for later prompts, where nothing else is said."""


class QueueFull(MlxRouteError):
    """Raised when no more answers can wait for their turn."""


class SchedulerClosed(MlxRouteError):
    """Raised for an answer that is asked for, or not complete, when the scheduler is closed."""

    def __init__(self) -> None:
        super().__init__("the endpoint is closing")


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """The small model has read `done` of the `total` tokens of the prompt."""

    done: int
    total: int


ServedEvent = Event | PromptProgress
"""What `RunningAnswer.events` yields."""


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """A prompt as the small model finds it.

    Args:
        text: Its text.
        ids: Its token ids.
        signals: The small model's signals at each position but the first.
        logprobs: The logprobs of the prompt's own tokens there, in nats.
    """

    text: str
    ids: tuple[int, ...]
    signals: tuple[Signals, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """One answer to write.

    Args:
        prompt: A conversation; or a text or token ids, which are continued as they are.
        router: Decides which positions are escalated; its state goes on where a caller uses one for
            several answers, which must not run at the same time.
        options: Limits, sampling and mode.
        local_only: Make no call to the large model, and escalate nothing; `router` is not used, nor
            is it without a large model. False by default.
        exact: Write the text that the answer has alone in a new process: no KV cache of an earlier
            answer is used, and decisions that the rounding of a batch could change are made again
            with one row. False by default.
        large: What is asked in place of the scheduler's large model, such as a record of its
            replies. None by default.
        answer_start: Text of the assistant's turn that the answer continues, after a conversation.
            Empty by default.
        owner: Only answers of the same owner share KV caches of their prompts. Empty by default.
        completes_reply: Queue it even where the queue is full: its reply has answers already. False
            by default.
    """

    prompt: Sequence[Message] | str | Sequence[int]
    router: RouterProtocol
    options: Options = field(default_factory=Options)
    local_only: bool = False
    exact: bool = False
    large: LargeProtocol | None = None
    answer_start: str = ""
    owner: str = ""
    completes_reply: bool = False
