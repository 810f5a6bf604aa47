"""Queued passes: they change nothing but speed, and leave no trace when discarded."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.backend.device_streams import end_device_streams
from mlxroute.backend.load import load
from mlxroute.errors import UsageError, WeightsError
from mlxroute.small import SmallModel
from mlxroute.small.kv_cache import SequenceCache
from mlxroute.small.mlp_head import SIGNAL_COUNT, MlpHead
from mlxroute.types import Sampling, Signals
from tests.support.tiny import final_hidden_state, make_tiny_model

PROMPT = list(range(5, 25))
HIDDEN = 64


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def loaded(path: Path) -> tuple[Any, Any]:
    return load(path)


@pytest.fixture
def small(loaded: tuple[Any, Any]) -> SmallModel:
    return SmallModel(*loaded, name="tiny")


@contextlib.contextmanager
def no_queue() -> Iterator[None]:
    """Inside, no pass is queued."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceCache, "can_queue", False)
        yield


class Passes:
    """Counts forward passes of a model."""

    def __init__(self, small: SmallModel) -> None:
        self.count = 0
        model = small.decoder._model

        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return model(*args, **kwargs)

        small.decoder._model = call


Action = tuple[str, int]
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("own"), st.just(0)),
        st.tuples(st.just("other"), st.integers(1, 200)),
        st.tuples(st.just("several"), st.integers(2, 5)),
        st.tuples(st.just("back"), st.integers(0, 4)),
    ),
    max_size=8,
)


def play(small: SmallModel, actions: list[Action], sampling: Sampling) -> list[Signals]:
    """Return the signals along a script of commits and rollbacks."""
    history = [small.prefill(PROMPT, sampling=sampling)[0]]
    for action, number in actions:
        own = history[-1].token_id
        if action == "back":
            small.rollback(number)
            history.append(small.step(own))
        elif action == "several":
            history.append(small.extend([(own + i) % 300 for i in range(number)]))
        else:
            history.append(small.step((own + number) % 300))
    return history


@settings(max_examples=25, deadline=None)
@given(actions=ACTIONS, temperature=st.sampled_from([0.0, 0.9]))
def test_a_queued_pass_changes_no_signal_whatever_is_committed(
    loaded: tuple[Any, Any], actions: list[Action], temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, top_p=0.9 if temperature else 1.0, seed=11)
    queued = play(SmallModel(*loaded, name="a"), actions, sampling)
    with no_queue():
        unqueued = play(SmallModel(*loaded, name="b"), actions, sampling)
    assert queued == unqueued


def test_the_next_pass_is_queued_before_its_token_is_committed(small: SmallModel) -> None:
    signals, _ = small.prefill(PROMPT)
    passes = Passes(small)
    for _ in range(6):
        signals = small.step(signals.token_id)
    assert passes.count == 6
    small.step((signals.token_id + 1) % 300)
    # The queued pass was for another token: this token's own pass, and the one queued after it.
    assert passes.count == 8


def test_a_queued_token_is_not_part_of_the_context(small: SmallModel) -> None:
    signals, _ = small.prefill(PROMPT)
    small.step(signals.token_id)
    assert list(small.cached_ids) == [*PROMPT, signals.token_id]
    again = [*PROMPT, signals.token_id, 7, 8]
    assert small.prefill(again)[1] == len(PROMPT) + 1


def test_nothing_is_queued_on_a_sliding_window_that_cannot_be_trimmed(small: SmallModel) -> None:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import RotatingKVCache

    def windows() -> list[Any]:
        return [RotatingKVCache(max_size=32, keep=4) for _ in small.model.layers]

    small.decoder.cache.layers = windows()
    passes = Passes(small)
    ids = [small.prefill(PROMPT)[0].token_id]
    while len(ids) < 30:
        ids.append(small.step(ids[-1]).token_id)
    # The prompt and 30 steps: none is queued.
    assert passes.count == 31
    expected = generate_step(mx.array(PROMPT), small.model, max_tokens=30, prompt_cache=windows())
    assert ids == [int(token) for token, _ in expected]


class Syncs:
    """Counts the calls that make the host wait for the device."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("eval", "synchronize"):
            patch.setattr(mx, name, self._counted(getattr(mx, name)))
        for name in ("item", "tolist", "__array__", "__bool__", "__int__", "__float__"):
            patch.setattr(mx.array, name, self._counted(getattr(mx.array, name)))

    def _counted(self, plain: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return plain(*args, **kwargs)

        return call


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("with_head", [False, True])
def test_a_token_costs_one_synchronisation(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch, temperature: float, with_head: bool
) -> None:
    small.set_head(random_head() if with_head else None)
    signals, _ = small.prefill(PROMPT, sampling=Sampling(temperature=temperature, seed=1))
    syncs = Syncs(monkeypatch)
    for index in range(10):
        # Every third token differs from the model's own.
        signals = small.step((signals.token_id + (index % 3 == 2)) % 300)
    assert syncs.count == 10


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=1)])
def test_another_thread_may_continue_an_answer(small: SmallModel, sampling: Sampling) -> None:
    alone = play(small, [("own", 0)] * 8, sampling)
    history = [small.prefill(PROMPT, sampling=sampling)[0]]

    def continue_answer() -> None:
        history.append(small.step(history[-1].token_id))

    for index in range(8):
        if index % 2:
            continue_answer()
        else:
            thread = threading.Thread(target=continue_answer)
            thread.start()
            thread.join()
    assert history == alone


def random_head() -> MlpHead:
    mx.random.seed(5)
    sizes = (HIDDEN + SIGNAL_COUNT, 16, 1)
    shapes = list(zip(sizes[1:], sizes[:-1], strict=True))
    layers = tuple((mx.random.normal(shape), mx.zeros(shape[0])) for shape in shapes)
    mx.eval(layers)  # As those of a file are, so that any thread may use them.
    return MlpHead(layers)


def test_a_heads_score_is_computed_from_the_hidden_state_and_the_signals(
    small: SmallModel,
) -> None:
    head = random_head()
    small.set_head(head)
    signals, _ = small.prefill(PROMPT)
    for _ in range(3):
        features = [signals.entropy_nats, signals.varentropy, signals.top_logprobs[0]]
        hidden = np.array(final_hidden_state(small, small.cached_ids))
        values = np.concatenate([hidden, [*features, signals.margin]])
        for index, (weight, bias) in enumerate(head.layers):
            values = values if index == 0 else np.maximum(values, 0)
            values = np.array(weight) @ values + np.array(bias)
        assert signals.head_score == pytest.approx(values[0], rel=1e-3, abs=1e-3)
        signals = small.step(signals.token_id)
    small.set_head(None)
    assert small.step(signals.token_id).head_score is None


def test_copies_in_two_threads_score_their_own_text(small: SmallModel) -> None:
    small.set_head(random_head())
    expected, _ = small.with_own_cache().prefill(PROMPT)
    other = small.with_own_cache()
    model = small.decoder._model

    def read_other_prompt() -> None:
        other.prefill(list(range(40, 60)))
        end_device_streams()

    def call(*args: Any, **kwargs: Any) -> Any:
        logits = model(*args, **kwargs)
        thread = threading.Thread(target=read_other_prompt)
        thread.start()
        thread.join()
        return logits

    small.decoder._model = call
    assert small.prefill(PROMPT)[0] == expected


def test_two_threads_decode_side_by_side(small: SmallModel) -> None:
    small.set_head(random_head())
    prompts = (PROMPT, list(range(40, 60)))
    sampling = Sampling(temperature=1.0, seed=5)

    def write(ids: list[int]) -> list[tuple[int, float | None]]:
        own = small.with_own_cache()
        signals, _ = own.prefill(ids, sampling=sampling)
        written = []
        for _ in range(30):
            written.append((signals.token_id, signals.head_score))
            signals = own.step(signals.token_id)
        return written

    def write_in_thread(number: int) -> None:
        start.wait()
        results[number] = write(prompts[number])
        end_device_streams()

    start = threading.Barrier(len(prompts))
    results: dict[int, list[tuple[int, float | None]]] = {}
    threads = [threading.Thread(target=write_in_thread, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: write(ids) for n, ids in enumerate(prompts)}


def test_setting_a_head_in_the_middle_changes_no_token(small: SmallModel) -> None:
    plain = play(small, [("own", 0)] * 4, Sampling())
    signals, _ = small.prefill(PROMPT)
    signals = small.step(signals.token_id)
    small.set_head(random_head())
    rest = [small.step(signals.token_id)]
    rest.append(small.step(rest[-1].token_id))
    assert [s.token_id for s in rest] == [s.token_id for s in plain[2:4]]


def test_a_head_is_read_from_its_file(tmp_path: Path) -> None:
    head = random_head()
    file = tmp_path / "head.safetensors"
    arrays: dict[str, mx.array] = {}
    for index, (weight, bias) in enumerate(head.layers):
        arrays |= {f"{index}.weight": weight, f"{index}.bias": bias}
    mx.save_safetensors(str(file), arrays)
    read = MlpHead.load(file, hidden_size=HIDDEN)
    hidden, packed = mx.ones((1, HIDDEN)), mx.ones((1, 21))
    assert read(hidden, packed).item() == head(hidden, packed).item()
    with pytest.raises(WeightsError, match="from 36 values"):
        MlpHead.load(file, hidden_size=32)
    with pytest.raises(WeightsError, match="cannot be read"):
        MlpHead.load(tmp_path / "none.safetensors", hidden_size=HIDDEN)


def test_an_architecture_without_a_known_norm_refuses_a_head(small: SmallModel) -> None:
    inner = small.model
    small = SmallModel(_Wrapped(inner), small.tokenizer, name="odd")
    with pytest.raises(UsageError, match="final hidden state"):
        small.set_head(random_head())
    with pytest.raises(UsageError, match="final hidden state"):
        small.score_text(PROMPT, [70])


class _Wrapped(nn.Module):  # type: ignore[misc]
    """A model whose parts have other names."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.core = inner
        self.layers = inner.layers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.core(*args, **kwargs)
