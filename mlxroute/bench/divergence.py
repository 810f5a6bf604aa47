"""Whether two answers to one prompt are the same, and who parted them if not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum, auto
from typing import Final

from mlxroute.types import Token

# llama-server's replies differ this much with what else it computes at the time.
_NEAR_TIE_NATS: Final = 0.1


class Divergence(Enum):
    """Why an answer is not that of `wait`: the server fell otherwise at a near tie, or we did."""

    NOT = auto()
    BY_SERVER = auto()
    BY_US = auto()


def find_divergence(answer: Sequence[Token], waited: Sequence[Token]) -> Divergence:
    """Who made an answer another one than that of `wait`, if anybody did."""
    for mine, other in zip(answer, waited, strict=False):
        if mine.token_id != other.token_id:
            margins = [_margin_nats(each) for each in (mine, other)]
            near = math.inf not in margins and min(margins) < _NEAR_TIE_NATS
            return Divergence.BY_SERVER if near else Divergence.BY_US
        if (mine.escalation is None) != (other.escalation is None):
            return Divergence.BY_US
    return Divergence.NOT if len(answer) == len(waited) else Divergence.BY_US


def _margin_nats(token: Token) -> float:
    """By how much the large model preferred this token; inf where that is not known."""
    large = None if token.escalation is None else token.escalation.large
    return math.inf if large is None or len(large.top) < 2 else large.top[0][1] - large.top[1][1]
