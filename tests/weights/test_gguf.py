"""GGUF to MLX: the numbers, the configuration, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxroute.errors import WeightsError
from mlxroute.types import no_progress
from mlxroute.weights.gguf_config import build_config
from mlxroute.weights.gguf_convert import converted_bytes, write_model
from mlxroute.weights.gguf_file import read_gguf
from mlxroute.weights.gguf_tensors import _unpermute
from mlxroute.weights.gguf_tokenizer import build_tokenizer
from tests.support.gguf_files import TinyModel, reference_logits, write_gguf

IDS = [256, 5, 77, 257, 200, 261, 33, 258]


def convert(source: Path, folder: Path) -> dict[str, str]:
    gguf = read_gguf(source)
    folder.mkdir()
    return write_model(
        gguf, folder, tokenizer=build_tokenizer(gguf), label="converting", progress=no_progress
    )


def logits(folder: Path, ids: list[int]) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load

    model, _ = load(str(folder))
    model.update(tree_map(lambda array: array.astype(mx.float32), model.parameters()))
    return np.array(model(mx.array([ids]))[0])


@pytest.mark.parametrize(
    "model",
    [
        TinyModel(kv_heads=4),
        TinyModel(kv_heads=2, tied=True, theta=100000.0),
        TinyModel(kv_heads=1, kind=GGMLQuantizationType.Q8_0),
        TinyModel(architecture="qwen2", kind=GGMLQuantizationType.Q4_1),
        TinyModel(architecture="qwen2", tied=True, theta=1000000.0),
    ],
    ids=["llama", "llama grouped tied", "llama quantised", "qwen2 quantised", "qwen2 tied"],
)
def test_converted_model_computes_what_the_file_describes(model: TinyModel, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", model)
    convert(source, tmp_path / "out")
    np.testing.assert_allclose(
        logits(tmp_path / "out", IDS), reference_logits(source, IDS), rtol=0.02, atol=0.02
    )


def test_llama3_frequency_factors_become_the_settings_they_came_from(tmp_path: Path) -> None:
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    model = TinyModel(theta=500000.0, extra={"rope_freqs.weight": factors})
    source = write_gguf(tmp_path / "m.gguf", model)
    convert(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    np.testing.assert_allclose(
        logits(tmp_path / "out", IDS), reference_logits(source, IDS), rtol=0.02, atol=0.02
    )


def test_unknown_frequency_factors_are_refused(tmp_path: Path) -> None:
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    source = write_gguf(tmp_path / "m.gguf", TinyModel(extra={"rope_freqs.weight": factors}))
    with pytest.raises(WeightsError, match="rope frequency factors are not those of Llama 3"):
        convert(source, tmp_path / "out")


@given(heads=st.integers(1, 8), half=st.integers(1, 16))
def test_unpermuting_undoes_the_row_order_of_llama_files(heads: int, half: int) -> None:
    original = np.arange(heads * half * 2, dtype=np.uint8).reshape(-1, 1)
    stored = original.reshape(heads, 2, half, 1).swapaxes(1, 2).reshape(original.shape)
    np.testing.assert_array_equal(_unpermute(stored, heads), original)


def test_config_contains_the_files_metadata(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel(theta=10000.0))
    gguf = read_gguf(source)
    assert build_config(gguf, build_tokenizer(gguf)) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "vocab_size": 266,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float16",
        "bos_token_id": 259,
        "eos_token_id": [261, 259],
    }


def test_linear_rope_scaling_is_kept(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    gguf = read_gguf(write_gguf(tmp_path / "m.gguf", TinyModel(metadata=metadata)))
    config = build_config(gguf, build_tokenizer(gguf))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_weights_file_is_float16_with_the_announced_size_and_hash(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    hashes = convert(source, tmp_path / "out")
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hashes == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    header_size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + header_size])
    del header["__metadata__"]
    assert {entry["dtype"] for entry in header.values()} == {"F16"}
    assert len(weights) - 8 - header_size == converted_bytes(read_gguf(source))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (TinyModel(architecture="gemma3"), "architecture 'gemma3' is not supported"),
        (TinyModel(metadata={"split.count": 3}), "one part of a split GGUF"),
        (TinyModel(pre="tekken"), "pre-tokenizer 'tekken' is not supported"),
        (TinyModel(metadata={"llama.rope.scaling.type": "su"}), "rope scaling 'su'"),
        (TinyModel(metadata={"llama.rope.dimension_count": 8}), "part of a head"),
        (
            TinyModel(extra={"blk.0.ffn_gate_exps.weight": np.zeros((2, 32), np.float32)}),
            "ffn_gate_exps.weight does not belong to a plain llama model",
        ),
        (
            TinyModel(extra={"output_norm.weight": np.full(64, 1e6, np.float32)}),
            "output_norm.weight holds values beyond float16",
        ),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused(
    model: TinyModel, message: str, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "m.gguf", model)
    with pytest.raises(WeightsError, match=message):
        convert(source, tmp_path / "out")


def test_a_file_cut_short_is_refused_at_any_length(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", TinyModel()).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [0, 3, 10, 100, 2000, len(whole) // 2, len(whole) - 5000]:
        cut.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=r"not a GGUF file|is damaged|is truncated"):
            read_gguf(cut)


@settings(max_examples=100)
@given(position=st.integers(4, 12000), value=st.integers(0, 255))
def test_a_damaged_header_never_gives_another_error(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    whole = folder / "whole.gguf"
    if not whole.exists():
        write_gguf(whole, TinyModel())
    content = bytearray(whole.read_bytes())
    content[position] = value
    damaged = folder / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        gguf = read_gguf(damaged)
        build_config(gguf, build_tokenizer(gguf))
    except WeightsError:
        pass
