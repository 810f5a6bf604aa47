"""Examples of a small model's own answers, corrected by the large model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mlxroute.recorded.large_choices import WrittenAnswer, find_large_choices
from mlxroute.recorded.recording_large import RecordingLarge
from mlxroute.small import SmallModel
from mlxroute.training.own_answers import write_answers
from mlxroute.training.tuning_examples import TuningExample, one_token
from mlxroute.types import Message, Progress

_LABEL: Final = "corrected answers"


@dataclass(frozen=True, slots=True)
class Corrections:
    """Own answers of the small model, corrected.

    Args:
        examples: For each answer, the example that predicts the large model's choices; None if the
            server could not continue the answer at all.
        agreement: Share of the small model's tokens that the large one would write too.
        incomplete: Number of answers that the server could not continue at some position.
    """

    examples: list[TuningExample | None]
    agreement: float
    incomplete: int


@dataclass(frozen=True, slots=True)
class Corrector:
    """The large model as a corrector of answers.

    Args:
        large: The large model and its recorded tokens.
        at_once: Maximum number of calls in flight.
    """

    large: RecordingLarge
    at_once: int

    def correct_own_answers(
        self,
        small: SmallModel,
        conversations: Sequence[Sequence[Message]],
        *,
        max_tokens: int,
        progress: Progress,
    ) -> Corrections:
        """Let the small model answer, and return examples that predict the large model's choices.

        The inputs are the small model's own tokens, also where the large one would write others: so
        the small model learns to go on from its own mistakes (on-policy distillation; GKD, arXiv
        2306.13649). Raises LargeError if the large model fails.
        """
        written = write_answers(small, conversations, max_tokens=max_tokens, progress=progress)
        answers = [
            WrittenAnswer(conversation, token_ids, is_whole=len(token_ids) < max_tokens)
            for conversation, token_ids in zip(conversations, written, strict=True)
        ]
        done = itertools.count()
        progress(_LABEL, next(done), len(answers))
        choices = find_large_choices(
            small,
            self.large,
            answers,
            at_once=self.at_once,
            on_answer=lambda: progress(_LABEL, next(done), len(answers)),
        )
        return Corrections(
            [
                _corrected_example(small, answer, targets) if targets else None
                for answer, targets in zip(answers, choices, strict=True)
            ],
            agreement=_measure_agreement(answers, choices),
            incomplete=sum(
                len(targets) < answer.positions
                for answer, targets in zip(answers, choices, strict=True)
            ),
        )


def _measure_agreement(answers: Sequence[WrittenAnswer], choices: Sequence[Sequence[int]]) -> float:
    """Return the share of positions, without the ends, where the large model agrees."""
    pairs = [
        pair
        for answer, targets in zip(answers, choices, strict=True)
        for pair in zip(answer.token_ids, targets, strict=False)
    ]
    return sum(own == target for own, target in pairs) / max(1, len(pairs))


def _corrected_example(
    small: SmallModel, answer: WrittenAnswer, targets: Sequence[int]
) -> TuningExample:
    prompt_ids = small.encode_conversation(answer.conversation).ids
    first = len(prompt_ids) - 1
    return TuningExample(
        token_ids=(*prompt_ids, *answer.token_ids[: len(targets) - 1]),
        positions=tuple(range(first, first + len(targets))),
        targets=tuple(map(one_token, targets)),
    )
