"""The config.json of a GGUF file: what `mlx_lm` needs to compute what the file describes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from mlxroute.errors import WeightsError
from mlxroute.weights.gguf_file import GgufFile, GgufTensor, unsupported_type
from mlxroute.weights.gguf_tokenizer import TokenizerFiles

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = ("llama", "qwen2")

# Bounds far above any model of these architectures.
_MAX_LAYERS = 1 << 10
_MAX_HEADS = 1 << 12
_LARGEST_SIZE = 1 << 20
_LARGEST_HEAD = 1 << 14


def build_config(gguf: GgufFile, tokenizer: TokenizerFiles) -> dict[str, Any]:
    """Return the contents of config.json for a `llama` or `qwen2` file.

    Raises WeightsError for other architectures and for what cannot be converted exactly.
    """
    _check_kind(gguf)
    metadata = gguf.metadata
    heads = metadata.integer("{arch}.attention.head_count", most=_MAX_HEADS)
    hidden = metadata.integer("{arch}.embedding_length", most=_LARGEST_SIZE)
    theta = metadata.number("{arch}.rope.freq_base", default=10000.0)
    if theta == 0:
        raise metadata.refuse("{arch}.rope.freq_base")
    config: dict[str, Any] = {
        "architectures": [
            "LlamaForCausalLM" if gguf.architecture == "llama" else "Qwen2ForCausalLM"
        ],
        "model_type": gguf.architecture,
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("{arch}.feed_forward_length", most=_LARGEST_SIZE),
        "num_hidden_layers": metadata.integer("{arch}.block_count", most=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(
            "{arch}.attention.head_count_kv", default=heads, most=_MAX_HEADS
        ),
        "max_position_embeddings": _context_length(gguf),
        "rms_norm_eps": _short_float(metadata.number("{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _short_float(theta),
        "vocab_size": _vocabulary_size(gguf, tokenizer),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
    }
    head_dim = _head_dim(gguf, hidden=hidden, heads=heads)
    if gguf.architecture == "llama":
        config["head_dim"] = head_dim
        config["attention_bias"] = _has_bias(gguf, "attn_")
        config["mlp_bias"] = _has_bias(gguf, "ffn_")
    scaling = _rope_scaling(gguf, theta=config["rope_theta"], head_dim=head_dim)
    if scaling is not None:
        config["rope_scaling"] = scaling
    metadata.refuse_unread()
    return config


def require_known_type(gguf: GgufFile, tensor: GgufTensor) -> None:
    """Raise WeightsError for a tensor whose type cannot be converted."""
    if not _is_convertible(tensor.kind, len(tensor.shape)):
        raise unsupported_type(gguf.path, tensor.name, tensor.kind.name)


@cache
def _is_convertible(kind: GGMLQuantizationType, dimensions: int) -> bool:
    if dimensions == 1 and GGML_QUANT_SIZES[kind][0] != 1:
        return False
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _check_kind(gguf: GgufFile) -> None:
    """Raise WeightsError for another architecture, and for a part of a model."""
    if gguf.architecture not in ARCHITECTURES:
        raise WeightsError(
            f"{gguf.path}: GGUF architecture {gguf.architecture!r} is not supported, only llama "
            "and qwen2 are; use a model directory or a hub id instead"
        )
    # A merged file has a count of 0.
    if gguf.metadata.number("split.count", default=0) > 1:
        raise WeightsError(
            f"{gguf.path} is one part of a split GGUF: merge its parts first, with"
            " `llama-gguf-split --merge`"
        )


def _context_length(gguf: GgufFile) -> int:
    """Return the context, within which a sliding window of the file hides nothing."""
    length = gguf.metadata.integer("{arch}.context_length")
    window = gguf.metadata.number("{arch}.attention.sliding_window", default=0)
    return length if window == 0 else max(1, min(length, int(window)))


def _vocabulary_size(gguf: GgufFile, tokenizer: TokenizerFiles) -> int:
    rows = _tensor(gguf, "token_embd.weight").shape[0]
    if tokenizer.size > rows:
        raise WeightsError(
            f"{gguf.path} has {tokenizer.size} tokens, but embeddings of {rows} only; it is damaged"
            " or was converted wrongly"
        )
    return rows


def _head_dim(gguf: GgufFile, *, hidden: int, heads: int) -> int:
    """Return the size of an attention head; raise WeightsError for what mlx_lm has no place for."""
    metadata = gguf.metadata
    usual = hidden // heads
    if not metadata.has("{arch}.attention.key_length") and (hidden % heads or usual % 2):
        raise metadata.refuse("{arch}.attention.head_count")
    head_dim = metadata.integer(
        "{arch}.attention.key_length", default=max(1, usual), most=_LARGEST_HEAD
    )
    if (gguf.architecture == "qwen2" and head_dim != usual) or head_dim % 2:
        raise metadata.refuse("{arch}.attention.key_length")
    if metadata.integer("{arch}.attention.value_length", default=head_dim) != head_dim:
        raise metadata.refuse("{arch}.attention.value_length")
    if metadata.integer("{arch}.rope.dimension_count", default=head_dim) != head_dim:
        raise WeightsError(f"{gguf.path}: rotary embedding over part of a head is not supported")
    scale = metadata.number("{arch}.attention.scale", default=0.0)
    if scale and not np.isclose(scale, head_dim**-0.5, rtol=1e-5):
        raise metadata.refuse("{arch}.attention.scale")
    return head_dim


def _has_bias(gguf: GgufFile, prefix: str) -> bool:
    """Return whether a layer has a bias in its attention (`attn_`) or its MLP (`ffn_`)."""
    return any(
        f".{prefix}" in name and name.endswith(".bias") and "_norm" not in name
        for name in gguf.tensors
    )


def _rope_scaling(gguf: GgufFile, *, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the `rope_scaling` table of config.json; None if the file scales nothing."""
    metadata = gguf.metadata
    # As llama.cpp reads them: linear if no type is given, no scaling without a factor.
    kind = metadata.text("{arch}.rope.scaling.type", default="linear")
    old_factor = metadata.number("{arch}.rope.scale_linear", default=0.0)
    factor = _short_float(metadata.number("{arch}.rope.scaling.factor", default=old_factor)) or 1.0
    context = metadata.integer(
        "{arch}.rope.scaling.original_context_length",
        default=metadata.integer("{arch}.context_length"),
    )
    betas = {
        key: _short_float(metadata.number(f"{{arch}}.rope.scaling.yarn_{key}", default=default))
        for key, default in {"beta_fast": 32.0, "beta_slow": 1.0}.items()
    }
    if kind not in ("none", "linear", "yarn"):
        raise WeightsError(f"{gguf.path}: rope scaling {kind!r} is not supported")
    scales = kind != "none" and factor != 1.0
    if ROPE_FACTORS in gguf.tensors:
        if scales or gguf.architecture != "llama":
            raise WeightsError(f"{gguf.path}: {ROPE_FACTORS} is not supported with {kind} scaling")
        return _llama3_scaling(gguf, theta=theta, head_dim=head_dim)
    if not scales:
        return None
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": context,
        **betas,
    }


def _llama3_scaling(gguf: GgufFile, *, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the four settings of Llama 3's RoPE scaling from the factors that it produced.

    Llama 3 divides the frequencies of long wavelengths by `factor`, keeps those of short ones and
    interpolates between them. The file holds the divisors, `rope_freqs.weight` [head_dim / 2]; the
    settings other than `factor` are constants.
    """
    tensor = gguf.tensors[ROPE_FACTORS]
    require_known_type(gguf, tensor)
    stored = dequantize(gguf.rows(tensor), tensor.kind).reshape(-1)
    factor, low, high, context = round(float(stored.max()), 3), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    if stored.shape != smooth.shape or not np.allclose(
        stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3
    ):
        raise WeightsError(f"{gguf.path}: its rope frequency factors are not those of Llama 3")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _tensor(gguf: GgufFile, name: str) -> GgufTensor:
    if name not in gguf.tensors:
        raise WeightsError(f"{gguf.path} has no tensor {name}")
    return gguf.tensors[name]


def _short_float(value: float) -> float:
    """Return the shortest decimal of a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
