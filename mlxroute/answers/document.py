"""The answer document: an answer, where each of its tokens comes from, and how to replay it.

The fields of these classes are the keys of the format, which docs/answers.md describes. A change
that a reader of version 1 would misread needs a new version.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING

from mlxroute.types import CallFailure, Judgement, Message, Mode, RunStats, Source, StopReason

if TYPE_CHECKING:
    from mlxroute.engine import Options

Bytes = bytes
"""Alias of bytes, for the class with a field named bytes."""

FORMAT = "mlxroute answer"
VERSION = 1


class TokenDecision(StrEnum):
    """How the token of a position was decided."""

    KEPT = "kept"
    """The router kept the small model's token."""
    OVER_BUDGET = "over budget"
    """The router would have escalated it, but the budget was used up."""
    AGREED = "agreed"
    """The large model chose the small model's token."""
    REPLACED = "replaced"
    """The large model's token replaced the small model's."""
    ACCEPTED = "accepted"
    """The large model found the small model's token nearly as likely as its own."""
    UNCHECKED = "unchecked"
    """The router escalated it and the large model gave no token, so the small model's stayed."""
    CONTINUED = "continued"
    """A further part of the large model's token before it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that a model considered.

    `id` is its id in the small model's vocabulary; None if it has none or it is unknown. `bytes`
    are what it adds to the text, None where they are those of `text`: a special token, which adds
    nothing, is shown by its name, and a part of a character as `\\xba`.
    """

    text: str
    logprob: float | None
    id: int | None = None
    bytes: Bytes | None = None


@dataclass(frozen=True, slots=True)
class SmallChoice:
    """What the small model wanted at a position, with its likeliest tokens, at most 5."""

    id: int
    text: str
    logprob: float
    entropy_nats: float
    margin: float
    top: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class LargeChoice:
    """What the large model wanted at a position, with its likeliest tokens, at most 5.

    `ids` spell it in the small model's vocabulary; `ends` says that it ends the answer.
    """

    ids: tuple[int, ...]
    text: str
    ends: bool
    logprob: float | None
    top: tuple[Choice, ...]
    latency_s: float


@dataclass(frozen=True, slots=True)
class DocumentToken:
    """A committed token. `small` is None for a further part of a large token."""

    index: int
    id: int
    text: str
    source: Source
    score: float
    threshold: float
    judgement: Judgement
    decision: TokenDecision
    checked: bool
    unchecked_reason: str | None
    prefetched: bool
    small: SmallChoice | None
    large: LargeChoice | None
    time_s: float


@dataclass(frozen=True, slots=True)
class RecordedToken:
    """A token of a recorded reply; `top_bytes` are the alternatives whose bytes are known."""

    ids: tuple[int, ...]
    text: str
    ends: bool
    logprob: float | None
    top: tuple[Choice, ...]
    top_bytes: tuple[Choice, ...]
    large_ids: tuple[int, ...]
    latency_s: float


@dataclass(frozen=True, slots=True)
class RecordedReply:
    """The large model's tokens after the first `after` tokens of the answer and the ids `then`.

    `then` is not empty for a position that was retracted.
    """

    after: int
    then: tuple[int, ...]
    tokens: tuple[RecordedToken, ...]


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """The rendered prompt: its number of tokens, and the SHA-256 of their ids.

    `text` is the prompt itself where it is more than the messages in the chat template: of a text
    completion, and of an answer that continues a begun one.
    """

    tokens: int
    sha256: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class ModelPair:
    """The two models. `small_spec` is the name or path that loads the small one.

    `small_files` identifies the files of the small one; None where they are unknown.
    """

    small: str
    small_spec: str | None
    adapter: str | None
    large: str | None
    large_url: str | None
    small_files: str | None = None


@dataclass(frozen=True, slots=True)
class BudgetRecord:
    """The state of a budget before the answer, which depends on earlier answers of a chat."""

    resolution: float
    rank: float
    bucket: float
    recent: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """The router before the answer: either `threshold` or `budget`, with its `state`, is set.

    `head_sha256` is the hash of the file of its learned head; None without one.
    """

    name: str
    threshold: float | None
    budget: float | None
    positions: int
    state: BudgetRecord | None
    head_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class OptionsRecord:
    """The options of the answer; `never_send` is the number of patterns."""

    mode: Mode
    prefetch: int | None
    call_ceiling: float | None
    accept_within: float
    max_tokens: int
    stop: tuple[str, ...]
    temperature: float
    top_p: float
    seed: int | None
    never_send: int
    # Documents of earlier versions lack these.
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def of(cls, options: Options) -> OptionsRecord:
        """Return the record of the options."""
        sampling = options.sampling
        return cls(
            mode=options.mode,
            prefetch=options.prefetch,
            call_ceiling=options.call_ceiling,
            accept_within=options.accept_within,
            max_tokens=options.max_tokens,
            stop=options.stop,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            never_send=len(options.never_send),
            top_k=sampling.top_k,
            min_p=sampling.min_p,
        )


@dataclass(frozen=True, slots=True)
class AnswerSummary:
    """The figures of an answer, with the keys of the summary of `ask --json`."""

    text: str
    tokens: int
    large_tokens: int
    escalated: int
    agreed: int
    accepted: int
    fallbacks: int
    unchecked: int
    withheld: int
    finish_reason: StopReason
    prompt_tokens: int
    cached_prompt_tokens: int
    ttft_s: float
    itl_p50_s: float
    itl_p95_s: float
    stall_s: float
    tokens_per_s: float
    total_s: float
    requests: int
    uploaded_tokens: int
    uploaded_bytes: int
    large_cached_tokens: int
    large_completion_tokens: int
    cost_estimate: float | None
    mode: Mode
    calls: int
    retracted: int
    prefetch_generated: int
    prefetch_used: int
    held: bool
    redecoded: int
    plan: str
    advice: str | None
    escalation_rate: float
    agreement: float | None
    failures: tuple[CallFailure, ...] = ()

    @classmethod
    def of(cls, stats: RunStats) -> AnswerSummary:
        """Return the figures of an answer, with times rounded to microseconds."""
        figures = {name: getattr(stats, name) for name in cls.__slots__}
        rounded = {
            name: round(value, 6)
            for name, value in figures.items()
            if name.endswith("_s") and isinstance(value, float)
        }
        return cls(**{**figures, **rounded})

    def stats(self) -> RunStats:
        """Return the figures as the library's summary."""
        return RunStats(**{item.name: getattr(self, item.name) for item in fields(RunStats)})


@dataclass(frozen=True, slots=True)
class AnswerDocument:
    """An answer with everything that is known of its tokens.

    `created` is the time at which it was made, in UTC; `mlxroute` is the version that wrote it, and
    `id` its id in an endpoint, None elsewhere.
    """

    format: str
    version: int
    mlxroute: str
    created: str
    id: str | None
    messages: tuple[Message, ...]
    prompt: PromptRecord
    models: ModelPair
    router: RouterRecord
    options: OptionsRecord
    summary: AnswerSummary
    tokens: tuple[DocumentToken, ...]
    replies: tuple[RecordedReply, ...]

    @property
    def question(self) -> str:
        """The last message of the user, or else the prompt of a text completion."""
        texts = [item["content"] for item in self.messages if item["role"] == "user"]
        return texts[-1] if texts else self.prompt.text or ""

    @property
    def escalated_tokens(self) -> list[DocumentToken]:
        """The tokens of the positions that the router escalated, answered or not."""
        return [token for token in self.tokens if token.large is not None or not token.checked]
