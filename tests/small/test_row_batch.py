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
