"""The values that cross borders between rooms: frozen, slotted, standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag, StrEnum
from typing import Protocol


class Source(StrEnum):
    """Which model a committed token came from."""

    SMALL = "small"
    LARGE = "large"


class LabelKind(StrEnum):
    """What a head learns to find.

    Divergence: the models disagree. Consequence: they do, and the outcome differs with the choice.
    Preference: with the large model's choice the outcome is right, with the small one's wrong
    (CITER, arXiv 2502.01976, along the large model's answer). Deferral has no labels: the head
    mixes both models so that the answer becomes likely (Co-LLM, arXiv 2403.03870).
    """

    DIVERGENCE = "divergence"
    CONSEQUENCE = "consequence"
    PREFERENCE = "preference"
    DEFERRAL = "deferral"


class Mode(StrEnum):
    """What the small model does while the large one is asked; the text is the same in each."""

    AUTO = "auto"
    WAIT = "wait"
    OVERLAP = "overlap"
    HEDGE = "hedge"


class StopReason(StrEnum):
    """Why an answer ended."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Judgement(StrEnum):
    """What a router decides at a position, from its score alone."""

    KEEP = "keep"
    ESCALATE = "escalate"
    OVER_BUDGET = "over budget"


class LogitFault(IntFlag):
    """What is wrong with a row of logits."""

    NONE = 0
    NAN = 1
    """At least one logit is NaN."""
    POSITIVE_INFINITY = 2
    """At least one logit is +inf."""
    ALL_NEGATIVE_INFINITY = 4
    """No logit is above -inf: all are -inf or NaN."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What the small model says about the next position, from one pass over its logits row.

    `token_id` is its own choice (greedy, or sampled when a temperature is set). Logprobs and
    `entropy_nats` are natural logarithms over the full vocabulary, before temperature, computed
    in float32. `margin` is p1 - p2 (0 to 1). `top_ids` is ordered by falling logprob.
    `lse` is the logits' logsumexp. `flags` names what is wrong with the logits, if
    anything. `head_score` is a learned head's, if one is set.
    """

    token_id: int
    logprob: float
    entropy_nats: float
    varentropy: float
    margin: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]
    lse: float = 0.0
    flags: LogitFault = LogitFault.NONE
    head_score: float | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the small model picks its own token; temperature 0 is greedy, top-p 1 keeps all."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


Message = dict[str, str]
"""A chat message, `{"role": ..., "content": ...}`, as chat templates take it."""


class Vocabulary(Protocol):
    """The small model's vocabulary, as much of it as the large side and the engine need."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    @property
    def bos_text(self) -> str:
        """The text of the token `encode` with specials puts first; empty when there is none."""
        ...

    @property
    def size(self) -> int:
        """How many ids there are, counting from 0, padding of the weights left out."""
        ...

    def piece(self, token_id: int) -> str | None:
        """The raw entry of an id (`Ġthe`, `▁the`, `<|im_end|>`); None if out of range."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes an id adds to the text; empty for special tokens."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text, without adding special tokens and without parsing any in it."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the answer in whole characters.

    `large_ids` are the large model's own ids for it, empty where the small model wrote it or the
    server names no ids.
    """

    text: str
    large_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LargeContext:
    """Everything the large model may need to produce the next token of this answer.

    `text` is the prompt as the small model's template renders it plus the answer up to the last
    token that ended on a whole character; `spans` are that part of the answer. `fragment_ids` are
    the committed ids after it, whose bytes end inside a character. `token_ids` are prompt and
    answer in the small vocabulary.
    """

    text: str
    token_ids: Sequence[int]
    fragment_ids: tuple[int, ...]
    vocabulary: Vocabulary
    messages: tuple[Message, ...] = ()
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class LargeToken:
    """One token of the large model, already in the small model's vocabulary.

    `token_ids` has one id when the vocabularies agree on the token, several when its bytes had
    to be spelled in the small vocabulary. `is_eos` marks the end of the answer; then `token_ids`
    holds the small model's end token. `logprob` is None when the server gave none. `top` are
    (text, logprob) pairs by falling logprob. `large_ids` are the server's own ids, empty when it
    names none. `prompt_tokens` and `cached_tokens` are the server's own counts (None when it does
    not report them); `uploaded_bytes` is the size of the request bodies. `lost_s` is the part of
    `latency_s` that went into attempts that failed.
    """

    token_ids: tuple[int, ...]
    text: str
    is_eos: bool
    logprob: float | None
    top: tuple[tuple[str, float], ...]
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    uploaded_bytes: int
    latency_s: float
    large_ids: tuple[int, ...] = ()
    lost_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Uploads:
    """What went to the large model, in totals since some start.

    `requests` and `size_bytes` count every body that was sent, answered or not. The tokens are of
    answered requests: `tokens` of prompts, of which the server had `cached_tokens` already, and
    `completion_tokens` that it generated.
    """

    requests: int = 0
    size_bytes: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Uploads) -> Uploads:
        return Uploads(
            self.requests + other.requests,
            self.size_bytes + other.size_bytes,
            self.tokens + other.tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )

    def __sub__(self, earlier: Uploads) -> Uploads:
        return Uploads(
            self.requests - earlier.requests,
            self.size_bytes - earlier.size_bytes,
            self.tokens - earlier.tokens,
            self.cached_tokens - earlier.cached_tokens,
            self.completion_tokens - earlier.completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class Prices:
    """What a million tokens cost at the large model's server, in whatever currency it bills."""

    input: float
    cached_input: float
    output: float

    def cost(self, uploads: Uploads) -> float:
        """An estimate, in the same currency."""
        return (
            (uploads.tokens - uploads.cached_tokens) * self.input
            + uploads.cached_tokens * self.cached_input
            + uploads.completion_tokens * self.output
        ) / 1e6


@dataclass(frozen=True, slots=True)
class Escalation:
    """One question to the large model: its answer, or why there is none.

    A `prefetched` answer came with that of an earlier call and took no call of its own.
    """

    small_id: int
    large: LargeToken | None
    failure: str | None
    latency_s: float
    prefetched: bool = False

    @property
    def agreed(self) -> bool:
        """Whether the large model wanted exactly the small model's own choice."""
        return self.large is not None and self.large.token_ids == (self.small_id,)


@dataclass(frozen=True, slots=True)
class Token:
    """One committed token of the answer.

    `text` is what this token added to the visible text: empty for an end token, for a token that
    is only part of a character, and for what a stop string cut off. `checked` is False where the
    router wanted the large model's opinion and did not get it. `judgement` is what the router made
    of `score` with the `threshold` it had there. `time_s` counts from the start of the request.
    """

    index: int
    token_id: int
    text: str
    source: Source
    score: float
    threshold: float
    judgement: Judgement
    signals: Signals
    escalation: Escalation | None
    checked: bool
    time_s: float


@dataclass(frozen=True, slots=True)
class Provisional:
    """A token that is to become number `index` of the answer, unless it is retracted."""

    index: int
    token_id: int
    text: str
    source: Source
    signals: Signals


@dataclass(frozen=True, slots=True)
class Retracted:
    """The provisional tokens from number `index` on are taken back."""

    index: int


Event = Token | Provisional | Retracted
"""What happens while an answer is written, in order; the `Token`s alone are the answer."""


@dataclass(frozen=True, slots=True)
class BranchCost:
    """Median seconds of a step of one row and of a batch of `rows`.

    `rounding_nats` bounds by how much logprobs and entropies differ between the two.
    """

    rows: int
    step_s: float
    batch_s: float
    rounding_nats: float


@dataclass(frozen=True, slots=True)
class RunStats:
    """The summary of one answer. Times in seconds, rates as fractions.

    `escalated` counts positions the large model answered, `fallbacks` calls that failed,
    `unchecked` positions the router wanted checked that were not, `withheld` those of them whose
    context matched a never-send pattern. `stall_s` is wall time spent waiting for the large model.
    `requests` and `uploaded_bytes` count every body sent; `uploaded_tokens` those of answered
    requests, as the server counts them, otherwise the small model's count of the same text.
    `cost_estimate` is None without prices. `cached_prompt_tokens` were reused from the last turn.
    `calls` were begun for positions of this answer, also for such as were `retracted`: provisional
    tokens taken back. `prefetch_generated` tokens came with calls beyond the one asked for,
    `prefetch_used` of them answered a later position. `held` says that the cache could not have
    given tokens back somewhere, so that `overlap` waited there. `redecoded` decisions of a batch
    were taken again for its rounding. `plan` is how the wait was spent last and from which figures,
    `advice` that routing cannot pay, said once in a session.
    """

    text: str
    tokens: int
    large_tokens: int
    escalated: int
    agreed: int
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
    mode: Mode = Mode.WAIT
    calls: int = 0
    retracted: int = 0
    prefetch_generated: int = 0
    prefetch_used: int = 0
    held: bool = False
    redecoded: int = 0
    plan: str = ""
    advice: str | None = None

    @property
    def escalation_rate(self) -> float:
        """Escalated over committed tokens; 0 for an empty answer."""
        return self.escalated / self.tokens if self.tokens else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of escalations where the large token was the small model's choice."""
        return self.agreed / self.escalated if self.escalated else None


class Activity(StrEnum):
    """What the engine is doing at this moment."""

    PREFILL = "prefill"
    DECODE = "decode"
    WAIT = "wait"
    DONE = "done"


class Progress(Protocol):
    """Receives the state of a long piece of work; `total` is None while unknown."""

    def __call__(self, label: str, done: int, total: int | None) -> None: ...


class Notify(Protocol):
    """Receives one line the user should read once."""

    def __call__(self, line: str) -> None: ...


def no_progress(label: str, done: int, total: int | None) -> None:
    """Ignore progress."""


def no_notice(line: str) -> None:
    """Ignore a notice."""
