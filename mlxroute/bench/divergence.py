"""The comparison of two answers to one prompt: whether they differ, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

from mlxroute.types import Token

# llama-server's logprobs vary by about this much with its other work at the time.
_NEAR_TIE_NATS: Final = 0.1


class Divergence(Enum):
    """The cause of a difference between an answer and that of `wait`.

    Attributes:
        NONE: The answers are equal.
        SERVER: The server decided a near tie differently.
        ENGINE: Any other difference, which is a bug of the engine.
    """

    NONE = auto()
    SERVER = auto()
    ENGINE = auto()


def find_divergence(answer: Sequence[Token], wait_answer: Sequence[Token]) -> Divergence:
    """Return the cause of the first difference between an answer and that of `wait`."""
    for token, wait_token in zip(answer, wait_answer, strict=False):
        if token.token_id != wait_token.token_id:
            margins = [_margin_nats(token), _margin_nats(wait_token)]
            is_near_tie = math.inf not in margins and min(margins) < _NEAR_TIE_NATS
            return Divergence.SERVER if is_near_tie else Divergence.ENGINE
        if (token.escalation is None) != (wait_token.escalation is None):
            return Divergence.ENGINE
    return Divergence.NONE if len(answer) == len(wait_answer) else Divergence.ENGINE


def _margin_nats(token: Token) -> float:
    """Return the large model's logprob of its best token minus the second's; inf if unknown."""
    large = None if token.escalation is None else token.escalation.large
    return math.inf if large is None or len(large.top) < 2 else large.top[0][1] - large.top[1][1]
