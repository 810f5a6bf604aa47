"""The Metal kernel, as MLX generates it, run on a CPU and compared with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from mlxroute.small.kernels import metal_kernel
from tests.metal.emulator import (
    BACKWARD,
    CLANG,
    FORWARD,
    GXX,
    RANDOM,
    EmulationError,
    Emulator,
    default_compiler,
)
from tests.support.rows import VOCABULARIES, Row, check_packed, edge_rows, random_rows

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
SCHEDULES = (FORWARD, BACKWARD, RANDOM)
# A row of this size is shared by two threadgroups.
SHARED = 8200

Packed = list[list[float]]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[mx.array], Packed]]:
    """Return a function that builds `pack_signals` on an emulator."""

    def build(emulator: Emulator) -> Callable[[mx.array], Packed]:
        def pack(logits: mx.array) -> Packed:
            monkeypatch.setattr(metal_kernel, "build_kernel", emulator.kernel)
            return cast(Packed, metal_kernel.pack_signals(logits).tolist())

        return pack

    return build


def as_logits(rows: dict[str, Row], dtype: mx.Dtype) -> mx.array:
    return mx.array(np.stack(list(rows.values())).astype(np.float32)).astype(dtype)


def check(
    pack: Callable[[mx.array], Packed], rows: dict[str, Row], dtype: mx.Dtype, *, alone: bool
) -> None:
    """Check all rows in one call, or (`alone`) one row per call, shared by threadgroups."""
    logits = as_logits(rows, dtype)
    packed_rows = [pack(logits[i : i + 1])[0] for i in range(len(rows))] if alone else pack(logits)
    inputs = np.array(logits.astype(mx.float32))
    for name, values, row in zip(rows, packed_rows, inputs, strict=True):
        where = f"{name}, {row.size} {dtype}"
        check_packed(values, row, where=where, half_ids=dtype != mx.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_short_length_agree_with_float64(
    emulated: Callable[..., Callable[[mx.array], Packed]], dtype: mx.Dtype
) -> None:
    pack = emulated(Emulator())
    for size in [*range(1, 10), 16, 17, 31, 32, 33, 65, 257, 1025]:
        check(pack, random_rows(size) | edge_rows(size), dtype, alone=False)
    # MLX puts so few values into another address space.
    check(pack, edge_rows(3), dtype, alone=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_shared_by_threadgroups_agrees_with_float64(
    emulated: Callable[..., Callable[[mx.array], Packed]], dtype: mx.Dtype
) -> None:
    emulator = Emulator()
    check(emulated(emulator), random_rows(SHARED) | edge_rows(SHARED), dtype, alone=True)
    kernels = {text.split("mlxroute_signals_")[1].split("_")[0] for text in emulator.texts}
    assert kernels == {"share", "merge"}


def test_no_schedule_changes_a_bit(
    emulated: Callable[..., Callable[[mx.array], Packed]],
) -> None:
    logits = as_logits(random_rows(SHARED), mx.bfloat16)[:2]
    results = [emulated(Emulator(schedule=schedule))(logits) for schedule in SCHEDULES]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(("dtype", "scale"), [(mx.bfloat16, 0.6), (mx.float16, 0.1)])
def test_in_half_precision_the_greedy_choice_is_mlx_lms(
    emulated: Callable[..., Callable[[mx.array], Packed]], dtype: mx.Dtype, scale: float
) -> None:
    random = np.random.default_rng(5)
    logits = mx.array(random.standard_normal((30, 300)) * scale).astype(dtype)
    winners = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    choices = mx.argmax(winners, axis=-1).tolist()
    assert [int(values[0]) for values in emulated(Emulator())(logits)] == choices
    # The rounding matters: the largest logit alone would choose otherwise.
    assert mx.argmax(logits, axis=-1).tolist() != choices


def replaced(old: str, new: str) -> Callable[[str], str]:
    def mutate(text: str) -> str:
        assert old in text or "signals_merge" in text, old
        return text.replace(old, new)

    return mutate


MUTANTS = {
    "no barrier": replaced("threadgroup_barrier(mem_flags::mem_threadgroup);", ""),
    "no lane guard": replaced("if (lane < GROUPS) {", "{"),
    "return before the barrier": replaced(
        "threadgroup_barrier(mem", "if (group != 0u) return;\n  threadgroup_barrier(mem"
    ),
    "a SIMD function inside a branch": replaced(
        "rounded == best_rounded", "rounded == simd_shuffle(rounded, ushort(0))"
    ),
    "the last id wins a tie": replaced("id < than.id", "id > than.id"),
    "reads past the share": replaced("if (id < end) value", "if (id < size) value"),
    "no rescaling": replaced("moments = moved(moments, largest);", "moments.m = largest;"),
    "largest finite value not kept": replaced("metal::min(values[i], LARGEST)", "values[i]"),
    "NaN kept in the order": replaced(
        "values[i] = metal::isnan(value) ? -INFINITY : value;", "values[i] = value;"
    ),
    "rows at the wrong place": replaced("size_t(row) * size_t(size)", "size_t(row) * size_t(k)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(
    emulated: Callable[..., Callable[[mx.array], Packed]], name: str
) -> None:
    rows = edge_rows(1100)
    # A mutant of a share shows only on a row that is shared.
    shared = {"best at the end": edge_rows(SHARED)["rising"][::-1]} if "share" in name else {}
    for schedule in (FORWARD, RANDOM):
        pack = emulated(Emulator(schedule=schedule, mutate=MUTANTS[name]))
        try:
            check(pack, shared or rows, mx.bfloat16, alone=bool(shared))
        except (EmulationError, AssertionError):
            return
    pytest.fail("no check failed")


def test_the_sources_are_ascii_and_of_one_precision() -> None:
    for text in (
        metal_kernel._FUNCTIONS,
        *(source for _, _, source in metal_kernel._KERNELS.values()),
    ):
        assert text.isascii()
        assert "double" not in text


def test_a_compiler_is_always_there() -> None:
    assert default_compiler() in (GXX, CLANG)


@pytest.mark.heavy
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("compiler", [GXX, CLANG], ids=["g++", "clang"])
@pytest.mark.parametrize("size", VOCABULARIES)
def test_rows_as_long_as_vocabularies_agree_with_float64(
    emulated: Callable[..., Callable[[mx.array], Packed]],
    size: int,
    compiler: Sequence[str],
    schedule: int,
) -> None:
    pack = emulated(Emulator(compiler=compiler, schedule=schedule))
    rows = random_rows(size) | edge_rows(size)
    if schedule != FORWARD:
        # Every value of it enters the top list, which is slow; one schedule is enough.
        del rows["rising"]
    for dtype in DTYPES:
        check(pack, rows, dtype, alone=True)


@pytest.mark.heavy
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("flags", [(), ("-fsanitize=undefined", "-fno-sanitize-recover=all")])
def test_short_rows_hold_under_every_compiler_and_sanitizer(
    emulated: Callable[..., Callable[[mx.array], Packed]], flags: Sequence[str], schedule: int
) -> None:
    compiler = GXX if flags else CLANG
    pack = emulated(Emulator(compiler=compiler, flags=flags, schedule=schedule))
    for dtype in DTYPES:
        for size in [*range(1, 71), 257, SHARED]:
            check(pack, random_rows(size) | edge_rows(size), dtype, alone=size < 9)
