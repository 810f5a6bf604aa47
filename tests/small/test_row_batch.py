"""Rows of a batch: each computes what it would compute alone, whatever the others do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxroute.backend.load import load
from mlxroute.errors import RollbackError
from mlxroute.small import SmallModel
from mlxroute.small.row_batch import BatchRow, RowBatch
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
    max_size=16,
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

    def join(number: int) -> None:
        ids = _ids((5, 40, 255, _LONG)[number % 4], number)
        own = small.with_own_cache()
        own.prefill(ids)
        layers, _ = own.decoder.take_cache()
        rows[batch.join(layers, len(ids))] = ids

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
            _check(small, [*ids, 9], signals.entropy_nats)
        elif action == "trim":
            _trim(batch, row, rows[row], 1 + number % 3)
        elif action == "step":
            some = {row: 5 + (number + i) % 250 for i, row in enumerate(rows) if number >> i & 1}
            for row, signals in (batch.step(some) if some else {}).items():
                rows[row].append(some[row])
                _check(small, rows[row], signals.entropy_nats)
    assert len(batch) == len(rows)
    for row in list(rows):
        batch.leave(row)
    assert batch.size_bytes == 0


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
