"""The graph kernel against float64, and its greedy choice against mlx_lm's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.small.kernels import graph_kernel, unpack_signals
from mlxroute.small.kernels.graph_kernel import pack_signals
from tests.support.rows import VOCABULARIES, Row, check_packed, edge_rows, random_rows

DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def packed(logits: mx.array) -> list[list[float]]:
    return cast("list[list[float]]", pack_signals(logits).tolist())


@pytest.fixture
def compilation() -> Iterator[None]:
    """MLX compiles, as it does outside the tests."""
    mx.enable_compile()
    yield
    if "MLX_DISABLE_COMPILE" in os.environ:
        mx.disable_compile()


def check(rows: dict[str, Row], dtype: mx.Dtype) -> None:
    logits = mx.array(np.stack(list(rows.values())).astype(np.float32)).astype(dtype)
    given_rows = np.array(logits.astype(mx.float32))
    for name, values, row in zip(rows, packed(logits), given_rows, strict=True):
        where = f"{name}, {row.size} {dtype}"
        check_packed(values, row, where=where, half_ids=dtype != mx.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", VOCABULARIES)
def test_rows_as_long_as_vocabularies_agree_with_float64(size: int, dtype: mx.Dtype) -> None:
    check(random_rows(size) | edge_rows(size), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_short_length_agree_with_float64(dtype: mx.Dtype) -> None:
    for size in [*range(1, 18), 31, 32, 33, 34, 47, 48, 49, 63, 64, 65, 129, 1025, 4097]:
        check(random_rows(size) | edge_rows(size), dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_compiled_kernel_gives_the_same_bits(compilation: None, dtype: mx.Dtype) -> None:
    size = VOCABULARIES[0]
    rows = np.stack(list((random_rows(size) | edge_rows(size)).values())).astype(np.float32)
    logits = mx.array(rows).astype(dtype)
    plain = graph_kernel._pack(logits)
    assert mx.array_equal(pack_signals(logits), plain, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 3000),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 200.0]),
)
def test_any_row_agrees_with_float64(seed: int, size: int, scale: float) -> None:
    row = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    (values,) = packed(mx.array(row)[None])
    check_packed(values, row, where="random")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
def test_in_half_precision_the_greedy_choice_is_mlx_lms(dtype: mx.Dtype, scale: float) -> None:
    # Flat rows: rounding the logprob makes ties that the logits do not have.
    random = np.random.default_rng(3)
    logits = mx.array(random.standard_normal((40, 300)) * scale).astype(dtype)
    winners = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    tied = mx.sum(winners == mx.max(winners, axis=-1, keepdims=True), axis=-1)
    choices = mx.argmax(winners, axis=-1)
    compared = 0
    for values, expected, ties in zip(packed(logits), choices, tied, strict=True):
        if int(cast(Any, ties.item())) <= 8:
            compared += 1
            assert int(values[0]) == expected.item()
    assert compared >= (3 if scale == 0.02 else 30)


def test_masked_out_tokens_add_nothing_to_the_entropy() -> None:
    (values,) = packed(mx.array([[0.0, -math.inf, 0.0, -math.inf]]))
    signals = unpack_signals(values)
    assert signals.entropy_nats == pytest.approx(math.log(2))
    assert signals.margin == pytest.approx(0.0)
    assert signals.flags == 0


def test_infinite_logits_share_the_probability() -> None:
    (values,) = packed(mx.array([[1.0, math.inf, 2.0, math.inf]]))
    signals = unpack_signals(values)
    assert signals.entropy_nats == pytest.approx(math.log(2))
    assert signals.top_ids == (1, 3, 2, 0)
    assert signals.top_logprobs == pytest.approx((-math.log(2), -math.log(2), -math.inf, -math.inf))
    assert signals.flags == 2
