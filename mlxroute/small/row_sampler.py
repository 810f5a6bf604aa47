"""The sampler of one sequence, with a random state of its own."""

from __future__ import annotations

import secrets
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from mlxroute.types import Sampling


class RowSampler:
    """Draws the tokens of one sequence; other sequences do not change what it draws.

    Args:
        sampling: Temperature above 0, filters and seed; without a seed one is drawn. MLX's own
            random state stays as it was.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # MLX's own state begins in each thread with the same numbers.
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._key = mx.random.key(seed)
        # (length of the sequence, random state before the draw at that length), for rollback.
        self._states: list[tuple[int, mx.array]] = []

    def draw(self, logits: mx.array, *, length: int) -> mx.array:
        """Draw the token [1, 1] of logits [1, V] as `mlx_lm.generate_step` draws it, lazily.

        `length` is the number of tokens in the sequence.
        """
        # A slice of all, because a copy would add a node to the graph at each draw.
        before = _random_state()[:]
        _random_state()[:] = self._key
        self._states.append((length, self._key))
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        token: mx.array = self._sample(logprobs).reshape(1, 1)
        self._key = mx.array(_random_state())
        _random_state()[:] = before
        # The key is computed with the token, because only this thread can compute what is lazy now.
        drawn: mx.array = mx.depends(token, self._key)
        return drawn

    def _sample(self, logprobs: mx.array) -> mx.array:
        sampling = self._sampling
        sample = make_sampler(
            temp=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            # mlx-lm refuses a number that keeps all tokens.
            top_k=sampling.top_k if sampling.top_k < logprobs.shape[-1] else 0,
        )
        token: mx.array = sample(logprobs)
        return token

    def rewind(self, length: int) -> None:
        """Restore the random state of the time at which the sequence had `length` tokens."""
        while self._states and self._states[-1][0] > length:
            self._key = self._states.pop()[1]


def _random_state() -> mx.array:
    """Return MLX's random state: samplers advance it, and assigning its content sets it."""
    state: Any = mx.random.state
    live: mx.array = state[0]
    return live
