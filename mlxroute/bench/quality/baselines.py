"""Baseline routers: they look at the place of a position in the answer, at no signal of the model.

A router that learns or measures something has to beat them at equal numbers of large tokens.
"""

from __future__ import annotations

import random
import re
from typing import Final

from mlxroute.routers import Budget
from mlxroute.routers.router import Router, make_router
from mlxroute.serving.concurrent_answers import SharedSmallClient
from mlxroute.types import Signals

# Scores of positions are whole numbers.
_RESOLUTION: Final = 1.0
_RANDOM_RESOLUTION: Final = 1e-4
# Scores that budgets start from: answers of 32 tokens in sentences of 16.
_EXPECTED_SCORES: Final = {
    "random": (0.0, 1.0),
    "position": (*[0.0] * 31, 1.0),
    "first": tuple(float(-position) for position in reversed(range(32))),
    "sentence": (*[0.0] * 15, 1.0),
}
UNCALIBRATED: Final = tuple(_EXPECTED_SCORES)
"""Names of the baselines that look at no signal of the model."""
BASELINES: Final = (*UNCALIBRATED, "entropy")
"""Names of the routers that others are compared with."""
# The end of a sentence or of a line, with the white space after it.
_BEFORE_SENTENCE: Final = re.compile(r"(?:[.!?][\"')\]*]*\s+|\n\s*)$")


class BaselineRouter:
    """Escalates by the place of a position in the answer, within a budget.

    `random` escalates by chance; what it draws depends on the answer's seed and the place alone.
    `position` escalates the first position of each answer and no other; `first` escalates the first
    k positions, with the k that the budget allows; `sentence` escalates the first token of each
    sentence and each line. Like other routers, it keeps its budget from answer to answer.
    """

    # Scores do not change with the signals' rounding.
    gain = 0.0

    def __init__(self, name: str, budget: float) -> None:
        self.name = name
        resolution = _RANDOM_RESOLUTION if name == "random" else _RESOLUTION
        self.state = Budget.of(budget, _EXPECTED_SCORES[name], resolution=resolution)
        self._first_position = 0
        self._seed = ""
        self._small: SharedSmallClient | None = None

    def begin_answer(self, small: SharedSmallClient, *, seed: str) -> None:
        """Start an answer, which `small` writes.

        Answers with different values of `seed` are independent for `random`.
        """
        self._first_position = self.state.positions
        self._seed = seed
        self._small = small

    def score(self, signals: Signals, position: int) -> float:
        """Return the score of a position of the answer that was begun last."""
        place = position - self._first_position
        match self.name:
            case "random":
                return random.Random(f"{self._seed} {place}").random()
            case "position":
                return float(place == 0)
            case "first":
                return float(-place)
            case _:
                return float(self._starts_sentence(signals.token_id))

    def _starts_sentence(self, token_id: int) -> bool:
        """Return whether the small model's token would be the first one of a sentence."""
        assert self._small is not None
        vocabulary = self._small.vocabulary
        data = b"".join(vocabulary.token_bytes(i) for i in self._small.answer_ids)
        return starts_sentence(
            data.decode(errors="replace"),
            vocabulary.token_bytes(token_id).decode(errors="replace"),
        )


QualityRouter = Router | BaselineRouter


def make_quality_router(name: str, budget: float, quantiles: tuple[float, ...]) -> QualityRouter:
    """Return a router within a budget; `quantiles` are those of a calibration, if it has one."""
    if name in UNCALIBRATED:
        return BaselineRouter(name, budget)
    return make_router(name, budget=budget, quantiles=quantiles)


def starts_sentence(text: str, token: str) -> bool:
    """Return whether a token after a text is the first one of a sentence or of a line.

    The first token of a text always is; white space after the end of a sentence is not.
    """
    if not text:
        return True
    words = token.lstrip()
    return bool(words) and bool(_BEFORE_SENTENCE.search(text + token[: len(token) - len(words)]))
