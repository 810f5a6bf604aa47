"""Rows of a batch: each computes what it would compute alone, whatever the others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxroute.backend.load import load
from mlxroute.errors import RollbackError, UsageError
from mlxroute.small import SmallModel
from mlxroute.small.decoder import Decoder
from mlxroute.small.row_batch import BatchRow, RowBatch
from mlxroute.small.sampled_continuations import SampleStart, sample_continuations
from mlxroute.types import Signals
from tests.support.tiny import make_tiny_model

_MAX_ROWS = 5
# Longer than the step by which the buffers grow.
_LONG = 300


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    path: Path = make_tiny_model(tmp_path_factory.mktemp("rows") / "tiny", context=1024)
    return SmallModel(*load(path), name="tiny")


def _ids(count: int, first: int) -> list[int]:
    return [5 + (first + 7 * i) % 250 for i in range(count)]


_ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["join", "leave", "trim", "step", "step", "step"]), st.integers(0, 10**6)
    ),
    min_size=4,
    max_size=10,
)


@settings(max_examples=25)
# The last cut asks for more tokens than there are.
@example(actions=[("trim", 0)] * 3 + [("trim", 404), ("step", 1), ("leave", 0)])
@given(actions=_ACTIONS)
def test_rows_join_pause_are_cut_and_leave_without_changing_others(
    small: SmallModel, actions: list[tuple[str, int]]
) -> None:
    batch = small.decoder.start_rows()
    alone = small.with_own_cache()
    rows: dict[BatchRow, list[int]] = {}
    # One that follows each row, so that a check computes only what is new.
    followers: dict[BatchRow, SmallModel] = {}

    def join(number: int) -> None:
        ids = _ids((5, 40, 255, _LONG)[number % 4], number)
        row = _join(small, batch, ids)
        rows[row], followers[row] = ids, small.with_own_cache()

    join(0)
    for action, number in actions:
        if action == "join" and len(rows) < _MAX_ROWS:
            join(number)
        if not rows:
            continue
        row = sorted(rows, key=lambda row: row.index)[number % len(rows)]
        if action == "leave":
            ids = rows.pop(row)
            alone.decoder.load_cache(batch.leave(row), ids)
            signals = alone.extend([9])
            _check(followers[row], [*ids, 9], signals.entropy_nats)
        elif action == "trim":
            _trim(batch, row, rows[row], 1 + number % 3)
        elif action == "step":
            some = {row: 5 + (number + i) % 250 for i, row in enumerate(rows) if number >> i & 1}
            for row, signals in (batch.step(some) if some else {}).items():
                rows[row].append(some[row])
                _check(followers[row], rows[row], signals.entropy_nats)
    assert len(batch) == len(rows)
    for row in list(rows):
        batch.leave(row)
    assert batch.size_bytes == 0


# Models that compute with one length for all rows of a batch.
_ONE_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic RoPE": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "gpt_bigcode": (
        "gpt_bigcode",
        {
            **{"n_embd": 64, "n_layer": 2, "n_inner": 128, "n_head": 4, "n_positions": 512},
            **{"layer_norm_epsilon": 1e-6, "num_key_value_heads": None},
        },
    ),
}


@pytest.mark.parametrize("kind", _ONE_LENGTH)
def test_a_model_that_has_one_length_for_all_rows_is_not_batched(kind: str, tmp_path: Path) -> None:
    model_type, extra = _ONE_LENGTH[kind]
    path = make_tiny_model(tmp_path / "m", model_type=model_type, extra=extra)
    small = SmallModel(*load(path), name=kind)
    first, copy = small.prefill_copy([5, 6, 7])
    assert not small.decoder.start_rows().has_room(copy, 4)
    with pytest.raises(UsageError, match="cannot be decoded in a batch"):
        small.continue_greedily([(copy, first.token_id)] * 2, max_tokens=[2, 2])
    start = SampleStart(copy, 3, first.token_id, 2, "s", lambda ids: False)
    with pytest.raises(UsageError, match="cannot be decoded in a batch"):
        sample_continuations(small.decoder, [start], count=2, eos_ids=frozenset())
    # Branches have the same length.
    for ids, signals in zip(([8, 10], [9, 11]), _branch_twice(small), strict=True):
        alone, _ = small.with_own_cache().prefill([5, 6, 7, *ids])
        assert signals.entropy_nats == pytest.approx(alone.entropy_nats, abs=1e-4)


def _branch_twice(small: SmallModel) -> list[Signals]:
    small.branch([0, 0], [8, 9])
    return small.branch([0, 1], [10, 11])


def test_whether_a_model_can_be_batched_is_found_out_once(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = SmallModel(small.model, small.tokenizer, name="own")
    _, copy = own.prefill_copy([5, 6, 7])
    passes: list[int] = []
    plain = Decoder._build_pass

    def count(self: Decoder, tokens: mx.array, layers: Any = None) -> Any:
        passes.append(len(tokens))
        return plain(self, tokens, layers)

    monkeypatch.setattr(Decoder, "_build_pass", count)
    for decoder in (own.decoder, own.with_own_cache().decoder):
        assert decoder.start_rows().has_room(copy, 4)
    assert passes == [2]


def _join(small: SmallModel, batch: RowBatch, ids: list[int]) -> BatchRow:
    own = small.with_own_cache()
    own.prefill(ids)
    layers, _ = own.decoder.take_cache()
    return batch.join(layers, len(ids))


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_row_does_not_read_what_another_left_in_its_place(
    small: SmallModel, is_moved: bool
) -> None:
    batch = small.decoder.start_rows()
    own = small.with_own_cache()
    own.prefill(_ids(40, 2))
    layers, _ = own.decoder.take_cache()
    for layer in layers:
        layer.values = mx.full(layer.values.shape, float("nan"), layer.values.dtype)
    long, short = _ids(60, 0), _ids(20, 1)
    before, between, after = ([], [short], [long]) if is_moved else ([long], [], [short])
    rows = {_join(small, batch, ids): ids for ids in before}
    bad = batch.join(layers, 40)
    rows |= {_join(small, batch, ids): ids for ids in between}
    batch.drop(bad)
    rows |= {_join(small, batch, ids): ids for ids in after}
    # The long row makes the step wider than the short one, whose place was the bad one's.
    for row, signals in batch.step(dict.fromkeys(rows, 9)).items():
        _check(small, [*rows[row], 9], signals.entropy_nats)


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_row_that_cannot_join_leaves_nothing_behind(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    batch = small.decoder.start_rows()
    all_ids = [_ids(20, number) for number in range(others)]
    rows = [_join(small, batch, ids) for ids in all_ids]
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_evaluate", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            _join(small, batch, _ids(30, 9))
    assert len(batch) == others
    for row, ids in zip(rows, all_ids, strict=True):
        _check(small, [*ids, 9], batch.step({row: 9})[row].entropy_nats)
    for row in rows:
        batch.leave(row)
    assert batch.size_bytes == len(batch) == 0


def test_a_row_that_cannot_leave_is_not_taken_for_another(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("no memory")

    batch = small.decoder.start_rows()
    first, second = (_join(small, batch, _ids(20, number)) for number in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_evaluate", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            batch.leave(first)
    with pytest.raises(RollbackError, match="does not hold this row"):
        batch.leave(first)
    _check(small, [*_ids(20, 1), 9], batch.step({second: 9})[second].entropy_nats)


def _fits(small: SmallModel, batch: RowBatch, length: int) -> bool:
    own = small.with_own_cache()
    own.prefill(_ids(length, 0))
    return batch.has_room(own.decoder.cache.layers, length)


def test_rows_join_while_the_buffers_stay_within_their_memory(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = small.decoder.start_rows()
    row = _join(small, batch, _ids(20, 0))
    row_bytes = batch.size_bytes // 2
    monkeypatch.setattr("mlxroute.small.row_batch._MAX_BYTES", 7 * row_bytes)
    rows = [row]
    while _fits(small, batch, 20):
        rows.append(_join(small, batch, _ids(20, len(rows))))
    # A fifth row would double the buffers to eight.
    assert len(rows) == 4
    assert batch.size_bytes == 4 * row_bytes
    # Those of a long row are as wide as three of these; two of them fit.
    for row in rows[1:]:
        batch.leave(row)
    assert _fits(small, batch, 600)
    _join(small, batch, _ids(600, 1))
    assert batch.size_bytes == 6 * row_bytes
    assert not _fits(small, batch, 20)


def test_a_row_has_no_room_where_the_buffers_would_grow_past_their_memory(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = small.decoder.start_rows()
    long, short, other = (_join(small, batch, _ids(count, count)) for count in (255, 20, 21))
    row_bytes = batch.size_bytes // 4
    monkeypatch.setattr("mlxroute.small.row_batch._MAX_BYTES", 7 * row_bytes)
    assert batch.has_room_for_token(long)
    batch.step({long: 9, short: 9})
    assert not batch.has_room_for_token(long)
    assert batch.has_room_for_token(short)
    # With two rows there is room, once the buffers have no more rows than that.
    batch.leave(other)
    assert batch.has_room_for_token(long)
    signals = batch.step({long: 8})[long]
    _check(small, [*_ids(255, 255), 9, 8], signals.entropy_nats)
    assert batch.size_bytes == 4 * row_bytes


def _trim(batch: RowBatch, row: BatchRow, ids: list[int], count: int) -> None:
    """Remove the last `count` tokens of a row, which refuses if it has fewer."""
    if count > len(ids):
        with pytest.raises(RollbackError, match=f"cannot roll back {count} of {len(ids)}"):
            batch.trim(row, count)
        return
    batch.trim(row, count)
    del ids[-count:]


def _check(small: SmallModel, ids: list[int], entropy_nats: float) -> None:
    signals, _ = small.prefill(ids)
    assert entropy_nats == pytest.approx(signals.entropy_nats, abs=1e-4)
