"""Metadata of GGUF files: understood, without effect, or refused with its key."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxroute.errors import WeightsError
from mlxroute.weights.gguf_config import build_config
from mlxroute.weights.gguf_convert import check_convertible
from mlxroute.weights.gguf_file import read_gguf
from mlxroute.weights.gguf_tokenizer import build_tokenizer
from tests.support.gguf_files import TinyModel, reference_logits, write_gguf
from tests.weights.test_gguf import IDS, convert, logits


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def noise(*shape: int) -> Any:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def refusal(file: Path, *, within_s: float) -> str:
    """Return the reason why a file cannot be converted, "" if it can."""
    began_s = time.monotonic()
    try:
        check_convertible(file)
        return ""
    except WeightsError as exc:
        return str(exc)
    finally:
        assert time.monotonic() - began_s < within_s


def config_of(tmp_path: Path, model: TinyModel) -> dict[str, Any]:
    gguf = read_gguf(write_gguf(tmp_path / "m.gguf", model))
    return build_config(gguf, build_tokenizer(gguf))


ATTENTION_BIASES = {
    f"blk.{layer}.attn_{name}.bias": noise(size)
    for layer in range(2)
    for name, size in {"q": 64, "k": 32, "v": 32}.items()
}


@pytest.mark.parametrize(
    "extra",
    [
        ATTENTION_BIASES,
        {"blk.0.attn_q.bias": noise(64)},
        {"blk.1.attn_k.bias": noise(32)},
    ],
    ids=["all", "queries of one layer", "keys of the second layer"],
)
def test_attention_biases_of_llama_files_are_converted(
    extra: dict[str, Any], tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel(extra=extra))
    convert(source, tmp_path / "out")
    np.testing.assert_allclose(
        logits(tmp_path / "out", IDS), reference_logits(source, IDS), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.value_length", 32),
        ("attention.key_length", 17),
        ("attention.some_new_key", 1.0),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.22),
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("use_parallel_residual", True),
        ("rope.scaling.attn_factor", 2.0),
        ("rope.scaling.yarn_ext_factor", 0.5),
        ("rope.dimension_sections", [16, 24, 24]),
    ],
)
def test_metadata_that_mlx_lm_has_no_place_for_is_refused_with_its_key(
    key: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=rf"metadata llama\.{key} = .* cannot be converted"):
        config_of(tmp_path, TinyModel(metadata={f"llama.{key}": value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", "adapter"),
        ("tokenizer.ggml.add_eos_token", True),
        ("tokenizer.ggml.add_space_prefix", True),
        ("tokenizer.ggml.remove_extra_whitespaces", True),
        ("tokenizer.ggml.precompiled_charsmap", [1, 2]),
        ("tokenizer.ggml.some_new_key", 1),
        ("adapter.lora.alpha", 16.0),
    ],
)
def test_other_metadata_with_an_effect_is_refused_with_its_key(
    key: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=rf"metadata {key} = .* cannot be converted"):
        config_of(tmp_path, TinyModel(metadata={key: value}))


def test_metadata_without_effect_changes_nothing(tmp_path: Path) -> None:
    plain = config_of(tmp_path, TinyModel())
    metadata = {
        "general.name": "x",
        "general.file_type": 7,
        "general.type": "model",
        "llama.attention.scale": 0.25,
        "llama.attention.causal": True,
        "llama.expert_count": 0,
        "llama.final_logit_softcapping": 0.0,
        "llama.logit_scale": 1.0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 4.0,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.vocab_size": 266,
        "llama.attention.sliding_window": 4096,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.fim_pre_token_id": 5,
        "quantize.imatrix.file": "x.dat",
        # As `llama-gguf-split --merge` leaves them.
        "split.count": 0,
        "split.no": 0,
        "split.tensors.count": 21,
    }
    assert config_of(tmp_path, TinyModel(metadata=metadata)) == plain


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", "many", "split.count must be a number of at least 0"),
        ("general.alignment", 0, "general.alignment must be a positive integer"),
        ("general.alignment", [32, 16], "general.alignment must be a positive integer"),
        ("tokenizer.ggml.add_bos_token", "yes", "add_bos_token must be a boolean"),
        ("tokenizer.ggml.eot_token_id", 266, "eot_token_id must be the id of one of 266 tokens"),
        ("tokenizer.ggml.bos_token_id", 10**6, "bos_token_id must be the id"),
        ("llama.rope.freq_base", "10000", "freq_base must be a number"),
        ("llama.block_count", 2000, "block_count must be a positive integer of at most 1024"),
        ("llama.block_count", 3, "has no tensor blk.2"),
        ("llama.feed_forward_length", 64, "has shape"),
        ("llama.attention.head_count", [4, 2], "head_count must be a positive integer"),
        ("llama.embedding_length", 2**31 - 1, "embedding_length must be a positive integer"),
        ("tokenizer.ggml.tokens", "x", "tokens must be a list of texts"),
        ("tokenizer.ggml.merges", ["ab"], "no usable merges"),
        ("tokenizer.ggml.merges", ["t h", "x yz"], "no token for its merge 'xyz'"),
        ("tokenizer.ggml.token_type", [99] * 266, "token_type = a list of 266 values cannot"),
        ("llama.rope.freq_base", 0.0, "llama.rope.freq_base = 0.0 cannot"),
        ("llama.attention.head_count", 3, "llama.attention.head_count = 3 cannot"),
        ("llama.\x1b[2J\nx", "v", "a name in it has control characters"),
        ("tokenizer.ggml.pre", "", "does not say how its tokenizer splits words"),
        ("tokenizer.ggml.add_bos_token", True, "puts a begin token before a text"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(
    key: str, value: object, message: str, tmp_path: Path
) -> None:
    metadata: dict[str, Any] = {key: value}
    if message.startswith("puts a begin"):
        metadata["tokenizer.ggml.bos_token_id"] = 2**32 - 1
    source = write_gguf(tmp_path / "m.gguf", TinyModel(metadata=metadata))
    with pytest.raises(WeightsError, match=message) as caught:
        check_convertible(source)
    assert str(caught.value).isprintable()


def test_heads_listed_by_layer_are_understood_if_equal(tmp_path: Path) -> None:
    config = config_of(tmp_path, TinyModel(metadata={"llama.attention.head_count": [4, 4]}))
    assert config["num_attention_heads"] == 4


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {"original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {"original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 1.0},
        ),
    ],
)
def test_rope_scaling_is_read_as_llama_cpp_reads_it(
    metadata: dict[str, Any], scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    named = {f"llama.{key}": value for key, value in metadata.items()}
    config = config_of(tmp_path, TinyModel(metadata=named))
    if scaling is None:
        assert "rope_scaling" not in config
    else:
        assert scaling.items() <= config["rope_scaling"].items()


def test_a_sliding_window_shortens_the_context(tmp_path: Path) -> None:
    model = TinyModel(metadata={"llama.attention.sliding_window": 64})
    assert config_of(tmp_path, model)["max_position_embeddings"] == 64


@pytest.mark.parametrize("kind", [1, 2, 4, 5])
def test_known_end_tokens_count_whatever_their_type(kind: int, tmp_path: Path) -> None:
    types = [1] * 259 + [3, 3, kind, 3, 4, 5, 5]
    metadata = {"tokenizer.ggml.eos_token_id": 262, "tokenizer.ggml.token_type": types}
    source = write_gguf(tmp_path / "m.gguf", TinyModel(metadata=metadata))
    tokenizer = build_tokenizer(read_gguf(source))
    assert set(tokenizer.eos_ids) == {262, 261, 259}
    added = {token["content"]: token for token in tokenizer.tokenizer["added_tokens"]}
    assert added["<|im_end|>"]["special"]


@pytest.mark.parametrize(
    ("metadata", "ids"),
    [
        ({"tokenizer.ggml.eot_token_id": 262}, {261, 259, 262}),
        ({"tokenizer.ggml.eom_token_id": 262}, {261, 259, 262}),
        ({"tokenizer.ggml.eos_token_ids": [260, 262]}, {261, 259, 260, 262}),
        ({"tokenizer.ggml.eot_token_id": 2**32 - 1}, {261, 259}),
        ({"tokenizer.ggml.padding_token_id": 5000}, {261, 259}),
    ],
)
def test_every_end_token_of_the_metadata_counts(
    metadata: dict[str, Any], ids: set[int], tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel(metadata=metadata))
    assert set(build_tokenizer(read_gguf(source)).eos_ids) == ids


def test_a_part_of_an_answer_does_not_end_it() -> None:
    from mlxroute.tokenizers.end_tokens import find_end_ids

    assert find_end_ids({"<|end|>": 1, "a": 2}) == [1]
    assert find_end_ids({"<|end|>": 1, "<|return|>": 2}) == [2]


@pytest.mark.parametrize(
    ("version", "message"),
    [(1, "GGUF version 1"), (4, "GGUF version 4"), (3 << 24, "big-endian")],
)
def test_other_versions_are_named(version: int, message: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
    with pytest.raises(WeightsError, match=message):
        read_gguf(file)


def test_a_key_or_tensor_that_occurs_twice_is_damage(tmp_path: Path) -> None:
    entry = struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 1)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * entry)
    with pytest.raises(WeightsError, match="k occurs twice"):
        read_gguf(file)


@pytest.mark.parametrize("field", ["count", "key", "array", "nested", "tensors", "dimensions"])
def test_a_length_field_of_any_size_allocates_nothing(field: str, tmp_path: Path) -> None:
    import tracemalloc

    huge = struct.pack("<Q", 2**60)
    key = struct.pack("<Q", 1) + b"k"
    content = {
        "count": struct.pack("<Q", 0) + huge,
        "key": struct.pack("<QQ", 0, 1) + huge,
        "array": struct.pack("<QQ", 0, 1) + key + struct.pack("<II", 9, 4) + huge,
        "nested": struct.pack("<QQ", 0, 1)
        + key
        + struct.pack("<I", 9)
        + 5000 * (struct.pack("<IQ", 9, 1)),
        "tensors": huge + struct.pack("<Q", 0),
        "dimensions": struct.pack("<QQ", 1, 0) + key + struct.pack("<I", 2**32 - 1),
    }[field]
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + content)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match="damaged"):
            read_gguf(file)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400))
def test_any_bytes_give_a_file_or_a_weights_error(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "any.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<I", 3) + data)
    assert "\n" not in refusal(file, within_s=5)


_SCALARS = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
_VALUES = _SCALARS | st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
_KEYS = [
    "general.architecture",
    "general.alignment",
    "split.count",
    *(
        f"llama.{name}"
        for name in (
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "attention.layer_norm_rms_epsilon",
            "attention.sliding_window",
            "rope.freq_base",
            "rope.dimension_count",
            "rope.scaling.type",
            "rope.scaling.factor",
        )
    ),
    *(
        f"tokenizer.ggml.{name}"
        for name in ("model", "pre", "tokens", "token_type", "merges", "scores", "bos_token_id")
    ),
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eos_token_ids",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.chat_template",
]


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=st.dictionaries(st.sampled_from(_KEYS), _VALUES, min_size=1, max_size=3))
def test_any_metadata_gives_a_model_or_a_weights_error(
    metadata: dict[str, Any], tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "any.gguf", TinyModel(metadata=metadata))
    assert "\n" not in refusal(source, within_s=5)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    tokens = [*TinyModel().tokens, "<extra>"]
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * len(tokens)}
    source = write_gguf(tmp_path / "m.gguf", TinyModel(metadata=metadata))
    with pytest.raises(WeightsError, match="267 tokens, but embeddings of 266"):
        check_convertible(source)


def change_type(file: Path, tensor: str, kind: int) -> None:
    """Change the type of a tensor of one dimension in the header of a file."""
    content, name = file.read_bytes(), tensor.encode()
    # After the name: the number of dimensions, one dimension, and the type.
    position = content.index(name) + len(name) + 12
    file.write_bytes(content[:position] + struct.pack("<I", kind) + content[position + 4 :])


def test_an_unknown_type_of_weights_is_refused_before_the_conversion(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    change_type(source, "blk.0.attn_norm.weight", GGMLQuantizationType.I64)
    with pytest.raises(WeightsError, match=r"I64, which is not supported|truncated|damaged"):
        check_convertible(source)


@pytest.mark.parametrize("name", ["F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"])
def test_an_unknown_type_of_frequency_factors_is_refused(name: str, tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": ones(256), "next": ones(512)}
    metadata = {"llama.attention.key_length": 512}
    source = write_gguf(tmp_path / "m.gguf", TinyModel(extra=extra, metadata=metadata))
    change_type(source, "rope_freqs.weight", GGMLQuantizationType[name])
    with pytest.raises(WeightsError, match=rf"rope_freqs.weight has type {name}, which is not sup"):
        check_convertible(source)


@pytest.mark.parametrize("kind", [4, 31, 36, 42, 255])
def test_a_type_of_weights_that_has_no_name_is_not_called_damage(kind: int, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel())
    change_type(source, "blk.0.attn_norm.weight", kind)
    with pytest.raises(WeightsError) as caught:
        read_gguf(source)
    assert str(caught.value) == (
        f"{source}: tensor blk.0.attn_norm.weight has type {kind}, which is not supported; use a"
        " file of another quantisation, such as F16 or Q4_K_M"
    )


def test_a_type_of_metadata_that_has_no_name_is_not_called_damage(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    key = struct.pack("<Q", 3) + b"a.b"
    for value in (struct.pack("<I", 13), struct.pack("<IIQ", 9, 13, 1)):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + value + bytes(8))
        with pytest.raises(WeightsError, match=r"a\.b has a value of type 13, which is not"):
            read_gguf(file)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<I", 2**31))
    with pytest.raises(WeightsError, match="is damaged"):
        read_gguf(file)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    source = write_gguf(
        tmp_path / "m.gguf", TinyModel(extra={"output_norm.weight": ones(64) * value})
    )
    with pytest.raises(WeightsError, match=r"output_norm\.weight holds .* not finite numbers"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["[|endofturn|]", "<|END_OF_TURN_TOKEN|>", "[e~[", "<seed:eos>", "<|role_end|>"]
)
def test_end_tokens_of_other_families_are_known(name: str, tmp_path: Path) -> None:
    tokens = TinyModel().tokens
    tokens[262] = name
    source = write_gguf(tmp_path / "m.gguf", TinyModel(metadata={"tokenizer.ggml.tokens": tokens}))
    assert 262 in build_tokenizer(read_gguf(source)).eos_ids


def test_a_norm_with_a_bias_is_refused_with_its_name(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", TinyModel(extra={"blk.0.attn_norm.bias": ones(64)}))
    with pytest.raises(WeightsError, match=r"attn_norm\.bias does not belong"):
        check_convertible(source)
