"""Sampled continuations of several texts, decoded as rows of one batch.

A token is drawn from the likeliest ones in the signals, by their probabilities. Samples of a text
that are still equal share a row, so what the model says after it is computed once.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from mlxroute.errors import UsageError
from mlxroute.sequences import chunks
from mlxroute.small.decoder import Decoder
from mlxroute.small.kv_cache import CacheLayers, is_plain
from mlxroute.small.row_batch import BatchRow, RowBatch, count_rows_that_fit
from mlxroute.types import Signals

# Maximum number of samples, and so of rows, in the batch. Others join as they end.
_SAMPLES_AT_ONCE: Final = 96


@dataclass(frozen=True, slots=True)
class SampleStart:
    """Where continuations begin.

    Args:
        layers: KV cache of the tokens before it, and perhaps of more.
        length: Number of these tokens.
        token_id: The token that follows them.
        limit: Maximum number of tokens of a continuation after that token.
        seed: What its random numbers depend on, with the number of the continuation.
        is_over: Tells from a continuation whether more tokens are of no use.
        temperature: Divides the logprobs that tokens are drawn by.
    """

    layers: CacheLayers
    length: int
    token_id: int
    limit: int
    seed: str
    is_over: Callable[[Sequence[int]], bool]
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class _Sample:
    """A continuation so far, and what draws its tokens."""

    start: SampleStart
    random: random.Random
    ids: list[int] = field(default_factory=list)

    def draw(self, signals: Signals) -> int:
        """Return the next token; the model's own where its logits are broken."""
        temperature = self.start.temperature
        weights = [math.exp(logprob / temperature) for logprob in signals.top_logprobs]
        if not 0 < sum(weights) < math.inf:
            return signals.token_id
        return self.random.choices(signals.top_ids, weights)[0]


@dataclass(frozen=True, slots=True)
class _Group:
    """Samples with the same text: the row that holds it, and the token to feed next."""

    row: BatchRow
    token_id: int
    samples: Sequence[_Sample]


def sample_continuations(
    decoder: Decoder, starts: Sequence[SampleStart], *, count: int, eos_ids: frozenset[int]
) -> list[list[list[int]]]:
    """Return `count` continuations of each start, without the start's token and the end token.

    What a sample draws depends on its start and its number, and on the rounding of the batch near
    ties. Raises UsageError for KV caches and models that cannot have rows.
    """
    samples = [
        [_Sample(start, random.Random(f"{start.seed} {number}")) for number in range(count)]
        for start in starts
    ]
    # After an end token, at the limit or with a known outcome there is nothing to write.
    unfinished = [
        group
        for start, group in zip(starts, samples, strict=True)
        if start.limit > 0 and start.token_id not in eos_ids and not start.is_over([])
    ]
    if unfinished:
        at_once = _count_at_once(unfinished)
        decoder.check_rows(unfinished[0][0].start.layers)
        _write(decoder, unfinished, at_once, eos_ids)
    return [[sample.ids for sample in group] for group in samples]


def _count_at_once(groups: Sequence[Sequence[_Sample]]) -> int:
    """Return how many samples can be in the batch, as far as its memory goes."""
    starts = [group[0].start for group in groups]
    if not all(is_plain(start.layers) for start in starts):
        raise UsageError(
            "continuing from the middle of a text needs plain KV caches, which this architecture"
            " does not have"
        )
    longest = max(start.length + 1 + start.limit for start in starts)
    rows = min(count_rows_that_fit(start.layers, longest) for start in starts)
    return max(1, min(_SAMPLES_AT_ONCE, rows))


def _write(
    decoder: Decoder, waiting: Sequence[Sequence[_Sample]], at_once: int, eos_ids: frozenset[int]
) -> None:
    """Continue samples to their ends; those of a start are one item of `waiting`."""
    batch = decoder.start_rows()
    parts = deque(part for samples in waiting for part in chunks(samples, at_once))
    groups: list[_Group] = []
    while parts or groups:
        free = at_once - sum(len(group.samples) for group in groups)
        while parts and len(parts[0]) <= free:
            samples = parts.popleft()
            free -= len(samples)
            start = samples[0].start
            groups.append(_Group(batch.join(start.layers, start.length), start.token_id, samples))
        signals = batch.step({group.row: group.token_id for group in groups})
        groups = [
            later
            for group in groups
            for later in _split(batch, group.row, _draw(group.samples, signals[group.row], eos_ids))
        ]


def _draw(
    samples: Sequence[_Sample], signals: Signals, eos_ids: frozenset[int]
) -> dict[int, list[_Sample]]:
    """Draw the next token of each sample; return the samples to continue, by that token."""
    going_on: dict[int, list[_Sample]] = {}
    for sample in samples:
        token_id = sample.draw(signals)
        if token_id in eos_ids:
            continue
        sample.ids.append(token_id)
        if len(sample.ids) < sample.start.limit and not sample.start.is_over(sample.ids):
            going_on.setdefault(token_id, []).append(sample)
    return going_on


def _split(batch: RowBatch, row: BatchRow, samples: dict[int, list[_Sample]]) -> list[_Group]:
    """Return a group for each token; the first keeps the row, the others get copies of it."""
    if not samples:
        batch.drop(row)
        return []
    rows = [row]
    for _ in range(len(samples) - 1):
        rows.append(batch.join(batch.copy(row, row.length), row.length))
    return [_Group(r, *item) for r, item in zip(rows, samples.items(), strict=True)]
