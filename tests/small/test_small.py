"""The small model on random weights: equal to mlx_lm, and safe to interrupt."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from mlxroute.backend.device_streams import end_device_streams
from mlxroute.backend.load import load, memory_needed, on_cpu
from mlxroute.backend.model_config import LONGEST_CONTEXT
from mlxroute.engine import generate
from mlxroute.errors import RollbackError, UsageError, WeightsError
from mlxroute.routers import EntropyRouter
from mlxroute.small import SmallModel
from mlxroute.small.decoder import Decoder
from mlxroute.small.mlp_head import SIGNAL_COUNT
from mlxroute.small.row_sampler import RowSampler
from mlxroute.types import Sampling
from tests.support.tiny import make_tiny_model

PROMPTS = ["Hello there", "def f(x):\n\treturn x", "漢字 \U0001f600 café", "1 2 3 4 5"]
PROMPT_IDS = range(5, 25)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def small(path: Path) -> SmallModel:
    model, tokenizer = load(path)
    return SmallModel(model, tokenizer, name="tiny")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def reference_ids(small: SmallModel, prompt_ids: list[int], count: int, **kwargs: Any) -> list[int]:
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt_ids), small.model, max_tokens=count, **kwargs)
    return [int(token) for token, _ in steps]


def decode(small: SmallModel, prompt_ids: list[int], count: int, **kwargs: Any) -> list[int]:
    signals, _ = small.prefill(prompt_ids, sampling=Sampling(**kwargs))
    ids = [signals.token_id]
    while len(ids) < count:
        ids.append(small.step(ids[-1]).token_id)
    return ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_decoding_equals_mlx_lm_token_for_token(small: SmallModel, prompt: str) -> None:
    prompt_ids = list(small.encode_conversation(ask(prompt)).ids)
    assert decode(small, prompt_ids, 16) == reference_ids(small, prompt_ids, 16)


@pytest.mark.parametrize(
    "filters", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.3}, {"top_p": 0.9, "top_k": 40}]
)
def test_seeded_sampling_equals_mlx_lm_token_for_token(
    small: SmallModel, filters: dict[str, Any]
) -> None:
    from mlx_lm.sample_utils import make_sampler

    prompt_ids = list(small.vocabulary.encode("once upon a time"))
    sampled = decode(small, prompt_ids, 16, temperature=0.8, seed=7, **filters)
    mx.random.seed(7)
    expected = reference_ids(small, prompt_ids, 16, sampler=make_sampler(0.8, **filters))
    assert sampled == expected
    assert sampled != decode(small, prompt_ids, 16, temperature=0.8, seed=8, **filters)


def test_a_top_k_beyond_the_vocabulary_sets_no_limit(small: SmallModel) -> None:
    unlimited = decode(small, list(PROMPT_IDS), 8, temperature=1.0, seed=7)
    for top_k in (0, 10**9):
        assert decode(small, list(PROMPT_IDS), 8, temperature=1.0, top_k=top_k, seed=7) == unlimited


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"min_p": 1.0}])
def test_a_filter_that_keeps_one_token_is_greedy(
    small: SmallModel, filters: dict[str, Any]
) -> None:
    greedy = decode(small, list(PROMPT_IDS), 8)
    assert decode(small, list(PROMPT_IDS), 8, temperature=1.5, seed=7, **filters) == greedy


@pytest.mark.parametrize("seed", [None, 7])
def test_sampling_leaves_mlxs_own_random_state(small: SmallModel, seed: int | None) -> None:
    mx.random.seed(3)
    expected = mx.random.uniform().item()
    mx.random.seed(3)
    decode(small, list(PROMPT_IDS), 8, temperature=1.0, seed=seed)
    assert mx.random.uniform().item() == expected


def test_draws_of_another_answer_do_not_change_those_of_a_seeded_one(small: SmallModel) -> None:
    alone = decode(small, list(PROMPT_IDS), 8, temperature=1.0, seed=7)
    other = small.with_own_cache()
    unseeded, _ = other.prefill(PROMPT_IDS, sampling=Sampling(temperature=1.0))
    signals, _ = small.prefill(PROMPT_IDS, sampling=Sampling(temperature=1.0, seed=7))
    seeded = [signals.token_id]
    for _ in range(7):
        unseeded = other.step(unseeded.token_id)
        seeded.append(small.step(seeded[-1]).token_id)
    assert seeded == alone


def test_without_a_seed_answers_differ_also_in_new_threads(small: SmallModel) -> None:
    answers: list[list[int]] = []

    def write() -> None:
        answers.append(decode(small, list(PROMPT_IDS), 16, temperature=1.0))
        end_device_streams()

    for _ in range(3):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert len({tuple(ids) for ids in answers}) == 3


def test_what_is_to_be_evaluated_does_not_grow_with_seeded_draws() -> None:
    sampler = RowSampler(Sampling(temperature=1.0, seed=7))
    state: Any = mx.random.state
    mx.random.seed(3)
    mx.eval(state)
    for length in range(50):
        mx.eval(sampler.draw(mx.zeros((1, 9)), length=length))
    graph = io.StringIO()
    mx.export_to_dot(graph, state[0])
    assert "shape=rectangle" not in graph.getvalue()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_below_a_thousandth_sampling_is_greedy(small: SmallModel, dtype: mx.Dtype) -> None:
    small.model.set_dtype(dtype)
    prompt_ids = list(small.vocabulary.encode("once upon a time"))
    greedy = decode(small, prompt_ids, 10)
    for temperature in (1e-320, 1e-40, 1e-6, 0.000999):
        drawn = decode(small, prompt_ids, 10, temperature=temperature, seed=7)
        assert drawn == greedy, temperature


def test_below_a_top_p_of_a_thousandth_sampling_is_greedy(small: SmallModel) -> None:
    prompt_ids = list(small.vocabulary.encode("once upon a time"))
    greedy = decode(small, prompt_ids, 10)
    for top_p in (1e-320, 1e-40, 1e-8, 0.000999):
        drawn = decode(small, prompt_ids, 10, temperature=1.0, top_p=top_p, seed=7)
        assert drawn == greedy, top_p


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_lowest_temperature_that_samples_draws_likely_tokens(
    small: SmallModel, dtype: mx.Dtype
) -> None:
    small.model.set_dtype(dtype)
    signals, _ = small.prefill(
        small.vocabulary.encode("once upon a time"), sampling=Sampling(temperature=0.001, seed=7)
    )
    for _ in range(10):
        assert signals.logprob > signals.top_logprobs[0] - 0.05
        signals = small.step(signals.token_id)


def test_the_start_of_a_batch_is_computed_as_the_start_of_an_answer(small: SmallModel) -> None:
    prompt_ids = list(PROMPT_IDS)
    expected, _ = small.prefill(prompt_ids)
    small.reset_cache()
    signals, layers = small.prefill_copy(prompt_ids)
    assert signals == expected
    assert layers[0].offset == len(prompt_ids)
    with pytest.raises(UsageError, match="empty"):
        small.prefill_copy([])


def test_the_logits_of_one_position_are_computed_to_start_a_batch(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    plain = Decoder._build_pass

    def record(self: Decoder, tokens: mx.array, layers: Any = None) -> Any:
        lengths.append(tokens.shape[1])
        return plain(self, tokens, layers)

    monkeypatch.setattr(Decoder, "_build_pass", record)
    small.prefill_copy(list(PROMPT_IDS))
    assert lengths == [1]


def test_a_second_turn_prefills_only_what_is_new(small: SmallModel) -> None:
    first = list(small.vocabulary.encode("a" * 100))
    decode(small, first, 5)
    second = [*small.cached_ids, *list(small.vocabulary.encode(" and more"))]
    _, reused = small.prefill(second)
    assert reused == len(first) + 4
    signals, _ = small.prefill(second)
    fresh = SmallModel(small.model, small.tokenizer, name="fresh")
    expected, _ = fresh.prefill(second)
    assert signals.token_id == expected.token_id
    assert math.isclose(signals.entropy_nats, expected.entropy_nats, abs_tol=1e-4)


def test_the_same_prompt_again_keeps_one_token_to_seed_decoding(small: SmallModel) -> None:
    prompt_ids = list(small.vocabulary.encode("same again"))
    first, _ = small.prefill(prompt_ids)
    again, reused = small.prefill(prompt_ids)
    assert reused == len(prompt_ids) - 1
    assert again.token_id == first.token_id


def test_rollback_forgets_exactly_that_many_tokens(small: SmallModel) -> None:
    prompt_ids = list(small.vocabulary.encode("roll me back"))
    ids = decode(small, prompt_ids, 10)
    small.rollback(4)
    assert list(small.cached_ids) == [*prompt_ids, *ids[:5]]
    assert small.step(ids[5]).token_id == ids[6]


def test_rolling_back_more_than_there_is_raises(small: SmallModel) -> None:
    small.prefill([5, 6, 7])
    with pytest.raises(RollbackError):
        small.rollback(4)


def test_a_layer_that_cannot_be_trimmed_is_an_error(small: SmallModel) -> None:
    small.prefill([5, 6, 7])
    small.decoder.cache.layers[0].trim = lambda count: 0
    with pytest.raises(RollbackError, match="cannot roll back"):
        small.rollback(1)


def interrupted(*arguments: object, **options: object) -> Any:
    raise KeyboardInterrupt


def test_an_interrupt_while_waiting_for_the_device_costs_nothing(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_ids = list(small.vocabulary.encode("interrupt me in the middle of it"))
    ids = decode(small, prompt_ids, 6)
    with monkeypatch.context() as patch:
        patch.setattr("mlxroute.small.decoder.unpack_signals", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.step(ids[5])
    more = [*prompt_ids, *ids, 7]
    assert_same_as_fresh(small, more, reused=len(prompt_ids) + 6)


def test_a_failure_of_the_device_empties_the_cache(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(array: mx.array) -> None:
        raise RuntimeError("out of memory")

    prompt_ids = list(small.vocabulary.encode("fail in the middle of it"))
    ids = decode(small, prompt_ids, 6)
    with monkeypatch.context() as patch:
        patch.setattr("mlxroute.small.decoder._evaluate_later", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            small.step(ids[5])
    assert_same_as_fresh(small, [*prompt_ids, *ids, 7], reused=0)


def test_an_interrupt_inside_a_forward_pass_resets_the_cache(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_ids = list(small.vocabulary.encode("interrupt me in the middle of it"))
    ids = decode(small, prompt_ids, 6)
    with monkeypatch.context() as patch:
        # The first layer holds the token, the second does not.
        patch.setattr(small.decoder.cache.layers[1], "update_and_fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.step(ids[5])
    with pytest.raises(RollbackError, match="interrupted"):
        small.rollback(1)
    assert_same_as_fresh(small, [*prompt_ids, *ids, 7], reused=0)


def reject_a_queued_token(small: SmallModel) -> None:
    small.step(7)
    small.step(8)


def roll_back(small: SmallModel) -> None:
    small.rollback(3)


def select_a_row(small: SmallModel) -> None:
    small.branch([0, 0], [7, 8])
    small.select(1)


def begin_a_prompt(small: SmallModel) -> None:
    small.prefill([*small.cached_ids[:-4], 9, 10])


@pytest.mark.parametrize("change", [reject_a_queued_token, roll_back, select_a_row, begin_a_prompt])
def test_an_interrupt_anywhere_in_a_change_of_the_cache_leaves_no_wrong_prefix(
    path: Path, change: Callable[[SmallModel], None]
) -> None:
    small = _shared(path)
    prompt_ids = list(range(5, 13))
    more = [*prompt_ids, 7, 8, 9]
    for line in range(1000):
        small.prefill(prompt_ids)
        was_interrupted = interrupt_at(line, lambda: change(small))
        # What the cache says that it holds, it has to hold.
        following = [*small.cached_ids, *more]
        if small.decoder.begin(following, Sampling()):
            assert_same_as_fresh(small, following)
        if not was_interrupted:
            break
    assert 10 < line < 999


def interrupt_at(line: int, function: Callable[[], None]) -> bool:
    """Call a function with an interrupt before a line of the KV cache; return whether it came."""
    remaining = line

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal remaining
        code = frame.f_code
        if "trim" not in code.co_name and not code.co_filename.endswith("small/kv_cache.py"):
            return None
        if event == "line":
            remaining -= 1
            if remaining < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def assert_same_as_fresh(
    small: SmallModel, prompt_ids: list[int], *, reused: int | None = None
) -> None:
    signals, count = small.prefill(prompt_ids)
    assert reused is None or count == reused
    small.rollback(0)
    assert {layer.offset for layer in small.decoder.cache.layers} == {len(prompt_ids)}
    expected = _FRESH.get(key := tuple(prompt_ids))
    if expected is None:
        fresh = SmallModel(small.model, small.tokenizer, name="fresh")
        expected = _FRESH[key] = fresh.prefill(prompt_ids)[0].entropy_nats
    assert math.isclose(signals.entropy_nats, expected, abs_tol=1e-4)


# Entropies after prompts that an empty cache read; the interrupts leave the same ones many times.
_FRESH: dict[tuple[int, ...], float] = {}


def test_a_cache_without_offsets_is_reused_when_a_prompt_extends_it(small: SmallModel) -> None:
    from mlx_lm.models.cache import CacheList

    small.prefill([5, 6, 7])
    small.decoder.cache.layers = [CacheList(layer) for layer in small.decoder.cache.layers]
    assert small.decoder.cache.keep_common_prefix([5, 6, 7, 8, 9]) == 3


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_prompt_starts_from_its_own_prefix_whatever_was_decoded_before(
    path: Path, data: st.DataObject
) -> None:
    small = _shared(path)
    prompts = st.lists(st.integers(3, 40), min_size=2, max_size=24)
    for prompt_ids in data.draw(st.lists(prompts, min_size=1, max_size=4)):
        signals, reused = small.prefill(prompt_ids)
        assert 0 <= reused < len(prompt_ids)
        assert list(small.cached_ids) == prompt_ids
        fresh = SmallModel(small.model, small.tokenizer, name="fresh")
        expected, _ = fresh.prefill(prompt_ids)
        assert math.isclose(signals.entropy_nats, expected.entropy_nats, abs_tol=1e-4)


_MODELS: dict[Path, SmallModel] = {}


def _shared(path: Path) -> SmallModel:
    if path not in _MODELS:
        model, tokenizer = load(path)
        _MODELS[path] = SmallModel(model, tokenizer, name="tiny")
    return _MODELS[path]


def test_the_hidden_state_is_what_the_output_layer_saw(small: SmallModel) -> None:
    prompt_ids = list(small.vocabulary.encode("hidden"))
    hidden = small.score_text(prompt_ids, [70, 71, 72]).hidden
    logits = small.model.model.embed_tokens.as_linear(hidden)
    expected = small.model(mx.array([[*prompt_ids, 70, 71]]))[0, -3:]
    assert hidden.shape == (3, 64)
    assert mx.allclose(logits, expected, atol=1e-3).item()


def test_prefill_reports_progress_in_chunks(
    small: SmallModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxroute.small.model.PREFILL_STEP_SIZE", 10)
    reports: list[tuple[int, int | None]] = []
    signals, _ = small.prefill(
        list(range(3, 34)), progress=lambda label, done, total: reports.append((done, total))
    )
    assert reports == [(0, 31), (10, 31), (20, 31), (30, 31), (31, 31)]
    assert [signals.token_id] == reference_ids(small, list(range(3, 34)), 1, prefill_step_size=10)


_LLAMA4 = {
    **{"model_type": "llama4_text", "hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128},
    **{"intermediate_size_mlp": 128, "attention_bias": False, "attention_chunk_size": 64},
    **{"interleave_moe_layer_step": 2, "num_experts_per_tok": 1, "num_local_experts": 2},
    **{"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e4, "use_qk_norm": False},
    **{"vocab_size": 320, "max_position_embeddings": 77},
}
# The configuration of gemma has the key, but its arguments do not.
_CONTEXTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 77},
    "gemma": {"head_dim": 16, "max_position_embeddings": 77},
    "gpt2": {
        **{"n_positions": 77, "n_ctx": 77, "n_embd": 64, "n_head": 4, "n_layer": 1},
        **{"layer_norm_epsilon": 1e-5, "max_position_embeddings": None},
    },
    "llama4": {"text_config": _LLAMA4, "max_position_embeddings": None},
}


@pytest.mark.parametrize("model_type", _CONTEXTS)
def test_the_context_length_comes_from_the_model(model_type: str, tmp_path: Path) -> None:
    extra = _CONTEXTS[model_type]
    path = make_tiny_model(tmp_path / "m", model_type=model_type, extra=extra)
    assert SmallModel(*load(path), name="m").context_length == 77


@pytest.mark.parametrize("model_type", sorted(_CONTEXTS.keys() - {"gemma"}))
def test_the_context_length_of_a_model_that_mlx_lm_loaded(model_type: str, tmp_path: Path) -> None:
    extra = _CONTEXTS[model_type]
    path = make_tiny_model(tmp_path / "m", model_type=model_type, extra=extra)
    model, _ = load_model(path)
    assert SmallModel(model, load(path)[1], name="m").context_length == 77


_RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {
        **{"state_size": 16, "conv_kernel": 4, "time_step_rank": 4},
        **{"use_bias": False, "use_conv_bias": True},
    },
    # Its arguments in mlx_lm have a default of 2,056 positions.
    "mamba2": {
        **{"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "conv_kernel": 4},
        **{"layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True},
        **{"time_step_limit": [0.0, 100.0], "time_step_rank": 4},
    },
}


@pytest.mark.parametrize("model_type", _RECURRENT)
def test_a_recurrent_model_has_no_limit_but_the_one_it_names(
    model_type: str, tmp_path: Path
) -> None:
    extra = _RECURRENT[model_type]
    path = make_tiny_model(tmp_path / "m", model_type=model_type, context=77, extra=extra)
    assert SmallModel(*load(path), name="m").context_length == 77
    config = json.loads((path / "config.json").read_text())
    del config["max_position_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    assert SmallModel(*load(path), name="m").context_length == LONGEST_CONTEXT


def test_a_model_with_attention_that_names_no_limit_keeps_the_default(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", extra={"max_position_embeddings": None})
    assert SmallModel(*load(path), name="m").context_length == 4096


def test_a_head_fits_a_model_whose_text_part_has_the_hidden_size(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", model_type="llama4", extra=_CONTEXTS["llama4"])
    small = SmallModel(*load(path), name="m")
    head = {"0.weight": mx.zeros((1, 64 + SIGNAL_COUNT)), "0.bias": mx.zeros((1,))}
    mx.save_safetensors(str(tmp_path / "head.safetensors"), head)
    small.load_head(tmp_path / "head.safetensors")
    assert small.prefill([5, 6])[0].head_score == 0


@pytest.fixture
def chunked(tmp_path: Path) -> SmallModel:
    """A model whose layers keep the keys of a chunk of 64 tokens."""
    text: dict[str, Any] = {**_LLAMA4, "max_position_embeddings": 1024}
    extra = {"text_config": text, "max_position_embeddings": None}
    path = make_tiny_model(tmp_path / "m", model_type="llama4", extra=extra)
    return SmallModel(*load(path), name="m")


def test_a_prompt_that_shares_tokens_before_a_chunk_is_read_anew(chunked: SmallModel) -> None:
    ids = [3 + i * 7 % 200 for i in range(200)]
    chunked.prefill(ids)
    signals, reused = chunked.prefill([*ids[:10], *[7] * 20])
    assert reused == 0
    assert signals.token_id == chunked.prefill([*ids[:10], *[7] * 20])[0].token_id


def test_a_chunked_cache_rolls_back_only_while_it_has_all_tokens(chunked: SmallModel) -> None:
    chunked.prefill(list(range(3, 60)))
    assert chunked.can_rollback(6)
    assert not chunked.can_rollback(8)
    for token_id in range(60, 80):
        chunked.step(token_id)
    assert not chunked.can_rollback(1)


def test_never_escalating_through_the_engine_equals_mlx_lm(small: SmallModel) -> None:
    answer = generate(small, None, "Hi", router=EntropyRouter(math.inf), max_tokens=12)
    ids = [token.token_id for token in answer]
    prompt_ids = list(small.encode_conversation(ask("Hi")).ids)
    assert ids == reference_ids(small, prompt_ids, 12)[: len(ids)]


@pytest.mark.skipif(not on_cpu(), reason="Metal and CUDA run quantised weights as they are")
@pytest.mark.parametrize(
    "quantization",
    [
        {"group_size": 32, "bits": 4},
        {"group_size": 32, "bits": 6},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    ],
    ids=lambda quantization: f"{quantization.get('mode', 'affine')}-{quantization['bits']}",
)
def test_quantised_weights_become_dense_float32_on_a_cpu(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    path = _write_quantised(tmp_path / "q", quantization)
    model, _ = load(path)
    assert {str(value.dtype) for _, value in _flat(model)} == {"mlx.core.float32"}
    assert not any("scales" in name for name, _ in _flat(model))
    assert memory_needed(path) - 600 * 2**20 == _resident_bytes(model)


def _write_quantised(path: Path, quantization: dict[str, Any]) -> Path:
    import mlx.nn as nn

    model, config = load_model(make_tiny_model(path))
    nn.quantize(model, **quantization)
    mx.save_safetensors(str(path / "model.safetensors"), dict(_flat(model)), {"format": "mlx"})
    (path / "config.json").write_text(json.dumps({**config, "quantization": quantization}))
    return path


@pytest.mark.skipif(not on_cpu(), reason="Metal and CUDA run quantised weights as they are")
def test_the_memory_of_awq_weights_is_predicted(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "awq")
    weights = mx.load(str(path / "model.safetensors"))
    assert isinstance(weights, dict)
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        rows, columns = weights.pop(name).shape
        prefix = name.removesuffix("weight")
        weights[f"{prefix}qweight"] = mx.full((columns, rows // 8), 0x12345678, mx.int32)
        weights[f"{prefix}qzeros"] = mx.full((columns // 32, rows // 8), 0x12345678, mx.int32)
        weights[f"{prefix}scales"] = mx.full((columns // 32, rows), 0.1, mx.float16)
    mx.eval(weights)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (path / "config.json").write_text(json.dumps(config))
    assert memory_needed(path) - 600 * 2**20 == _resident_bytes(load(path)[0])


def _resident_bytes(model: Any) -> int:
    return sum(value.nbytes for _, value in _flat(model))


def test_on_metal_the_weights_are_wired_as_mlx_lm_wires_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    # The second is the CPU of a Mac, if it is the default device.
    for info in ({"max_recommended_working_set_size": 12345}, {"device_name": "CPU"}):
        monkeypatch.setattr(mx, "device_info", info.copy)
        load(path)
    assert limits == [12345]


def test_the_memory_of_half_precision_weights_is_predicted(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "h")
    weights = mx.load(str(path / "model.safetensors"))
    assert isinstance(weights, dict)
    mx.eval(weights)
    halves = {name: value.astype(mx.float16) for name, value in weights.items()}
    mx.save_safetensors(str(path / "model.safetensors"), halves)
    model, _ = load(path)
    resident = sum(value.nbytes for _, value in _flat(model))
    assert memory_needed(path) - 600 * 2**20 >= resident


def _flat(model: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(model.parameters()))


def test_a_lora_adapter_changes_the_answer_as_its_weights_say(path: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                "fine_tune_type": "lora",
                "num_layers": 1,
                "lora_parameters": {
                    "rank": 2,
                    "scale": 3.0,
                    "dropout": 0.0,
                    "keys": ["self_attn.q_proj"],
                },
            }
        )
    )
    lora_a, lora_b = mx.random.normal((64, 2)), mx.random.normal((2, 64))
    name = "model.layers.1.self_attn.q_proj"
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"), {f"{name}.lora_a": lora_a, f"{name}.lora_b": lora_b}
    )
    adapted, _ = load(path, adapter=adapter)
    plain, _ = load(path)
    layer = plain.model.layers[1].self_attn.q_proj
    layer.weight = layer.weight + 3.0 * (lora_a @ lora_b).T
    tokens = mx.array([[5, 9, 11]])
    assert mx.allclose(adapted(tokens), plain(tokens), atol=1e-3).item()


def test_an_adapter_that_is_not_there_is_one_clear_error(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the adapter .*nowhere"):
        load(path, adapter=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"the adapter .*nowhere"):
        SmallModel.load(path, adapter=str(tmp_path / "nowhere"), cache_dir=str(tmp_path))


@pytest.mark.parametrize("config", [{"peft_type": "LORA", "r": 8}, [], {"num_layers": "x"}])
def test_an_adapter_of_another_kind_is_one_clear_error(
    path: Path, tmp_path: Path, config: object
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="not an MLX adapter"):
        load(path, adapter=tmp_path)


@pytest.mark.parametrize("key", ["hidden_size", "rms_norm_eps", "vocab_size", None])
def test_an_incomplete_config_is_one_clear_error(tmp_path: Path, key: str | None) -> None:
    path = make_tiny_model(tmp_path / "odd")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps([] if key is None else {k: v for k, v in config.items() if k != key})
    )
    with pytest.raises(WeightsError, match="odd"):
        load(path)
    if key is None and on_cpu():
        with pytest.raises(WeightsError, match="odd"):
            memory_needed(path)


def test_a_template_that_rejects_the_conversation_is_one_clear_error(small: SmallModel) -> None:
    small.tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(UsageError, match=r"tiny fails: no system role here"):
        small.encode_conversation(ask("hi"))


def test_a_broken_weights_file_is_one_clear_error(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "broken")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="broken"):
        load(path)
