"""Model directories: what their files say is followed, has no effect, or is refused by name."""

from __future__ import annotations

import importlib
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxroute.backend.load import load, memory_needed
from mlxroute.backend.model_config import check_understood, read_config
from mlxroute.errors import MlxRouteError, UsageError, WeightsError
from mlxroute.small import SmallModel
from mlxroute.tokenizers.chat_tokenizer import ChatTokenizer
from tests.support.tiny import KINDS, make_tiny_model


def change_config(path: Path, **values: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))
    return path


def change_tokenizer(path: Path, **values: Any) -> Path:
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return path


def check(architecture: str, **values: Any) -> int | None:
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    return check_understood({"model_type": architecture, **values}, module, Path("m"))


def test_an_unknown_token_that_is_empty_is_one_clear_error(tmp_path: Path) -> None:
    path = change_tokenizer(make_tiny_model(tmp_path / "m"), unk_token="")
    with pytest.raises(WeightsError, match="cannot be loaded as a model: maximum recursion"):
        load(path)


@pytest.mark.parametrize("value", [[], {}, "a", math.nan, 4096.5, True, -1])
def test_a_context_that_is_no_number_is_refused(value: object, tmp_path: Path) -> None:
    path = change_config(make_tiny_model(tmp_path / "m"), max_position_embeddings=value)
    with pytest.raises(WeightsError, match="max_position_embeddings is out of bounds"):
        load(path)


def test_a_number_too_large_for_a_float_is_one_clear_error(tmp_path: Path) -> None:
    path = change_config(make_tiny_model(tmp_path / "m"), rope_theta=10**400)
    with pytest.raises(WeightsError, match="rope_theta is out of bounds"):
        load(path)


def test_an_infinite_number_of_bits_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxroute.backend.load.on_cpu", lambda: True)
    quantization = {"quant_method": "gptq", "bits": math.inf}
    path = change_config(make_tiny_model(tmp_path / "m"), quantization_config=quantization)
    with pytest.raises(WeightsError, match="m is not a readable model: cannot convert"):
        memory_needed(path)


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "pad_token"])
@pytest.mark.parametrize("token", ["not there", ""])
def test_a_role_of_a_token_that_is_not_in_the_vocabulary_is_no_token(
    role: str, token: str, tmp_path: Path
) -> None:
    path = change_tokenizer(make_tiny_model(tmp_path / "m"), **{role: token})
    small = SmallModel(*load(path), name="m")
    assert None not in small.vocabulary.eos_ids
    assert small.encode_conversation([{"role": "user", "content": "hi"}]).ids


def test_settings_that_force_or_forbid_tokens_have_a_line(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    sampling = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1, "do_sample": True}
    neutral = {"suppress_tokens": [], "num_beams": 1, "forced_eos_token_id": None}
    lines: list[str] = []
    (path / "generation_config.json").write_text(json.dumps(sampling | neutral))
    load(path, notify=lambda line: lines.append(line))
    assert lines == []
    forced = {"suppress_tokens": [3], "bad_words_ids": [[4]], "no_repeat_ngram_size": 3}
    (path / "generation_config.json").write_text(json.dumps(sampling | forced))
    load(path, notify=lambda line: lines.append(line))
    assert lines == [
        "generation_config.json of m sets bad_words_ids, no_repeat_ngram_size, suppress_tokens,"
        " which has no effect here: the likeliest token is written, or one is sampled"
    ]
    (path / "generation_config.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"generation_config.json cannot be read"):
        load(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.06),
        ("partial_rotary_factor", 0.5),
        ("num_local_experts", 8),
        ("num_experts", 8),
        ("use_qk_norm", True),
        ("qk_layernorm", True),
        ("clip_qkv", 8.0),
        ("attention_chunk_size", 8192),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0, "attention_factor": 3.0}),
    ],
)
def test_what_mlx_lm_ignores_is_refused_with_its_key(
    key: str, value: object, tmp_path: Path
) -> None:
    path = change_config(make_tiny_model(tmp_path / "m"), **{key: value})
    with pytest.raises(WeightsError, match=rf"config.json: {key} = .* is not supported"):
        load(path)


@pytest.mark.parametrize(
    ("architecture", "values"),
    [
        ("llama", {"final_logit_softcapping": None, "num_experts": 0, "hidden_act": "silu"}),
        ("llama", {"rope_scaling": None, "partial_rotary_factor": 1.0, "clip_qkv": None}),
        ("gemma2", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
        ("gemma3", {"text_config": {"query_pre_attn_scalar": 168, "rope_local_base_freq": 1e4}}),
        ("mixtral", {"num_local_experts": 8}),
        ("qwen3_moe", {"num_experts": 128}),
        ("stablelm", {"partial_rotary_factor": 0.25}),
        ("gpt_oss", {"sliding_window": 128, "layer_types": ["sliding_attention"]}),
        ("olmo3", {"sliding_window": 4096}),
        ("qwen2", {"sliding_window": 4096, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 4096, "max_position_embeddings": 4096}),
        ("llama", {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.138629}}),
    ],
)
def test_what_mlx_lm_follows_is_accepted(architecture: str, values: dict[str, Any]) -> None:
    assert check(architecture, **values) is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "starcoder2"])
def test_an_ignored_sliding_window_limits_the_context(architecture: str) -> None:
    assert check(architecture, sliding_window=4096, max_position_embeddings=32768) == 4096


def test_the_context_of_a_model_with_an_ignored_window_is_said(tmp_path: Path) -> None:
    path = change_config(
        make_tiny_model(tmp_path / "m"), sliding_window=96, max_position_embeddings=2048
    )
    lines: list[str] = []
    small = SmallModel.load(
        path, cache_dir=tmp_path / "cache", notify=lambda line: lines.append(line)
    )
    assert small.context_length == 96
    assert any("the context of m is 96 tokens here" in line for line in lines)


def test_an_output_layer_of_its_own_is_used_whatever_the_default(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", tied=False)
    ids = mx.array([[1, 5, 9]])
    expected = load(path)[0](ids)
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(load(path)[0](ids), expected)


def test_nested_rope_parameters_are_followed(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    scaling = {"rope_type": "linear", "factor": 4.0}
    ids = mx.array([[1, 5, 9]])
    plain = load(path)[0](ids)
    expected = load(change_config(path, rope_theta=500.0, rope_scaling=scaling))[0](ids)
    config = json.loads((path / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    config["rope_parameters"] = {"rope_theta": 500.0, **scaling}
    (path / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(load(path)[0](ids), expected)
    assert not mx.array_equal(plain, expected)


_DEFAULT = {"rope_type": "default", "rope_theta": 500.0}
_LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}


def test_rope_parameters_of_each_kind_of_layer_are_followed(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", model_type="gemma3_text", extra=KINDS["gemma3_text"])
    ids = mx.array([[1, 5, 9]])
    older = {"rope_theta": 500.0, "rope_local_base_freq": 50.0}
    plain = load(change_config(path, **older))[0](ids)
    scaling = {"rope_type": "linear", "factor": 8.0}
    expected = load(change_config(path, **older, rope_scaling=scaling))[0](ids)
    config = json.loads((path / "config.json").read_text())
    del config["rope_theta"], config["rope_local_base_freq"], config["rope_scaling"]
    local = {**_DEFAULT, "rope_theta": 50.0}
    config["rope_parameters"] = {"full_attention": _LINEAR, "sliding_attention": local}
    (path / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(load(path)[0](ids), expected)
    assert not mx.array_equal(plain, expected)


def with_rope(tmp_path: Path, architecture: str, rope: Any) -> dict[str, Any]:
    """Return the configuration of a model with `rope_parameters`, once it is understood."""
    config = {"model_type": architecture, "rope_parameters": rope, "max_position_embeddings": 64}
    config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = read_config(tmp_path)
    check_understood(config, importlib.import_module(f"mlx_lm.models.{architecture}"), tmp_path)
    return config


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("ministral3", {**_YARN, "llama_4_scaling_beta": 0.1}),
        ("minimax_m3_vl", _YARN),
        ("mistral4", _YARN),
        ("qwen3", _YARN),
        ("qwen3_5", _YARN),
        ("lfm2", _DEFAULT),
        ("olmo3", {"full_attention": _YARN, "sliding_attention": _DEFAULT}),
        ("olmo3", {"full_attention": _DEFAULT, "sliding_attention": _DEFAULT}),
        ("gemma3n", {"full_attention": _DEFAULT, "sliding_attention": {"rope_theta": 5.0}}),
        ("llama", {"full_attention": _YARN, "sliding_attention": _YARN}),
        ("laguna", {"full_attention": _YARN, "sliding_attention": {"rope_theta": 5.0}}),
        ("gemma4_text", {"full_attention": _LINEAR, "sliding_attention": {"rope_theta": 5.0}}),
        ("mellum", {"full_attention": _YARN, "sliding_attention": {"rope_theta": 5.0}}),
        ("spark2_5", {"full_attention": _DEFAULT, "sliding_attention": {"rope_theta": 5.0}}),
    ],
)
def test_rope_parameters_that_mlx_lm_follows_are_accepted(
    architecture: str, rope: Any, tmp_path: Path
) -> None:
    config = with_rope(tmp_path, architecture, rope)
    full = rope.get("full_attention", rope)
    assert config["rope_theta"] == full["rope_theta"]
    scaling = config.get("rope_scaling") or {}
    assert scaling.get("factor") == full.get("factor")
    is_yarn = full["rope_type"] == "yarn"
    assert ("original_max_position_embeddings" in scaling) == is_yarn


@pytest.mark.parametrize(
    ("architecture", "rope", "key"),
    [
        # These read `rope_theta` from it, and scale nothing.
        ("lfm2", _YARN, "rope_scaling"),
        ("olmo_hybrid", _YARN, "rope_scaling"),
        ("granitemoehybrid", _YARN, "rope_scaling"),
        ("spark2_5", {"full_attention": _YARN, "sliding_attention": _DEFAULT}, "rope_scaling"),
        ("llama", {"full_attention": _YARN, "sliding_attention": _DEFAULT}, "rope_parameters"),
        ("gemma3_text", {"full_attention": _YARN, "sliding_attention": _YARN}, "rope_parameters"),
        ("gemma3_text", {"full_attention": _DEFAULT, "other": _DEFAULT}, "rope_parameters"),
        ("olmo3", {"full_attention": _DEFAULT, "sliding_attention": _YARN}, "rope_parameters"),
        (
            "olmo3",
            {"full_attention": _DEFAULT, "sliding_attention": {"rope_theta": 5.0}},
            "rope_local_base_freq",
        ),
        ("ministral3", {**_YARN, "attention_factor": 3.0}, "rope_scaling"),
        ("ministral3", {**_YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rope_parameters_that_mlx_lm_ignores_are_refused(
    architecture: str, rope: Any, key: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=rf"config.json: {key} = .* is not supported"):
        with_rope(tmp_path, architecture, rope)


@pytest.mark.parametrize("theta", [0, -1.0, math.inf, "10000"])
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_a_base_in_rope_parameters_that_is_no_number_is_refused(
    kind: str, theta: object, tmp_path: Path
) -> None:
    rope = {"full_attention": _DEFAULT, "sliding_attention": _DEFAULT}
    rope[kind] = {**_DEFAULT, "rope_theta": theta}
    with pytest.raises(WeightsError, match="is out of bounds"):
        with_rope(tmp_path, "gemma3_text", rope)


def test_yarn_gets_the_context_of_the_configuration(tmp_path: Path) -> None:
    path = change_config(
        make_tiny_model(tmp_path / "m"),
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
        max_position_embeddings=2048,
    )
    assert read_config(path)["rope_scaling"]["original_max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method = 'bitsandbyt"),
        ({"quantization_config": {"bits": 4}}, "quant_method = None"),
        ({"quantization_config": "int4"}, "quantization_config is not a JSON object"),
        ({"quantization": {"group_size": 64}}, "quantization has no usable bits"),
        ({"quantization": {"bits": 0, "group_size": 64}}, "quantization has no usable bits"),
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "not_a_model"}, "not_a_model not supported"),
        ({"model_type": "cache"}, "cannot be loaded as a model"),
        ({"model_type": "../../x"}, "cannot be loaded as a model"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is out of bounds"),
        ({"hidden_size": 2**60}, "hidden_size is out of bounds"),
        ({"layer_types": ["full_attention"] * 10**5}, "layer_types is out of bounds"),
        ({"num_attention_heads": 0}, "cannot be loaded as a model"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is out of bounds"),
        ({"rope_theta": 0}, "rope_theta is out of bounds"),
        ({"rope_theta": math.nan}, "rope_theta is out of bounds"),
        ({"attention_multiplier": 0.5}, "attention_multiplier = 0.5 is not supported"),
        ({"eos_token_id": "2"}, "eos_token_id is '2'"),
        ({"eos_token_id": [[2]]}, r"eos_token_id is \[\[2\]\]"),
        ({"rope_scaling": {"type": "magic", "factor": 2}}, "magic"),
    ],
)
def test_a_wrong_value_is_one_clear_error(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = change_config(make_tiny_model(tmp_path / "m"), **values)
    with pytest.raises(WeightsError, match=message):
        load(path)


def test_code_of_a_tokenizer_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: str = "") -> str:
        pytest.fail("a question was asked")

    monkeypatch.setattr("builtins.input", ask)
    path = make_tiny_model(tmp_path / "m")
    file = path / "tokenizer_config.json"
    code = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **code}))
    (path / "code.py").write_text("raise SystemExit(9)")
    with pytest.raises(WeightsError, match="custom code"):
        load(path)
    with pytest.raises(WeightsError, match="custom code"):
        ChatTokenizer.load(path, name="m")


def test_a_missing_part_of_the_weights_is_named(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    names = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(WeightsError, match="incomplete: it has no model-00002-of-00002"):
        load(path)


def test_known_end_tokens_end_answers_whatever_the_files_say(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    _, tokenizer = load(path)
    names = {tokenizer.convert_ids_to_tokens(i) for i in tokenizer.eos_token_ids}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    assert names == added & {"<|im_end|>", "<|endoftext|>"}
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    for full in (False, True):
        assert {5, 6} < set(load(path, full_tokenizer=full)[1].eos_token_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "prefix"}, "fine_tune_type = 'prefix'"),
        ({"lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0, "alpha": 9}}, "alpha"),
    ],
)
def test_what_mlx_lm_ignores_in_an_adapter_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = {"num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match=message):
        load(make_tiny_model(tmp_path / "m"), adapter=tmp_path)


def outcome(path: Path) -> str:
    """Return the reason why a model directory is refused, "" if it is loaded."""
    began_s = time.monotonic()
    try:
        memory_needed(path)
        load(path)
        return ""
    except MlxRouteError as exc:
        return str(exc)
    finally:
        assert time.monotonic() - began_s < 20


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_CONFIG_KEYS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("rope_scaling", "rope_parameters", "quantization", "quantization_config", "text_config"),
    *("tie_word_embeddings", "sliding_window", "layer_types", "eos_token_id", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "head_dim", "num_experts"),
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=st.dictionaries(st.sampled_from(_CONFIG_KEYS), _JSON, min_size=1, max_size=2))
def test_any_configuration_gives_a_model_or_one_of_our_errors(
    values: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "m"
    if not path.exists():
        make_tiny_model(path)
        (path / "original.json").write_bytes((path / "config.json").read_bytes())
    original = json.loads((path / "original.json").read_text())
    (path / "config.json").write_text(json.dumps({**original, **values}))
    assert "\n" not in outcome(path)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(
        ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
    ),
    data=st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()),
)
def test_any_bytes_in_a_json_file_give_a_model_or_one_of_our_errors(
    name: str, data: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    if not path.exists():
        make_tiny_model(path)
    file = path / name
    before = file.read_bytes() if file.exists() else None
    file.write_bytes(data)
    try:
        assert "\n" not in outcome(path)
    finally:
        file.unlink()
        if before is not None:
            file.write_bytes(before)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_deeply_nested_json_is_one_clear_error(name: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    (path / name).write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=rf"{name} cannot be read: .* nested"):
        load(path)


@pytest.mark.parametrize("length", [2**60, 2**63, 99 << 20, 0])
def test_a_header_length_of_any_size_is_one_clear_error(length: int, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    (path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load(path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    header=st.binary(max_size=60)
    | st.dictionaries(
        st.text(max_size=5),
        _JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U32", "BF16", "X"]),
                "shape": st.lists(st.integers(-1, 2**63), max_size=3),
                "data_offsets": st.lists(st.integers(0, 2**63), max_size=3),
            }
        ),
        max_size=2,
    ).map(lambda table: json.dumps(table).encode())
)
def test_any_safetensors_header_gives_tensors_or_one_of_our_errors(
    header: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "m"
    if not path.exists():
        make_tiny_model(path)
    data = struct.pack("<Q", len(header)) + header + bytes(16)
    (path / "model.safetensors").write_bytes(data)
    assert outcome(path)


def test_the_tiny_model_is_one_that_can_be_loaded(tmp_path: Path) -> None:
    assert outcome(make_tiny_model(tmp_path / "m")) == ""
    assert memory_needed(tmp_path / "m") > 0
