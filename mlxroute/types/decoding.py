"""Values of decoding with the small model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag, StrEnum
from typing import Final, Protocol

GREEDY_BELOW: Final = 0.001
"""The temperature below which sampling is greedy."""


class Source(StrEnum):
    """The model that a committed token came from."""

    SMALL = "small"
    LARGE = "large"


class Mode(StrEnum):
    """What the small model does while a call to the large model is in flight.

    All modes give the same text.
    """

    AUTO = "auto"
    WAIT = "wait"
    OVERLAP = "overlap"
    HEDGE = "hedge"


class StopReason(StrEnum):
    """Why an answer ended: end token, stop string, maximum length, or cancelled."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Judgement(StrEnum):
    """A router's judgement of a position."""

    KEEP = "keep"
    ESCALATE = "escalate"
    OVER_BUDGET = "over budget"


class LogitFault(IntFlag):
    """Faults of a row of logits."""

    NONE = 0
    NAN = 1
    """At least one logit is NaN."""
    POSITIVE_INFINITY = 2
    """At least one logit is +inf."""
    ALL_NEGATIVE_INFINITY = 4
    """No logit is above -inf: all are -inf or NaN."""


@dataclass(frozen=True, slots=True)
class Signals:
    """The small model's view of the next position, from one pass over its logits.

    Logprobs and entropy are natural logarithms over the full vocabulary, before temperature,
    computed in float32.

    Args:
        token_id: The model's own choice: greedy, or sampled if a temperature is set.
        logprob: Log-probability of that choice, in nats.
        entropy_nats: Entropy, in nats.
        varentropy: Variance of the log-probability, in nats squared.
        margin: Probability of the likeliest token minus that of the second, from 0 to 1.
        top_ids: The likeliest tokens, at most 8, the likeliest first.
        top_logprobs: Their log-probabilities, in nats.
        lse: Logsumexp of the logits; 0 by default.
        flags: Faults of the logits; none by default.
        head_score: Score of the learned head; None, the default, without a head.
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
    """How the small model chooses its own token.

    Args:
        temperature: Below 0.001 sampling is greedy: logprobs divided by less exceed the range of
            float16. 0 by default.
        top_p: Nucleus sampling; 1, the default, keeps all tokens. Below 0.001 sampling is greedy:
            float32 sums over a vocabulary are no more precise.
        seed: Makes sampling repeatable; None, the default, does not.
        top_k: Number of the likeliest tokens to draw from; 1 is greedy, and 0, the default, sets no
            limit.
        min_p: Probability, as a share of the likeliest token's, below which no token is drawn; 1 is
            greedy. 0 by default.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        is_narrow = min(self.temperature, self.top_p) < GREEDY_BELOW
        return is_narrow or self.top_k == 1 or self.min_p == 1


@dataclass(frozen=True, slots=True)
class BranchCost:
    """Median seconds of a decode step of one row, and of a batch of `rows` rows.

    Args:
        rows: Number of rows of the batch.
        step_s: Seconds of a step of one row.
        batch_s: Seconds of a step of the batch.
        rounding_nats: Bound of the differences of logprobs, entropies and head scores between the
            two.
    """

    rows: int
    step_s: float
    batch_s: float
    rounding_nats: float


Message = dict[str, str]
"""A chat message, `{"role": ..., "content": ...}`, as chat templates take it."""


class Vocabulary(Protocol):
    """A vocabulary: token ids to bytes and back."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    @property
    def end_id(self) -> int:
        """The one of `eos_ids`, which must not be empty, with which the model ends its answers."""
        ...

    @property
    def bos_text(self) -> str:
        """Text of the token that the tokenizer puts before a text; empty if there is none."""
        ...

    @property
    def size(self) -> int:
        """Number of ids, counting from 0, without the padding of the weights."""
        ...

    @property
    def control_names(self) -> frozenset[str]:
        """Names of the control tokens, such as `<|im_end|>`, which no text may become."""
        ...

    @property
    def special_names(self) -> frozenset[str]:
        """The control tokens that add no text; others, such as `<think>`, are part of answers."""
        ...

    @property
    def template_ids(self) -> frozenset[int]:
        """Ids of the control tokens in the chat template's prompts, and of those in `eos_ids`."""
        ...

    def piece(self, token_id: int) -> str | None:
        """Return the raw entry of an id (`Ġthe`, `▁the`, `<|im_end|>`); None if out of range."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that an id adds to the text; empty for special tokens."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text; no special token is added, and none is parsed in it."""
        ...
