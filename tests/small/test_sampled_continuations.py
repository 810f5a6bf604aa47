"""Sampled continuations: a batch draws what each sample would draw alone."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mlxroute.backend.load import load
from mlxroute.errors import UsageError
from mlxroute.small import SmallModel
from mlxroute.small.sampled_continuations import SampleStart, sample_continuations
from tests.support.tiny import KINDS, make_tiny_model

_IDS = [5 + 7 * i % 250 for i in range(12)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    path: Path = make_tiny_model(tmp_path_factory.mktemp("samples") / "tiny")
    return SmallModel(*load(path), name="tiny")


def drawn_alone(small: SmallModel, start: SampleStart, number: int) -> list[int]:
    """A sample, drawn with single rows."""
    return _drawn_alone(small, start.length, start.token_id, start.limit, f"{start.seed} {number}")


# Several tests compare with the same samples.
@functools.cache
def _drawn_alone(small: SmallModel, length: int, token_id: int, limit: int, seed: str) -> list[int]:
    alone = small.with_own_cache()
    signals, _ = alone.prefill([*_IDS[:length], token_id])
    draws = random.Random(seed)
    ids: list[int] = []
    while len(ids) < limit:
        weights = [math.exp(logprob) for logprob in signals.top_logprobs]
        token_id = draws.choices(signals.top_ids, weights)[0]
        if token_id in small.vocabulary.eos_ids:
            break
        ids.append(token_id)
        signals = alone.step(token_id)
    return ids


def start_after(
    small: SmallModel,
    length: int,
    token_id: int,
    limit: int,
    is_over: Callable[[Sequence[int]], bool] = lambda ids: False,
) -> SampleStart:
    """A start after the first ids, whose KV cache holds all of them."""
    own = small.with_own_cache()
    own.prefill(_IDS)
    layers, _ = own.decoder.take_cache()
    return SampleStart(layers, length, token_id, limit, f"s{length}", is_over)


def sampled(small: SmallModel, starts: Sequence[SampleStart]) -> list[list[list[int]]]:
    eos_ids = small.vocabulary.eos_ids
    return sample_continuations(small.decoder, starts, count=5, eos_ids=eos_ids)


@pytest.mark.parametrize("samples", [1, 3, 7, 64])
def test_samples_do_not_depend_on_the_batch(
    samples: int, small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxroute.small.sampled_continuations._SAMPLES_AT_ONCE", samples)
    starts = [
        start_after(small, 4, 70, 6),
        start_after(small, 4, 71, 6),
        start_after(small, 11, 70, 3),
    ]
    written = sampled(small, starts)
    for start, group in zip(starts, written, strict=True):
        assert group == [drawn_alone(small, start, number) for number in range(5)]
    assert len({tuple(ids) for ids in written[0]}) > 1


def test_samples_end_where_nothing_is_left_to_write(small: SmallModel) -> None:
    (end, *_) = small.vocabulary.eos_ids
    starts = [
        start_after(small, 4, 70, 0),
        start_after(small, 4, end, 6),
        start_after(small, 4, 70, 6, lambda ids: True),
        start_after(small, 4, 70, 6, lambda ids: len(ids) == 2),
    ]
    *finished, two = sampled(small, starts)
    assert finished == [[[]] * 5] * 3
    long = [drawn_alone(small, start_after(small, 4, 70, 6), number) for number in range(5)]
    assert two == [ids[:2] for ids in long]


def test_a_cache_that_cannot_be_cut_is_an_error(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "g", model_type="gemma3_text", extra=KINDS["gemma3_text"])
    small = SmallModel(*load(path), name="g")
    with pytest.raises(UsageError, match="needs plain KV caches"):
        sampled(small, [start_after(small, 4, 70, 6)])
