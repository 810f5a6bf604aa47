"""What a small model is tuned on: token sequences, and the tokens to predict at some positions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from mlxroute.recorded.large_answers import Choices
from mlxroute.sequences import common_prefix_length

# Lengths are rounded up to these multiples, so that batches have few shapes.
_LENGTH_STEP: Final = 32
_TARGET_STEP: Final = 64
_NOTHING: Final = (0, 0.0)

Batch = tuple[mx.array, mx.array, mx.array, mx.array]
"""Inputs [B, T]; indices [N] of the positions to predict in the flattened inputs; the tokens to
predict there and their probabilities, 0 for padding, both [N, K]."""

Target = tuple[tuple[int, float], ...]
"""The tokens to predict at a position, as pairs of id and probability, which sum to 1."""


@dataclass(frozen=True, slots=True)
class TuningExample:
    """A token sequence with the tokens to predict.

    Args:
        token_ids: Prompt and answer, without tokens after the last position.
        positions: Indices in `token_ids` after which a token is predicted.
        targets: What to predict there.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[Target, ...]

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The tokens up to the first position."""
        return self.token_ids[: self.positions[0] + 1]

    def without(self, prefix: int) -> TuningExample:
        """Return the example without its first `prefix` tokens, of which it predicts none."""
        positions = tuple(position - prefix for position in self.positions)
        return TuningExample(self.token_ids[prefix:], positions, self.targets)


def one_token(token_id: int) -> Target:
    """Return the target of a single token."""
    return ((token_id, 1.0),)


def soft_target(choices: Choices) -> Target:
    """Return the target of choices, of which there is at least one.

    The probabilities are those of the choices among themselves (knowledge distillation; Hinton et
    al., arXiv 1503.02531, at temperature 1).
    """
    total = sum(probability for _, probability in choices)
    return tuple((token_id, probability / total) for token_id, probability in choices)


def answer_example(
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    choices: Mapping[int, Choices] | None = None,
) -> TuningExample:
    """Return the example that predicts an answer, which must not be empty, but not its prompt.

    `choices` are what the large model might have written at some indices of the answer; elsewhere,
    and without any (the default), only its own token is predicted.
    """
    first = len(prompt_ids) - 1
    return TuningExample(
        token_ids=(*prompt_ids, *answer_ids[:-1]),
        positions=tuple(range(first, first + len(answer_ids))),
        targets=tuple(
            soft_target(named) if (named := (choices or {}).get(index)) else one_token(token_id)
            for index, token_id in enumerate(answer_ids)
        ),
    )


def find_common_prefix(examples: Sequence[TuningExample]) -> tuple[int, ...]:
    """Return the tokens with which all examples begin, none of which is at a position."""
    shortest = min(example.positions[0] for example in examples)
    first = examples[0].token_ids[:shortest]
    length = min(common_prefix_length(first, example.token_ids) for example in examples)
    return first[:length]


def make_batches(examples: Sequence[TuningExample], size: int) -> list[Batch]:
    """Return batches of at most `size` examples of similar length; every example is in one."""
    ordered = sorted(examples, key=lambda example: len(example.token_ids))
    return [_make_batch(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def shuffled_batches(batches: Sequence[Batch], *, skip: int = 0) -> Iterator[Batch]:
    """Yield all batches again and again, each time in another order, without the first `skip`.

    The orders are the same in every run.
    """

    def orders() -> Iterator[Batch]:
        for epoch in itertools.count():
            yield from random.Random(epoch).sample(batches, len(batches))

    return itertools.islice(orders(), skip, None)


def _make_batch(examples: Sequence[TuningExample]) -> Batch:
    length = _round_up(max(len(example.token_ids) for example in examples), _LENGTH_STEP)
    rows = [[*item.token_ids, *[0] * (length - len(item.token_ids))] for item in examples]
    indices = [row * length + i for row, item in enumerate(examples) for i in item.positions]
    targets = [target for item in examples for target in item.targets]
    padding = _round_up(len(targets), _TARGET_STEP) - len(targets)
    width = max(map(len, targets))
    padded = [(*target, *[_NOTHING] * (width - len(target))) for target in targets]
    padded += [(_NOTHING,) * width] * padding
    return (
        mx.array(rows),
        mx.array(indices + [0] * padding),
        mx.array([[token_id for token_id, _ in target] for target in padded]),
        mx.array([[probability for _, probability in target] for target in padded]),
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
