"""The requests of a soak run, drawn from a seed, and the answers that they have alone."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from mlxroute import LargeModel, SmallModel, generate
from mlxroute.types import Message, Sampling, Token
from tests.support.connected_clients import legacy
from tests.support.endpoint import new_router
from tests.support.loopback import Reply, Request

THRESHOLD: Final = 3.8
CONTEXT: Final = 2048
_WORDS: Final = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"),
    *("def", "main", "return", "42", "answers", "everything"),
)
_LEAVING_SHARE: Final = 0.1
# Differences between a batch and one row that are a tie, in nats.
_TIE_NATS: Final = 0.01


class Leaving(StrEnum):
    """When a client leaves."""

    IN_STREAM = "in mid-stream"
    BEFORE_REPLY = "before a whole reply"
    IN_PREFILL = "while its prompt is read"


@dataclass(frozen=True, slots=True)
class Variant:
    """An answer that several requests ask for.

    Args:
        messages: The conversation.
        threshold: The threshold of the router, in nats.
        max_tokens: Maximum length.
        exact: Whether the request says `exact`.
        sampling: Sampling; greedy by default.
    """

    messages: tuple[Message, ...]
    threshold: float
    max_tokens: int
    exact: bool
    sampling: Sampling = field(default_factory=Sampling)

    def body(self) -> dict[str, Any]:
        """Return the body of a request."""
        sampling = self.sampling
        seed = {} if sampling.seed is None else {"seed": sampling.seed}
        return {
            "model": "mlxroute",
            "messages": list(self.messages),
            "threshold": "inf" if math.isinf(self.threshold) else self.threshold,
            "max_tokens": self.max_tokens,
            "exact": self.exact,
            "temperature": sampling.temperature,
            "logprobs": True,
            **seed,
        }

    def write_alone(self, small: SmallModel, large: LargeModel) -> list[Token]:
        """Return the tokens of the answer alone, without those that end it."""
        answer = generate(
            small,
            large,
            list(self.messages),
            router=new_router(None, self.threshold),
            max_tokens=self.max_tokens,
            temperature=self.sampling.temperature,
            seed=self.sampling.seed,
        )
        ends = small.vocabulary.eos_ids
        return [token for token in answer if token.token_id not in ends]


@dataclass(frozen=True, slots=True)
class Plan:
    """One request of a run.

    Args:
        number: Its number.
        variant: The number of its answer.
        body: The body of the request.
        leaving: When the client leaves; None if it stays.
        after: Lines of the stream, or seconds, after which it leaves.
    """

    number: int
    variant: int
    body: Mapping[str, Any]
    leaving: Leaving | None
    after: float


def choose_large_token(request: Request) -> Reply:
    """Reply a letter that depends on the whole prompt."""
    digest = zlib.crc32(request.json["prompt"].encode())
    return Reply.of(legacy("abcdefghijklmnopqrstuvwxyz"[digest % 26]))


def make_variants(rng: random.Random, count: int) -> list[Variant]:
    """Return answers of several kinds: short, long, second turns, routed, sampled and exact."""
    variants: list[Variant] = []
    for number in range(count):
        messages: list[Message] = [_user(rng, rng.choice((5, 12, 30, 120)))]
        if number % 3 == 1:
            messages = [
                *variants[-1].messages,
                {"role": "assistant", "content": " ".join(rng.choices(_WORDS, k=8))},
                _user(rng, 6),
            ]
        is_sampled = number % 5 == 4
        variants.append(
            Variant(
                tuple(messages),
                threshold=math.inf if number % 4 == 3 else THRESHOLD,
                max_tokens=rng.choice((4, 12, 24)),
                # A sampled token has no near ties that its top tokens would show.
                exact=is_sampled or rng.random() < 0.2,
                sampling=Sampling(0.8, seed=number) if is_sampled else Sampling(),
            )
        )
    return variants


def make_plans(rng: random.Random, variants: Sequence[Variant], count: int) -> list[Plan]:
    """Return the requests of a run."""
    return [_make_plan(rng, variants, number) for number in range(count)]


def _make_plan(rng: random.Random, variants: Sequence[Variant], number: int) -> Plan:
    variant = rng.randrange(len(variants))
    leaving = rng.choice(list(Leaving)) if rng.random() < _LEAVING_SHARE else None
    mode = rng.choice(("auto", "wait", "overlap", "hedge"))
    body = {**variants[variant].body(), "stream": rng.random() < 0.5, "mode": mode}
    after = rng.uniform(0, 0.1)
    match leaving:
        case Leaving.IN_STREAM:
            body |= {"stream": True, "max_tokens": 200}
            after = rng.randrange(1, 30)
        case Leaving.BEFORE_REPLY:
            body |= {"stream": False, "max_tokens": 200}
        case Leaving.IN_PREFILL:
            body["messages"] = [_user(rng, 400)]
    return Plan(number, variant, body, leaving, after)


def _user(rng: random.Random, words: int) -> Message:
    return {"role": "user", "content": " ".join(rng.choices(_WORDS, k=words))}


def compare_answer(
    variant: Variant, alone: Sequence[Token], entries: Sequence[Mapping[str, Any]]
) -> str:
    """Compare a reply's tokens, up to the first unchecked one, with those of the answer alone.

    Returns "" if they are equal, else the near tie where they part. Raises AssertionError for any
    other difference.
    """
    checked = next((n for n, entry in enumerate(entries) if not entry["checked"]), None)
    received = [(e["text"], e["source"]) for e in entries[:checked]]
    expected = [(token.text, token.source.value) for token in alone]
    if received == (expected if checked is None else expected[:checked]):
        return ""
    at = next(
        (n for n, pair in enumerate(zip(received, expected, strict=False)) if pair[0] != pair[1]),
        min(len(received), len(expected)),
    )
    assert not variant.exact, f"token {at}: {received[at:]} instead of {expected[at:]}"
    assert at < len(alone), f"{received[at:]} after the end of the answer"
    token = alone[at]
    top = token.signals.top_logprobs
    gaps = (top[0] - top[1], abs(token.score - token.threshold))
    assert min(gaps) < _TIE_NATS, f"token {at}: {received[at:]} instead of {expected[at:]}, {gaps}"
    kind = "token" if gaps[0] < _TIE_NATS else "escalation"
    return f"{kind} {at}: {received[at : at + 1]} or {expected[at]}, {min(gaps):.1e} nats apart"
